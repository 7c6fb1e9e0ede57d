"""Fetches: the same rows at once, in the background and where they are needed, whatever becomes of the thread.

Proves that unique rows alone go to a device, on a stream of their own that is waited for; that layers are served in
order; that a thread that fails, dies or cannot be started costs an error or time, never a wrong row, a hang or a thread
that stays. Rows are compared as bytes; the device is tests/counting_device.

Run: pytest tests/unit/test_prefetch.py
"""

import os
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.rows_prefetch_engram import RowFetch, deliver, narrow, start_prefetch
from engram_transformers.rows_storage_engram import FEW_ROWS, FileRows, HostRows

from ..counting_device import counted, load
from ..faults import Child, absent, ctrl_c_heard, cut, disk, fetch_threads, mapped, random_table, same, soon, stored


CPU = torch.device("cpu")
TABLE = random_table(1000, 8)
MANY = torch.arange(FEW_ROWS + 44).flip(0)  # too many for "at once"


@pytest.fixture
def device(counting_device):
    return torch.device("counting")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> FileRows:
    return stored(tmp_path_factory.mktemp("rows"), cut(TABLE, 2))


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert soon(lambda: not fetch_threads()), "a thread is left"


class Watched(FileRows):
    """Rows that are never there at once, and what else their reads do in a thread.

    Args:
        rows ([`FileRows`]): where they are.
        act (callable): done before each read, in our own threads alone.
        asked (`list`, *optional*): gets `(what, thread)` at every read.
    """

    def __init__(self, rows: FileRows, act=lambda: None, asked: list | None = None, what=None):
        super().__init__(rows.parts)
        self.act, self.asked, self.what = act, [] if asked is None else asked, what

    def read_resident(self, rows):
        return None

    def read(self, rows):
        thread = threading.current_thread()
        self.asked.append((self.what, thread.name))
        if thread in fetch_threads():
            self.act()
        return super().read(rows)


class Gate:
    """Holds a thread until it is opened, 20 seconds at most."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.open.wait(20)


def result_of(fetch: RowFetch, seconds: float = 10.0):
    """Its result, or its error, which must come in time."""
    answers = []

    def ask():
        try:
            answers.append(fetch.result())
        except BaseException as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    assert answers, f"a wait of more than {seconds} seconds"
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def right(brought, wanted: torch.Tensor) -> bool:
    """Whether these are the table's rows."""
    places = brought.places.cpu()
    assert places.dtype == torch.int64 and places.shape == wanted.shape
    assert torch.equal(brought.rows[places], wanted)
    return same(brought.values.cpu()[places].flatten(0, -2), TABLE[wanted.flatten()])


def at_once(fetch: RowFetch) -> None:
    if fetch.read_at_once():
        deliver([fetch])
    assert fetch.there.is_set() == (len(fetch.rows) <= FEW_ROWS)


WAYS = {"at once": at_once, "ahead": lambda fetch: start_prefetch([fetch]), "where they are needed": lambda fetch: None}


@pytest.mark.parametrize("begin", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("place", ["cpu", "counting"])
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple) | st.sampled_from([(FEW_ROWS,), (3, 10, 20)]),
    highest=st.sampled_from([1, 40, 1000]),
)
def test_rows_are_the_same_whenever_and_wherever_they_are_fetched(begin, place, shape, highest, rows, request):
    device = request.getfixturevalue("device") if place == "counting" else CPU
    wanted = torch.randint(0, highest, shape)
    for source in (rows, mapped(rows), HostRows([TABLE]), Watched(rows)):
        for asked in (wanted, wanted.to(device), wanted.mT if len(shape) > 1 else wanted):
            fetch = RowFetch(source, asked, device)
            if begin is not at_once or not isinstance(source, Watched):
                begin(fetch)
            brought = fetch.result()
            assert right(brought, asked.cpu())
            assert brought.values.device.type == place
            assert fetch.result() is brought


@pytest.mark.parametrize(("unique", "itemsize"), [(1, 1), (256, 1), (257, 2), (1 << 15, 2), ((1 << 15) + 1, 4)])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_device_gets_unique_rows_and_one_small_number_for_each_read(unique, itemsize, ahead, device):
    table = torch.arange(80_000.0).view(-1, 2)
    wanted = (torch.randperm(unique) + 5000).repeat(3)
    fetch = RowFetch(HostRows(cut(table, 2)), wanted, device)
    with counted() as crossed:
        if ahead:
            start_prefetch([fetch])
        brought = fetch.result()
    assert (crossed.h2d, crossed.h2d_copies) == (unique * 8 + 3 * unique * itemsize, 1)
    assert crossed.d2h == 0
    assert torch.equal(brought.values[brought.places].cpu(), table[wanted])


