"""The contract of a row store, put to each of them: a row that is read is the table's, byte for byte, or an error.

| store | where its rows are |
|---|---|
| memory | host memory |
| mapping | files that are mapped |
| files | files, read by position |
| overlay | files, nothing was changed |
| changed | every second row in memory, over files that hold other bytes there; the last of several parts is as it was |

Proves for each of them: reads in any order, number and state of the page cache; writes through the parts of a table;
copies and pickles; rows that do not exist; files that are changed, replaced, deleted or unreadable, before a read and
during it; descriptors. How rows in files are read, and what they take up, is in tests/unit/test_rows.py.

Run: pytest tests/unit/test_row_stores.py
"""

import copy
import errno
import os
import pickle
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers import EngramFormatError
from engram_transformers.rows_overlay_engram import RowOverlay
from engram_transformers.rows_storage_engram import FEW_ROWS, FileRows, HostRows, RowStore
from engram_transformers.rows_table_engram import OrderRows

from ..conftest import examples
from ..faults import Child, absent, cut, disk, failing, forget, mapped, open_files, random_table, same, short, stored


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]  # uint8: records of quantised rows
WANTED = torch.tensor([999, 0, 500, 3])  # of 1000 rows in 3 parts


def in_files(folder: Path, parts: list[torch.Tensor]) -> FileRows:
    """Two parts in a file."""
    return stored(folder, parts, max_bytes=2 * parts[-1].nbytes)


def changed(folder: Path, parts: list[torch.Tensor]) -> RowOverlay:
    """Rows of which a half lies over files in memory."""
    spoiled, several = [part.clone() for part in parts], max(1, len(parts) - 1)
    for part in spoiled[:several]:
        part.view(torch.uint8)[::2] ^= 255
    overlay = RowOverlay(in_files(folder, spoiled))
    for number, part in enumerate(parts[:several]):
        rows = torch.arange(0, len(part), 2)
        overlay.part(number).write(rows, part[rows])
    return overlay


STORES = {
    "memory": lambda folder, parts: HostRows([part.clone() for part in parts]),
    "mapping": lambda folder, parts: mapped(in_files(folder, parts)),
    "files": in_files,
    "overlay": lambda folder, parts: RowOverlay(in_files(folder, parts)),
    "changed": changed,
}
IN_FILES = ("mapping", "files", "overlay", "changed")
READ = ("files", "overlay", "changed")  # by position, and not through a mapping
every_store = pytest.mark.parametrize("kind", STORES)


def file_rows(store: RowStore) -> FileRows:
    """What reads a store's files."""
    return store if isinstance(store, FileRows) else store.stored


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def table() -> torch.Tensor:
    return random_table(1000, 64)


@pytest.fixture
def make(folder, table):
    """Factory of stores that hold the table, each in a folder of its own."""

    def make_store(kind: str) -> RowStore:
        (folder / kind).mkdir()
        return STORES[kind](folder / kind, cut(table, 3))

    return make_store


def shard(store: RowStore) -> Path:
    return store.files[0].path


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


def warm(real, descriptor, buffers, offset, flags=0):
    """The system as it is."""
    return real(descriptor, buffers, offset, flags)


