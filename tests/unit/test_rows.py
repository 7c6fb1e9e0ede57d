"""How rows in files are read, and what they take up.

Proves that each row is read once, neighbours together, and the kernel is told of the others before the first is waited
for; that rows are found where safetensors finds them, and damaged files are refused; that reading makes no private page
and writes nothing, that processes share the page cache, and that a table beyond RAM and swap is read and mapped (a
sparse file of at least 60 GiB, which is deleted). That what is read is the table's is in tests/unit/test_row_stores.py.

Run: pytest tests/unit/test_rows.py
"""

import errno
import importlib.util
import mmap
import os
import pickle
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from engram_transformers import EngramFormatError, rows_storage_engram
from engram_transformers.files_atomic_engram import MEMORY_STEM
from engram_transformers.files_safetensors_engram import ZeroTensor, write_index, write_shards
from engram_transformers.rows_storage_engram import (
    FEW_ROWS,
    NEAR,
    NO_WAIT,
    CheckpointTables,
    FilePart,
    FileRows,
    HostRows,
    ShardFile,
    is_mapped,
    written_to,
)

from ..faults import Child, absent, cut, disk, forget, mapped, open_files, random_table, same, soon, stored


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROW = 64 * 4  # bytes of a row of 64 float32


def forgotten(rows: FileRows) -> bool:
    """Whether a page in the middle of the file is out of the page cache."""
    forget(rows)
    try:
        os.preadv(rows.parts[0].file.descriptor, [bytearray(1)], 128 << 10, NO_WAIT)
    except BlockingIOError:
        return True
    return False


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def table() -> torch.Tensor:
    return random_table(1000, 64)


@pytest.fixture
def rows(table, folder) -> FileRows:
    return stored(folder, cut(table, 3))


@pytest.fixture
def shard(rows) -> Path:
    return rows.parts[0].file.path


@pytest.mark.skipif(NO_WAIT is None, reason="this system cannot say whether a row is in the page cache")
def test_rows_that_are_in_the_page_cache_are_there_at_once_and_others_never(rows, table):
    wanted = torch.tensor([999, 3, 3, 500])
    rows.read(wanted)
    assert same(rows.read_resident(wanted), table[wanted])
    assert rows.read_resident(torch.zeros(FEW_ROWS, dtype=torch.int64)) is not None
    assert rows.read_resident(torch.zeros(FEW_ROWS + 1, dtype=torch.int64)) is None, "so many take a thread"
    with disk(absent):
        assert rows.read_resident(wanted) is None
    if not soon(lambda: forgotten(rows), seconds=2):
        pytest.skip("this file system keeps its pages (tmpfs)")
    assert rows.read_resident(torch.tensor([500])) is None
    assert same(rows.read(wanted), table[wanted])


def expected_runs(wanted: list[int], part: FilePart) -> list[tuple[int, int]]:
    """First byte and length of every read of a part: rows at most `NEAR` bytes apart together."""
    size, runs = ROW, []
    for begin in sorted({part.offset + row * size for row in wanted}):
        if runs and begin - sum(runs[-1]) <= NEAR:
            runs[-1] = (runs[-1][0], begin + size - runs[-1][0])
        else:
            runs.append((begin, size))
    return runs