@given(
    texts=st.integers(1, 4),
    length=st.integers(1, 60),
    heads=st.integers(1, 4),
    width=st.sampled_from([1, 4, 64]),
    highest=st.sampled_from([2, 300, 1000]),
)
def test_texts_that_repeat_each_other_never_cost_more_bytes_than_the_numbers_of_all_reads(
    texts, length, heads, width, highest, device
):
    table = torch.arange(1000.0).repeat(width, 1).mT.contiguous()
    wanted = torch.randint(0, highest, (1, length, heads)).expand(texts, length, heads)
    with counted() as crossed:
        brought = RowFetch(HostRows([table]), wanted, device).result()
    unique = wanted.unique().numel()
    assert crossed.h2d <= unique * width * 4 + wanted.numel() * narrow(wanted, unique).dtype.itemsize
    assert len(brought.values) == unique
    assert torch.equal(brought.values[brought.places].cpu(), table[wanted])


@given(count=st.integers(0, 1 << 40))
def test_places_are_as_narrow_as_they_can_be_and_no_narrower(count):
    places = torch.tensor([0, max(0, count - 1)])
    smaller = narrow(places, count)
    assert torch.equal(smaller.long(), places)
    narrower = [t for t in (torch.uint8, torch.int16, torch.int32) if t.itemsize < smaller.dtype.itemsize]
    assert all(count - 1 > torch.iinfo(dtype).max for dtype in narrower)


@pytest.mark.parametrize("begin", [WAYS["ahead"], WAYS["where they are needed"]], ids=["ahead", "inline"])
def test_copies_go_beside_what_the_device_computes_and_are_waited_for(begin, device, rows):
    fetch = RowFetch(Watched(rows), MANY, device)
    with counted() as crossed, load().late_copies():
        begin(fetch)
        if fetch.thread is not None:
            assert fetch.there.wait(10)
            # The control: without waiting, the rows have not come.
            assert fetch.brought.values.isnan().all()
        brought = fetch.result()
        used = brought.values[brought.places] * 1
    copies = [step for step in crossed.steps if step.what == "h2d"]
    use = next(step for step in reversed(crossed.steps) if step.what == "op")
    assert [(copy.non_blocking, copy.pinned) for copy in copies] == [(True, True)]
    assert all(copy.stream not in (0, use.stream) and crossed.comes_after(use, copy) for copy in copies)
    assert {s.stream for s in crossed.steps if s.what == "record_stream"} == {use.stream}, "memory is kept for the use"
    expected = TABLE[MANY] * 1
    assert torch.equal(used.cpu().nan_to_num(), expected.nan_to_num())
    assert right(brought, MANY)


@pytest.mark.parametrize("begin", WAYS.values(), ids=WAYS)
def test_without_pinned_memory_rows_are_right_and_it_is_said_once(begin, device, rows, caplog):
    fetches = [RowFetch(rows, torch.arange(number, number + 9), device) for number in (0, 700)]
    with load().pinning_fails(), counted() as crossed:
        for fetch in fetches:
            begin(fetch)
            fetch.result()
    assert right(fetches[0].result(), torch.arange(9)) and right(fetches[1].result(), torch.arange(700, 709))
    assert caplog.text.count("No pinned memory") == 1 and "ulimit -l" in caplog.text
    assert [step.pinned for step in crossed.steps if step.what == "h2d"] == [False] * 2
    caplog.clear()
    fetch = RowFetch(rows, MANY, device)  # there is some again
    assert right(fetch.result(), MANY) and not caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_rows_of_a_pass_go_in_one_copy_and_always_on_the_same_stream(dtype, device):
    table = torch.arange(4000.0).view(-1, 4).to(dtype)
    streams = set()
    for begin in range(3):
        wanted = [torch.arange(begin, begin + count).repeat(2) for count in (1, 3, 5)]
        fetches = [RowFetch(HostRows([table]), rows, device) for rows in wanted]
        with counted() as crossed:
            start_prefetch(fetches)
        copies = [step for step in crossed.steps if step.what == "h2d"]
        assert [(copy.bytes, copy.pinned) for copy in copies] == [(9 * table[0].nbytes + 18, True)]
        streams |= {copy.stream for copy in copies}
        for rows, fetch in zip(wanted, fetches, strict=True):
            brought = fetch.result()
            assert same(brought.values.cpu()[brought.places.cpu()], table[rows])
    assert len(streams) == 1


def test_layers_are_served_in_order_by_one_thread(rows):
    asked, gate = [], Gate()
    fetches = [RowFetch(Watched(rows, gate, asked, number), MANY, CPU) for number in range(5)]
    start_prefetch(fetches)
    assert gate.reached.wait(10) and len(fetch_threads()) == 1
    gate.open.set()
    assert all(right(result_of(fetch), MANY) for fetch in reversed(fetches))
    assert asked == [(number, "engram-fetch") for number in range(5)]


def test_few_rows_that_are_in_memory_take_no_thread(rows):
    fetches = [RowFetch(source, MANY[:FEW_ROWS], CPU) for source in (HostRows([TABLE]), rows) for _ in range(3)]
    rows.read(MANY)
    start_prefetch(fetches)
    assert [(fetch.there.is_set(), fetch.thread) for fetch in fetches] == [(True, None)] * 6
    with disk(absent):
        waiting = RowFetch(rows, MANY[:3], CPU)
        start_prefetch([waiting])
        assert waiting.thread is not None, "the control: they are not in memory"
        assert right(result_of(waiting), MANY[:3])