def patchy(real, descriptor, buffers, offset, flags=0):
    """Half of the rows are in the page cache; for the others the system says in two ways that it will not look."""
    if flags and offset // 64 % 2:
        raise OSError(errno.EOPNOTSUPP if offset // 128 % 2 else errno.EAGAIN, "not now")
    return real(descriptor, buffers, offset, flags)


@every_store
@pytest.mark.parametrize("parts", [1, 3])
def test_a_single_value_keeps_the_bits_of_every_nan(parts, kind, folder):
    table = torch.arange(0x7C01, 0x7C01 + 12, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]  # (12, 1)
    store = STORES[kind](folder, cut(table, parts))
    for row in range(12):
        for read in (store.read, store.read_resident):
            assert same(read(torch.tensor([row])), table[row : row + 1])


@pytest.mark.parametrize("state", [warm, "cold", absent, short, patchy])
@given(case=reads())
@examples(12)
def test_rows_are_the_tables_in_any_order_number_and_state_of_the_page_cache(state, case, tmp_path):
    table, parts, wanted = case
    for kind, make in STORES.items():
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        store = make(folder, cut(table, parts))
        if state == "cold" and kind in READ:
            forget(file_rows(store))
        with disk(state if callable(state) else warm):
            at_once = store.read_resident(wanted)
            assert at_once is None or same(at_once, table[wanted]), kind
            assert same(store.read(wanted), table[wanted]), kind
            assert same(torch.cat(store.tensors()), table), kind
        there = kind not in READ or (state is warm and len(wanted) <= FEW_ROWS)
        assert at_once is not None or not there, kind
        assert (store.width, store.dtype, store.nbytes) == (table.shape[1], table.dtype, table.nbytes)
        assert store.heights == list(map(len, cut(table, parts)))
        assert len(set(store.files)) == ((parts + 1) // 2 if kind in IN_FILES else 0), kind


@pytest.mark.parametrize("number", [-1, -1000, 1000, 10**12])
@every_store
def test_a_row_that_the_table_does_not_have_is_an_error(kind, number, make, table):
    store, wanted = make(kind), torch.tensor([5, number])
    for read in (store.read, store.read_resident):
        assert same(read(wanted[:1]), table[5:6])
        with pytest.raises(IndexError):
            read(wanted)
    if kind != "files":
        with pytest.raises(IndexError):
            store.part(2).write(torch.tensor([334]), table[:1])
        assert same(store.read(WANTED), table[WANTED])


# Writes.


@st.composite
def histories(draw):
    """Heights of parts, and what happens to rows: writes and reads in turn."""
    height = draw(st.integers(1, 12))
    heights = [height] * draw(st.integers(0, 2)) + [height + draw(st.integers(0, 5))]
    rows = st.lists(st.integers(0, sum(heights) - 1), max_size=30)
    return heights, draw(st.lists(st.tuples(rows, rows), max_size=6))


def order_on(kind: str, folder: Path, parts: list[torch.Tensor]) -> OrderRows:
    """The rows of an order among a model's parameters ("resident"), or in a store."""
    order = OrderRows([len(part) for part in parts], parts[0].shape[1], parts[0].dtype, hold=kind == "resident")
    if kind == "resident":
        for own, part in zip(order.parts, parts, strict=True):
            own.detach().copy_(part)
    else:
        order.place(STORES[kind](folder, parts))
    return order


@pytest.mark.parametrize("kind", ["resident", "memory", "mapping", "overlay", "changed"])
@given(history=histories(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@examples(15)
def test_rows_are_read_as_they_were_last_written_and_the_file_is_as_it_was(kind, history, dtype, tmp_path):
    heights, steps = history
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    expected = torch.randn(sum(heights), 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = order_on(kind, folder, list(expected.clone().split(heights)))
    files = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    firsts = [sum(heights[:number]) for number in range(len(heights))]
    for number, (written, read) in enumerate(steps):
        for part, first, height in zip(order.parts, firsts, heights, strict=True):
            assert part.table_shape == (height, 3)
            own = torch.tensor(sorted({row - first for row in written if first <= row < first + height}), dtype=int)
            values = torch.full((len(own), 3), number + 0.5) + torch.arange(len(own))[:, None]  # float32
            part.expect(own)
            kept, before = part.read(own), expected[own + first]
            part.write(own, values)
            expected[own + first] = values.to(dtype)
            assert torch.equal(part.read(torch.arange(height)), expected[first : first + height])
            assert torch.equal(kept, before), "what was read is a copy"
        asked = torch.tensor(read, dtype=torch.int64)
        if kind == "resident":
            assert torch.equal(order(asked), expected[asked])
            continue
        assert torch.equal(order.store.read(asked), expected[asked])
        resident = order.store.read_resident(asked)
        assert torch.equal(resident, expected[asked])
        if kind in READ:
            order.store.see(asked.unique(), expected[asked.unique()])  # as a pass does; what is written later counts
            with disk(absent):
                unread = order.store.stored.read_resident(asked) is None
                assert (order.store.read_resident(asked) is None) == unread, "what is not there stays where it was"
    assert torch.equal(torch.cat([part.detach() for part in order.tensors()]), expected)
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == files
    if kind == "overlay":
        assert order.store.changed == len({row for written, _ in steps for row in written})


def test_rows_in_files_are_not_written_to(make):
    with pytest.raises(TypeError, match="RowOverlay"):
        make("files").part(0)


COPIED = {"copy": copy.deepcopy, "pickle": lambda store: pickle.loads(pickle.dumps(store))}


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@every_store
def test_a_copy_has_the_rows_and_goes_its_own_way(copied, kind, make, table):
    store = make(kind)
    twin = copied(store)
    assert same(twin.read(WANTED), table[WANTED]) and same(torch.cat(twin.tensors()), table)
    if kind != "files":
        assert twin.part(1) is not store.part(1)
        for row in (168, 167):  # one that was changed before, and one that was not
            twin.part(1).write(torch.tensor([row]), torch.zeros(1, 64))
            assert same(store.read(torch.tensor([500, 501])), table[500:502])
        assert not twin.read(torch.tensor([500, 501])).any()
        store.part(1).write(torch.tensor([169]), torch.ones(1, 64))
        assert same(twin.read(torch.tensor([502, 3])), table[[502, 3]])
    assert same(store.read(WANTED), table[WANTED])


# Files that change or cannot be read.

CHANGES = {
    "cut": lambda path: os.truncate(path, 4096),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "written into": lambda path: path.open("r+b").write(b"new"),
    "written anew": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", IN_FILES)
def test_a_file_that_changed_is_noticed_before_a_row_is_read(kind, change, make, table):
    store = make(kind)
    copied, pickled = copy.deepcopy(store), pickle.dumps(store)
    assert all(same(held.read(WANTED), table[WANTED]) for held in (store, copied, pickle.loads(pickled)))
    change(shard(store))

    def ask_all():  # in a process of its own: a mapping of a file that was cut kills it
        asks = [lambda: store.read(WANTED), lambda: store.read_resident(WANTED), store.tensors, store.files[0].map]
        if kind == "mapping":
            assert same(copied.read(WANTED), table[WANTED]), "a copy in memory does not need the file"
            assert same(pickle.loads(pickled).read(WANTED), table[WANTED])
        else:
            asks += [lambda: copied.read(WANTED), lambda: pickle.loads(pickled)]
        if kind in ("overlay", "changed"):
            asks += [lambda: store.part(1).read(torch.tensor([7]))]
        for ask in asks:
            with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
                ask()
        return "all refused"

    assert Child(ask_all).result() == "all refused"


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("method", ["read", "read_resident"])
def test_a_file_that_is_written_into_during_a_read_is_noticed(method, kind, make):
    store = make(kind)

    def late(real, descriptor, buffers, offset, flags=0):
        with open(shard(store), "r+b") as file:
            file.seek(offset)
            file.write(bytes(64))
        return real(descriptor, buffers, offset, flags)

    with disk(late), pytest.raises(EngramFormatError, match="was written into"):
        getattr(store, method)(WANTED)


@pytest.mark.parametrize("kind", READ)
def test_a_file_that_ends_during_a_read_is_noticed(kind, make):
    store = make(kind)

    def late(real, descriptor, buffers, offset, flags=0):
        os.truncate(shard(store), 4096)
        return absent(real, descriptor, buffers, offset, flags)

    with disk(late), pytest.raises(EngramFormatError, match="4,096 bytes"):
        store.read(WANTED)


@pytest.mark.parametrize("kind", IN_FILES)
def test_a_file_that_was_replaced_or_deleted_is_read_on_and_not_opened_again(kind, make, table, folder):
    store = make(kind)
    pickled = pickle.dumps(store)
    (folder / "other").write_bytes(bytes(shard(store).stat().st_size))
    os.replace(folder / "other", shard(store))
    assert same(store.read(WANTED), table[WANTED])
    if kind != "mapping":
        with pytest.raises(EngramFormatError, match="changed"):
            pickle.loads(pickled)
    shard(store).unlink()
    assert same(store.read(WANTED), table[WANTED]) and same(copy.deepcopy(store).read(WANTED), table[WANTED])
    if kind != "mapping":
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickled)


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
@pytest.mark.parametrize("kind", READ)
def test_a_disk_that_fails_is_an_error_that_names_file_and_place(kind, name, make, table, folder):
    store = make(kind)
    before, part = open_files(folder), file_rows(store).parts[0]
    with disk(failing(getattr(errno, name))):
        assert store.read_resident(WANTED) is None, "the read that waits reports"
        with pytest.raises(OSError, match="cannot be read") as caught:
            store.read(torch.tensor([999, 3]))
    assert (caught.value.errno, caught.value.filename) == (getattr(errno, name), str(shard(store)))
    assert f"byte {part.offset + 3 * 256:,} " in str(caught.value)
    assert same(store.read(WANTED), table[WANTED])
    assert open_files(folder) == before


@pytest.mark.parametrize("kind", READ)
def test_an_interrupt_in_the_middle_of_a_read_leaves_nothing_behind(kind, make, table, folder):
    store = make(kind)
    before, handler = open_files(folder), signal.signal(signal.SIGALRM, signal.default_int_handler)

    def interrupted(real, descriptor, buffers, offset, flags=0):
        signal.raise_signal(signal.SIGALRM)
        return real(descriptor, buffers, offset, flags)

    try:
        with pytest.raises(KeyboardInterrupt), disk(interrupted):
            store.read(WANTED)
        # A handler that does not raise: the read goes on (PEP 475).
        seen = []
        signal.signal(signal.SIGALRM, lambda *arguments: seen.append(arguments))
        with disk(interrupted):
            assert same(store.read(WANTED), table[WANTED])
        assert seen
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert same(store.read(WANTED), table[WANTED])
    assert open_files(folder) == before


@pytest.mark.parametrize("kind", IN_FILES)
def test_descriptors_are_shared_by_copies_opened_anew_by_pickles_and_closed_with_the_last(kind, make, table, folder):
    assert open_files(folder) == 0, "files are opened when they are needed"
    store = make(kind)
    held = open_files(folder)
    assert held == (6 if kind == "mapping" else 2)  # a mapping, its descriptor, and the one it was made from, for each
    twin = copy.deepcopy(store)
    assert open_files(folder) == held
    again = pickle.loads(pickle.dumps(twin))
    assert open_files(folder) == (held if kind == "mapping" else 4)  # a mapping is copied into memory
    del store
    assert same(twin.read(WANTED), table[WANTED]) and same(again.read(WANTED), table[WANTED])
    del twin
    assert open_files(folder) == (0 if kind == "mapping" else 2)
    assert same(again.read(WANTED), table[WANTED])
    del again
    assert open_files(folder) == 0


def test_a_part_of_a_mapped_file_that_was_cut_is_neither_read_nor_written(make):
    """Between a pass and its optimizer step; a mapping of a file that was cut kills the process."""
    store = make("mapping")
    part, rows = store.part(0), torch.tensor([1, 3])
    part.write(rows, part.read(rows))  # control
    os.truncate(shard(store), 100)
    with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
        part.read(rows)
    with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
        part.write(rows, torch.zeros(2, store.width))
