"""What rows in files take up: descriptors that are shared and closed, and neither memory nor disk of their own.

Proves that reading makes no private page and writes nothing, that processes share the page cache, and that a table
beyond RAM and swap is read and mapped (a sparse file of at least 60 GiB, which is deleted). A mapping
that is written to is the control. What comes out is in tests/unit/test_rows.py.

Run: pytest tests/unit/test_rows_room.py
"""

import copy
import mmap
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from engram_transformers.configuration_engram import EngramFormatError
from engram_transformers.files_safetensors_engram import ZeroTensor
from engram_transformers.rows_storage_engram import FilePart, FileRows, HostRows, ShardFile, is_mapped, written_to

from ..faults import Child, cut, mapped, open_files, random_table, same, stored


ROW = 64 * 4  # bytes of a row of 64 float32


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def table() -> torch.Tensor:
    return random_table(1000, 64)


def test_descriptors_are_shared_by_copies_opened_anew_by_pickles_and_closed_with_the_last(table, folder):
    assert open_files(folder) == 0
    rows, wanted = stored(folder, cut(table, 2), max_bytes=table.nbytes // 2), torch.tensor([999, 3])
    assert open_files(folder) == 2
    twin = copy.deepcopy(rows)
    assert twin.parts[0].file is rows.parts[0].file and open_files(folder) == 2
    del rows
    assert same(twin.read(wanted), table[wanted])
    again = pickle.loads(pickle.dumps(twin))
    assert open_files(folder) == 4
    del twin
    assert open_files(folder) == 2
    assert same(again.read(wanted), table[wanted])
    held = mapped(again)
    del again
    assert open_files(folder) > 2, "a mapping and what it was made from"
    assert same(held.read(wanted), table[wanted])
    del held
    assert open_files(folder) == 0


def test_a_copy_of_rows_in_host_memory_no_longer_needs_the_file(table, folder):
    rows = stored(folder, cut(table, 3))
    twin, wanted = copy.deepcopy(mapped(rows)), torch.tensor([999, 3])
    os.truncate(rows.parts[0].file.path, 0)
    assert Child(lambda: same(twin.read(wanted), table[wanted])).result()


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_that_were_given_memory_of_their_own_no_longer_need_the_file(parts, table, folder):
    rows, wanted = stored(folder, cut(table, parts)), torch.tensor([999, 3])
    own, control = mapped(rows), mapped(rows)
    own.own()
    assert not any(map(is_mapped, own.parts)) and all(map(is_mapped, control.parts))
    assert all(map(written_to, own.parts)) and not any(map(written_to, control.parts))
    os.truncate(rows.parts[0].file.path, 0)
    assert Child(lambda: same(own.read(wanted), table[wanted])).result()
    with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
        control.read(wanted)


def test_memory_that_processes_share_is_left_where_it_is(table):
    shared = table.clone().share_memory_()
    place, rows = shared.data_ptr(), HostRows([shared])
    rows.own()
    assert rows.parts[0].data_ptr() == place, "a copy would be this process' alone"


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10


def mapping_of(tensor: torch.Tensor) -> dict[str, int]:
    """The kilobytes of a tensor's mapping, from smaps."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8")):
        first, last = (int(end, 16) for end in block.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return {name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", block)}
    raise AssertionError("the tensor is in no mapping")


def test_reading_every_row_makes_no_copy_and_processes_share_the_pages(folder):
    table = torch.arange(1 << 23, dtype=torch.float32).view(-1, 64)  # 32 MiB
    rows = stored(folder, cut(table, 2))
    os.fsync(rows.parts[0].file.descriptor)  # the pages that the test wrote itself are clean
    used, own = {path: path.stat().st_blocks for path in folder.iterdir()}, mapped(rows)
    assert same(own.read(torch.arange(len(table))), table)

    def read_all(kind) -> dict:
        """What a process has after it has opened the file for itself and read all of it."""
        before = anonymous()
        source = kind(pickle.loads(pickle.dumps(rows)))
        for wanted in torch.randperm(len(table)).split(8192):  # 2 MiB
            assert torch.equal(source.read(wanted)[:, 0], wanted * 64.0)
        written = re.search(r"write_bytes: (\d+)", Path("/proc/self/io").read_text(encoding="utf-8"))[1]
        held = mapping_of(source.parts[0]) if isinstance(source, HostRows) else {}
        return {"grown": anonymous() - before, "written": int(written), **held}

    def trained(rows: FileRows) -> HostRows:
        host = mapped(rows)
        for part in host.parts:
            part.add_(0.0)
        return host

    files, maps, control = (Child(lambda kind=kind: read_all(kind)).result() for kind in (lambda r: r, mapped, trained))
    assert files["grown"] < table.nbytes / 4 and maps["grown"] < table.nbytes / 4, "one batch at a time"
    assert maps["Rss"] >= table.nbytes >> 10 and maps["Shared_Clean"] >= 0.99 * maps["Rss"]
    assert maps["Private_Dirty"] == maps["Shared_Dirty"] == maps["Anonymous"] == 0
    assert control["Private_Dirty"] >= table.nbytes >> 10 and control["grown"] >= table.nbytes, "a copy is seen"
    assert files["written"] == maps["written"] == 0
    assert {path: path.stat().st_blocks for path in folder.iterdir()} == used


def test_a_table_beyond_ram_and_swap_is_read_and_mapped(folder):
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    total = sum(int(re.search(rf"{name}:\s+(\d+) kB", memory)[1]) << 10 for name in ("MemTotal", "SwapTotal"))
    height = max(60 << 30, total + (8 << 30)) // ROW
    try:
        rows = stored(folder, [ZeroTensor((height, 64), torch.float32)])
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of {height * ROW:,} bytes ({error})")
    (part,), table = rows.parts, random_table(3, 64)
    wanted = torch.tensor([height - 1, 0, height // 2, 12345])
    try:
        assert part.file.path.stat().st_blocks * 512 < 1 << 20
        with open(part.file.path, "r+b") as file:
            for row, values in zip(wanted.tolist(), table, strict=False):
                os.pwrite(file.fileno(), values.numpy().tobytes(), part.offset + row * ROW)
        rows = FileRows([FilePart(ShardFile(part.file.path), part.offset, part.shape, part.dtype)])
        expected = torch.cat([table, torch.zeros(1, 64)])
        before = anonymous()
        for source in (rows, mapped(rows)):
            assert same(source.read(wanted), expected)
        assert anonymous() - before < 8 << 20
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "0":
            with pytest.raises(OSError, match="Cannot allocate memory"):  # the control: what safetensors would do
                mmap.mmap(part.file.descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        part.file.path.unlink()