def test_rows_that_nobody_will_ask_for_are_not_read(rows):
    asked, gate = [], Gate()
    fetches = [RowFetch(Watched(rows, gate, asked, number), MANY, CPU) for number in range(4)]
    start_prefetch(fetches)
    assert gate.reached.wait(10)
    for fetch in (fetches[0], fetches[1], fetches[3]):
        fetch.drop()
    gate.open.set()
    assert right(result_of(fetches[2]), MANY)
    assert soon(lambda: not fetch_threads())
    assert [what for what, _ in asked] == [0, 2], "the first was under way"


def test_an_error_is_raised_to_whoever_waits_for_those_rows_and_to_nobody_else(rows):
    class Broken(Exception):
        pass

    def fail():
        raise Broken("the disk is on fire")

    fetches = [RowFetch(Watched(rows, act), MANY, CPU) for act in (fail, lambda: None, fail)]
    start_prefetch(fetches)
    for number in (2, 1, 0, 2):
        if number == 1:
            assert right(result_of(fetches[1]), MANY)
        else:
            with pytest.raises(Broken, match="on fire"):
                result_of(fetches[number])


dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@dies
@pytest.mark.parametrize(
    "death", [sys.exit, lambda: (_ for _ in ()).throw(KeyboardInterrupt)], ids=["exit", "interrupt"]
)
def test_rows_of_a_thread_that_died_are_read_again(death, rows, caplog):
    asked = []
    fetches = [RowFetch(Watched(rows, death, asked, number), MANY, CPU) for number in range(4)]
    start_prefetch(fetches)
    assert soon(lambda: not fetch_threads())
    began = time.monotonic()
    assert all(right(result_of(fetch), MANY) for fetch in fetches)
    assert time.monotonic() - began < 2, "a dead thread is not waited for at every layer"
    assert [what for what, _ in asked] == [0, 0, 1, 2, 3]
    assert "is gone: they are read again" in caplog.text


@dies
def test_rows_are_right_where_a_thread_dies_while_it_is_waited_for(rows):
    gate = Gate()

    def die():
        gate()
        sys.exit()

    fetch = RowFetch(Watched(rows, die), MANY, CPU)
    start_prefetch([fetch])
    assert gate.reached.wait(10)
    threading.Timer(0.1, gate.open.set).start()
    assert right(result_of(fetch), MANY)


def test_rows_are_right_where_no_thread_can_be_started(rows, monkeypatch):
    asked = []

    def no_more(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    fetches = [RowFetch(Watched(rows, asked=asked, what=number), MANY, CPU) for number in range(3)]
    start_prefetch(fetches)
    assert asked == [], "nothing is read before it is needed"
    assert all(right(fetch.result(), MANY) for fetch in fetches)
    assert asked == [(number, "MainThread") for number in range(3)]


def test_ctrl_c_ends_a_wait_and_not_the_fetch(rows):
    gate = Gate()
    fetch = RowFetch(Watched(rows, gate), MANY, CPU)
    start_prefetch([fetch])
    assert gate.reached.wait(10)
    began = time.monotonic()
    with ctrl_c_heard(), pytest.raises(KeyboardInterrupt):
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        fetch.result()
    assert time.monotonic() - began < 5
    gate.open.set()
    assert right(result_of(fetch), MANY)


def test_ctrl_c_in_a_read_without_a_thread_is_an_interrupt_and_the_next_read_is_right(rows):
    def interrupted(real, *asked):
        signal.raise_signal(signal.SIGINT)
        return real(*asked)

    fetch = RowFetch(rows, MANY, CPU)
    with ctrl_c_heard(), disk(interrupted), pytest.raises(KeyboardInterrupt):
        fetch.result()
    assert right(result_of(RowFetch(rows, MANY, CPU)), MANY)


def test_a_fork_in_the_middle_of_a_fetch_reads_by_itself(rows):
    gate = Gate()
    fetches = [RowFetch(Watched(rows, gate), MANY, CPU) for _ in range(2)]
    start_prefetch(fetches)
    assert gate.reached.wait(10)

    def in_the_child():
        assert not fetch_threads()
        start_prefetch([later := RowFetch(Watched(rows), MANY, CPU)])
        return all(right(fetch.result(), MANY) for fetch in [*fetches, later])

    assert Child(in_the_child).result()
    gate.open.set()
    assert all(right(result_of(fetch), MANY) for fetch in fetches)


def test_a_fetch_that_nobody_holds_takes_its_source_with_it(rows):
    gate = Gate()
    fetches = [RowFetch(Watched(rows, act), MANY, CPU) for act in (lambda: None, gate, gate)]
    alive = [weakref.ref(held) for fetch in fetches for held in (fetch, fetch.store)]
    start_prefetch(fetches)
    assert gate.reached.wait(10)
    for fetch in fetches:
        fetch.drop()
    del fetches, fetch
    assert [held() is None for held in alive[:4]] == [True, True, False, False], "the thread holds what it reads"
    gate.open.set()
    assert soon(lambda: not fetch_threads())
    assert soon(lambda: all(held() is None for held in alive))
