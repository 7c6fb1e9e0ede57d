"""Rows outside of a model: what comes from files and from host memory is the table's, byte for byte, or an error.

Proves that in any order, size and state of the page cache; that each row is read once, neighbours together, and the
kernel is told of the others before the first is waited for; that a file that is cut, written into, damaged or
unreadable is noticed. What rows take up is in tests/unit/test_rows_room.py.

Run: pytest tests/unit/test_rows.py
"""

import copy
import errno
import importlib.util
import mmap
import os
import pickle
import re
import signal
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
from engram_transformers.files_safetensors_engram import write_index, write_shards
from engram_transformers.rows_storage_engram import (
    FEW_ROWS,
    NEAR,
    NO_WAIT,
    CheckpointTables,
    FilePart,
    FileRows,
    HostRows,
    ShardFile,
)

from ..conftest import examples
from ..faults import Child, absent, cut, disk, failing, mapped, open_files, random_table, same, short, soon, stored


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROW = 64 * 4  # bytes of a row of 64 float32


def forget(rows: FileRows) -> None:
    """Takes a file's pages out of the page cache, as far as the file system lets go of them."""
    for part in rows.parts:
        os.fsync(part.file.descriptor)
        os.posix_fadvise(part.file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


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


@st.composite
def reads(draw):
    """A table, its number of parts, and rows to read: none, few, many; with repeats; clustered or spread."""
    parts = draw(st.integers(1, 4))
    height = draw(st.integers(parts, 400))
    table = random_table(height, draw(st.sampled_from([1, 3, 16, 300])), draw(st.sampled_from(DTYPES)), seed=height)
    few = st.lists(st.integers(0, height - 1), max_size=40)
    generator = torch.Generator().manual_seed(height)
    many = st.sampled_from([FEW_ROWS, FEW_ROWS + 1, 900]).map(
        lambda count: torch.randint(0, height, (count,), generator=generator).tolist()
    )
    return table, parts, torch.tensor(draw(few | many), dtype=torch.int64)


def patchy(real, descriptor, buffers, offset, flags=0):
    """Half of the rows are in the page cache; for the others the system says in two ways that it will not look."""
    if flags and offset // 64 % 2:
        raise OSError(errno.EOPNOTSUPP if offset // 128 % 2 else errno.EAGAIN, "not now")
    return real(descriptor, buffers, offset, flags)


@pytest.mark.parametrize("state", ["warm", "cold", absent, short, patchy])
@given(case=reads())
@examples(20)
def test_rows_are_the_tables_from_everywhere(state, case, tmp_path):
    table, parts, wanted = case
    folder, pieces, expected = Path(tempfile.mkdtemp(dir=tmp_path)), cut(table, parts), table[wanted]
    files = stored(folder, pieces, max_bytes=2 * pieces[-1].nbytes)
    if state == "cold":
        forget(files)
    with disk(state if callable(state) else lambda real, *asked: real(*asked)):
        at_once = files.read_resident(wanted)
        assert at_once is None or same(at_once, expected)
        assert same(files.read(wanted), expected)
    assert state != "warm" or at_once is not None or len(wanted) > FEW_ROWS
    for host in (HostRows(pieces), HostRows([piece.clone() for piece in pieces]), mapped(files)):
        assert same(host.read(wanted), expected)
        assert same(host.read_resident(wanted), expected)
    assert (files.width, files.dtype, files.nbytes) == (table.shape[1], table.dtype, table.nbytes)
    assert (host.width, host.dtype, host.nbytes) == (table.shape[1], table.dtype, table.nbytes)


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


def test_an_interrupt_in_the_middle_of_a_read_leaves_nothing_behind(rows, table, folder):
    wanted, before = torch.tensor([0, 500, 999]), open_files(folder)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:

        def interrupted(real, descriptor, buffers, offset, flags=0):
            signal.raise_signal(signal.SIGALRM)
            return real(descriptor, buffers, offset, flags)

        with pytest.raises(KeyboardInterrupt), disk(interrupted):
            rows.read(wanted)
        # A handler that does not raise: the read goes on (PEP 475).
        seen = []
        signal.signal(signal.SIGALRM, lambda *arguments: seen.append(arguments))
        with disk(interrupted):
            assert same(rows.read(wanted), table[wanted])
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert same(rows.read(wanted), table[wanted])
    assert open_files(folder) == before


@pytest.mark.parametrize("number", [-1, -1000, 1000, 10**12])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_row_that_the_table_does_not_have_is_an_error(number, parts, table, folder):
    rows = stored(folder, cut(table, parts))
    wanted = torch.tensor([5, number])
    host = HostRows(cut(table, parts))
    for read in (rows.read, rows.read_resident, host.read, host.read_resident):
        assert same(read(wanted[:1]), table[5:6])
        with pytest.raises(IndexError):
            read(wanted)


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


# Files that change or cannot be read.

CHANGES = {
    "cut": lambda path: os.truncate(path, 4096),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "written into": lambda path: path.open("r+b").write(b"new"),
    "written anew": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_is_noticed_before_a_row_is_read(change, rows, table, shard):
    wanted, host = torch.tensor([999, 0, 500]), mapped(rows)
    copied, pickled = copy.deepcopy(rows), pickle.dumps(rows)
    assert all(same(held.read(wanted), table[wanted]) for held in (rows, host, copied, pickle.loads(pickled)))
    change(shard)

    def ask_all():  # in a process of its own: a map of a file that was cut kills it
        for ask in (rows.read, rows.read_resident, copied.read, host.read, host.read_resident):
            with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
                ask(wanted)
        for ask in (rows.tensors, host.tensors, rows.parts[0].file.map, lambda: pickle.loads(pickled).read(wanted)):
            with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
                ask()
        return "all refused"

    assert Child(ask_all).result() == "all refused"


def test_a_file_that_is_written_into_during_a_read_is_noticed(rows, table, shard):
    def late(real, descriptor, buffers, offset, flags=0):
        with open(shard, "r+b") as file:
            file.seek(offset)
            file.write(bytes(64))
        return real(descriptor, buffers, offset, flags)

    wanted = torch.tensor([7, 800])
    for number, read in enumerate((rows.read, rows.read_resident)):
        fresh = FileRows([FilePart(ShardFile(shard), part.offset, part.shape, part.dtype) for part in rows.parts])
        with disk(late), pytest.raises(EngramFormatError, match="was written into"):
            getattr(fresh, read.__name__)(wanted)
        os.utime(shard, ns=(0, number + 1))


def test_a_file_that_ends_during_a_read_is_noticed(rows, shard):
    def late(real, descriptor, buffers, offset, flags=0):
        os.truncate(shard, 4096)
        return absent(real, descriptor, buffers, offset, flags)

    with disk(late), pytest.raises(EngramFormatError, match="4,096 bytes"):
        rows.read(torch.tensor([7, 800]))


def test_a_file_that_was_replaced_or_deleted_is_read_on_and_not_opened_again(rows, table, shard, folder):
    wanted, host, pickled = torch.tensor([999, 0, 500]), mapped(rows), pickle.dumps(rows)
    (folder / "other").write_bytes(bytes(shard.stat().st_size))
    os.replace(folder / "other", shard)
    assert same(rows.read(wanted), table[wanted]) and same(host.read(wanted), table[wanted])
    with pytest.raises(EngramFormatError, match="changed"):
        pickle.loads(pickled).read(wanted)
    shard.unlink()
    assert same(rows.read(wanted), table[wanted]) and same(host.read(wanted), table[wanted])
    assert same(copy.deepcopy(rows).read(wanted), table[wanted])
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled).read(wanted)


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ENODATA", "ETIMEDOUT"])
def test_a_disk_that_fails_is_an_error_that_names_file_and_place(name, rows, table, shard, folder):
    wanted, before = torch.tensor([999, 3]), open_files(folder)
    with disk(failing(getattr(errno, name))):
        assert rows.read_resident(wanted) is None, "the read that waits reports"
        with pytest.raises(OSError, match="cannot be read") as caught:
            rows.read(wanted)
    assert (caught.value.errno, caught.value.filename) == (getattr(errno, name), str(shard))
    assert f"{rows.parts[0].offset + 3 * ROW:,}" in str(caught.value)
    assert same(rows.read(wanted), table[wanted])
    assert open_files(folder) == before


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