@given(
    clusters=st.lists(st.tuples(st.integers(0, 989), st.sets(st.integers(0, 10), min_size=1)), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_each_row_is_read_once_neighbours_together_and_the_kernel_knows_of_all_before_one_is_waited_for(
    clusters, seed, tmp_path
):
    wanted = [first + step for first, steps in clusters for step in steps]
    rows = stored(Path(tempfile.mkdtemp(dir=tmp_path)), cut(random_table(1000, 64), 3))
    calls, told, height = [], [], rows.parts[0].shape[0]
    inside = [[row - 333 * n for row in wanted if min(row // 333, 2) == n] for n in range(3)]
    runs = [run for part, own in zip(rows.parts, inside, strict=True) for run in expected_runs(own, part)]
    asked = torch.tensor(wanted + wanted)[
        torch.randperm(2 * len(wanted), generator=torch.Generator().manual_seed(seed))
    ]

    def watch(real, descriptor, buffers, offset, flags=0):
        calls.append(("try" if flags else "wait", offset, len(buffers[0])))
        return stand_in(real, descriptor, buffers, offset, flags)

    assert height == 333
    for resident in (True, False):
        stand_in = (lambda real, *a: real(*a)) if resident else absent
        calls.clear(), told.clear()
        with disk(watch), pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fadvise", lambda fd, *place: told.append((len(calls), *place[:2])))
            rows.read(asked)
        waits = [number for number, call in enumerate(calls) if call[0] == "wait"]
        assert sorted(call[1:] for call in calls if call[0] == "try") == sorted(runs)
        assert sorted(calls[number][1:] for number in waits) == ([] if resident else sorted(runs))
        assert [place[1:] for place in told] == ([] if resident else runs)
        assert all(place[0] <= waits[0] for place in told)


# Places of tensors in files.


@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    max_bytes=st.integers(1100, 5000),
)
def test_every_tensor_is_found_where_safetensors_finds_it(shapes, max_bytes, tmp_path):
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    named = {f"t{number}": random_table(*shape, seed=number) for number, shape in enumerate(shapes)}
    weight_map = write_shards(folder, MEMORY_STEM, named, max_bytes)
    write_index(folder, weight_map, 0)
    checkpoint = CheckpointTables(folder)
    assert open_files(folder) == 0, "files are opened when they are needed"
    for name, tensor in named.items():
        part = checkpoint.part(name)
        assert (part.shape, part.dtype, part.file.path.name) == (tuple(tensor.shape), tensor.dtype, weight_map[name])
        assert part.file.path.read_bytes()[part.offset :][: tensor.nbytes] == tensor.view(torch.uint8).numpy().tobytes()
        with safe_open(part.file.path, "pt") as file:
            assert same(file.get_tensor(name), tensor)
        assert same(part.within(part.file.map()), tensor)
        assert same(FileRows([part]).read(torch.arange(len(tensor))), tensor)
    del part
    assert open_files(folder) == len(set(weight_map.values())), "one descriptor for each file"
    with pytest.raises(EngramFormatError, match="does not name 'elsewhere'"):
        checkpoint.part("elsewhere")


def with_header(change) -> bytes:
    """A file whose header was written anew by hand, at the same length."""

    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + length])
        assert len(header) == length and header != data[8 : 8 + length]
        return data[:8] + header + data[8 + length :]

    return damage


DAMAGE = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "no JSON": with_header(lambda header: b"[" + header[1:]),
    "a name": with_header(lambda header: header.replace(b"order2.1", b"order9.1")),
    "a type": with_header(lambda header: header.replace(b'"F32"', b'"X32"', 1)),
    "half a type": with_header(lambda header: header.replace(b'"F32"', b'"F16"', 1)),
    "a shape": with_header(lambda header: header.replace(b"[10,4]", b"[11,4]", 1)),
    "a longer tensor": with_header(lambda header: header.replace(b"[160,320]", b"[150,320]")),
    "a shorter tensor": with_header(lambda header: header.replace(b"[160,320]", b"[170,320]")),
    "two in one place": with_header(lambda header: header.replace(b"[0,160]", b"[1,161]")),
    "a place before the data": with_header(lambda header: header.replace(b"[160,320]", b"[-16,144]")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_header_is_an_error_before_a_row_is_read(damage, folder):
    table = random_table(20, 4)
    shard = stored(folder, cut(table, 2)).parts[0].file.path
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(EngramFormatError, match=re.escape(str(shard)) + "|rows of type X32"):
        checkpoint = CheckpointTables(folder)
        FileRows([checkpoint.part(f"memory.tables.1.order2.{number}") for number in range(2)])
    checkpoint = None
    assert open_files(folder) == 0


# Errors of the kernel, and systems that are not Linux.


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that gives a true EIO is /proc/self/mem")
def test_an_error_that_the_kernel_gives_is_reported():
    # Nothing is ever mapped in the first page of a process.
    unreadable = FileRows([FilePart(ShardFile("/proc/self/mem"), 0, (16, 64), torch.float32)])
    assert unreadable.read_resident(torch.tensor([3, 1])) is None
    with pytest.raises(OSError, match="Input/output error.*/proc/self/mem") as caught:
        unreadable.read(torch.tensor([3, 1]))
    assert caught.value.errno == errno.EIO


def test_a_system_without_positioned_reads_reads_the_same_from_many_threads(table, folder, monkeypatch):
    """Windows: the place in the file is moved and read from under a lock."""
    rows = stored(folder, cut(table, 3))
    monkeypatch.delattr(os, "preadv")
    real = os.lseek
    monkeypatch.setattr(os, "lseek", lambda *args: (real(*args), time.sleep(1e-4)))  # another thread's turn
    asked = [torch.randint(len(table), (50,), generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(rows.read, asked))
    assert all(map(same, found, (table[numbers] for numbers in asked)))
    assert rows.read_resident(asked[0]) is None, "nobody can say there what is in the page cache"


def test_a_system_without_mmaps_flags_and_advice_maps_and_reads_the_same(table, folder, monkeypatch):
    """Windows: a private mapping is asked for in other words, and the kernel takes no advice."""
    rows = stored(folder, cut(table, 3))
    for name in ("MAP_PRIVATE", "PROT_READ", "PROT_WRITE"):
        monkeypatch.delattr(mmap, name)
    monkeypatch.delattr(os, "posix_fadvise")
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", "nt")
        mappings = {file: file.map() for file in {part.file for part in rows.parts}}
    parts = rows.tensors(mappings)
    assert same(torch.cat(parts), table)
    parts[0].zero_()  # a page of this process alone
    asked = torch.tensor([5, 1, len(table) - 1])
    for part in rows.parts:
        part.file.expect(part.offset, 8)
    assert same(rows.read(asked), table[asked])


@pytest.mark.parametrize(("system", "flag"), [("Darwin", 0), ("Linux", 0x4000)])
def test_flags_that_a_system_knows_are_used_and_others_are_not(system, flag, monkeypatch):
    """The module is run once more: it asks the system when it is imported."""
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system))
    monkeypatch.delattr(mmap, "MAP_NORESERVE", raising=False)
    spec = importlib.util.spec_from_file_location("engram_transformers.rows_once_more", rows_storage_engram.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert (flag, 1 << 30) == (again.NO_RESERVE, again.OPEN & 1 << 30)


# What rows in files take up.


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
