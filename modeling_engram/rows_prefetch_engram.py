"""Prefetch: copies rows from host memory or disk to the device before the layers that need them run.

What it chooses: one short-lived thread for each forward pass, not a pool: it ends when its rows are read, so a fork, a
dropped model or an interrupt leaves nothing behind. Few rows that are in memory are read at once, without a thread.
Promises: only unique rows are copied, and one small number for each read; rows that are ready together go to a device
in one copy, on that device's one stream for rows; an error is raised where the rows are needed; rows of a thread that
died are read again there; a wait never hangs. Never changes a table.
Source: Engram (arXiv 2601.07372), section 2.5 (addresses are known before the first layer runs, so reads can be hidden
behind earlier layers).
"""

import functools
import threading
from itertools import islice

import torch
from transformers.utils import logging

from .rows_storage_engram import FEW_ROWS, RowStore
from .rows_table_engram import BroughtRows


logger = logging.get_logger(__name__)

# Row indices that take more than this share of the rows' bytes are compressed in a second step.
LEAST_SHARE = 0.03

# A thread that dies silently is noticed after this many seconds.
WAIT_SECONDS = 0.5


class RowFetch:
    """A prefetch of the rows of one order for one pass.

    Args:
        store ([`RowStore`]): where the rows are.
        rows (`torch.LongTensor` of any shape): which rows; on a device, this waits for it.
        device (`torch.device`): where they are needed.
    """

    def __init__(self, store: RowStore, rows: torch.Tensor, device: torch.device):
        self.store, self.device, self.shape = store, device, rows.shape
        self.rows = rows.to("cpu").flatten()  # (reads,)
        self.there = threading.Event()
        self.thread: threading.Thread | None = None
        self.dropped = False
        self.error: BaseException | None = None
        self.brought: BroughtRows | None = None
        self.copied = None
        self.numbers: list[torch.Tensor] = []

    def read_at_once(self) -> bool:
        """Reads a few rows if that needs no disk; returns whether they were read and can be sent by `deliver`."""
        if len(self.rows) > FEW_ROWS:
            return False
        unique, places = self.unique_rows()
        values = self.store.read_resident(unique)
        if values is None:
            return False
        self.brought = BroughtRows(values, places.view(self.shape), unique)
        return True

    def run(self) -> None:
        """Reads the rows; an error is stored for the caller of `result`."""
        try:
            unique, places = self.unique_rows()
            self.brought = BroughtRows(self.store.read(unique), places.view(self.shape), unique)
            deliver([self])
        except Exception as error:  # `result` detects threads that ended otherwise
            self.error = error
            self.there.set()

    def unique_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows without repeats, and each read's index among them."""
        if self.device.type == "cpu" and (len(self.rows) <= FEW_ROWS or self.store.kind == "cpu"):
            return self.rows, torch.arange(len(self.rows), device="cpu")  # reading repeats is cheaper than finding them
        return torch.unique(self.rows, return_inverse=True)

    def result(self) -> BroughtRows:
        """Waits for the rows and returns them, ordered with the computation on their device.

        Raises:
            [`EngramFormatError`] or `OSError`: if they could not be read.
        """
        if self.thread is None and not self.there.is_set():
            self.run()
        while not self.there.is_set():
            alive = self.thread.is_alive()
            if not self.there.wait(WAIT_SECONDS if alive else 0) and not alive:
                logger.warning("The thread that read rows ahead is gone: they are read again, without it.")
                self.run()
        if self.error is not None:
            raise self.error
        if self.copied is not None:
            self.copied.wait([self.brought.values, *self.numbers])
            self.copied = None
        if self.numbers:
            places, *texts = (numbers.long() for numbers in self.numbers)
            self.brought.places = places[texts[0]] if texts else places
            self.numbers = []
        return self.brought

    def drop(self) -> None:
        """Cancels the prefetch."""
        self.dropped = True


def start_prefetch(fetches: list[RowFetch]) -> None:
    """Starts prefetches in their order, in the background unless their rows are ready."""
    read = [fetch.read_at_once() for fetch in fetches]
    deliver([fetch for fetch, there in zip(fetches, read, strict=True) if there])
    waiting = [fetch for fetch, there in zip(fetches, read, strict=True) if not there]
    if not waiting:
        return
    thread = threading.Thread(target=_run_all, args=(waiting,), name="engram-fetch", daemon=True)
    for fetch in waiting:
        fetch.thread = thread
    try:
        thread.start()
    except RuntimeError:  # no more threads: rows are read where they are needed
        for fetch in waiting:
            fetch.thread = None


def _run_all(fetches: list[RowFetch]) -> None:
    """Body of the thread."""
    while fetches:
        fetch = fetches.pop(0)  # the thread must not keep what its caller has dropped
        if not fetch.dropped:
            fetch.run()


def _numbers_of(places: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Returns compact indices that tell a device which of the rows `(unique, width)` each read is.

    They are the indices in `places`; or, where positions repeat, the distinct lists of indices along the last dimension
    (heads) and each position's index among the lists.
    """
    numbers = narrow(places, len(values))
    if numbers.ndim < 2 or numbers.nbytes <= LEAST_SHARE * values.nbytes:
        return [numbers]
    lists, texts = torch.unique(places.flatten(0, -2), dim=0, return_inverse=True)  # (different, heads), (positions,)
    two_steps = [narrow(lists, len(values)), narrow(texts.view(places.shape[:-1]), len(lists))]
    return min([numbers], two_steps, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))


def narrow(places: torch.Tensor, count: int) -> torch.Tensor:
    """Casts numbers below `count` to the smallest integer type that holds them."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if count - 1 <= torch.iinfo(dtype).max:
            return places.to(dtype)
    return places


def deliver(fetches: list[RowFetch]) -> None:
    """Sends rows that were read to their devices, all rows for one device in one copy."""
    for device in dict.fromkeys(fetch.device for fetch in fetches):
        group = [fetch for fetch in fetches if fetch.device == device]
        if device.type != "cpu":
            held = [[one.brought.values, *_numbers_of(one.brought.places, one.brought.values)] for one in group]
            sent, copied = send([tensor for tensors in held for tensor in tensors], device)
            sent = iter(sent)
            for fetch, tensors in zip(group, held, strict=True):
                fetch.brought.values, *fetch.numbers = islice(sent, len(tensors))
                fetch.brought.places, fetch.copied = fetch.numbers[0], copied
        for fetch in group:
            fetch.there.set()


class SideCopy:
    """A copy of packed bytes from the host on a device's stream for rows, and the event after it."""

    def __init__(self, packed: torch.Tensor, device: torch.device):
        self.streams, self.device = getattr(torch, device.type), device
        self.event, stream = self.streams.Event(), _side_stream(device)
        with self.streams.stream(stream):
            self.sent = packed.to(device, non_blocking=True)
            self.event.record(stream)

    def wait(self, sent: list[torch.Tensor]) -> None:
        """Makes later computation wait for the copy."""
        current = self.streams.current_stream(self.device)
        current.wait_event(self.event)
        for tensor in sent:
            tensor.record_stream(current)  # its memory is not reused before that


@functools.cache
def _side_stream(device: torch.device):
    """Returns the one stream on which rows go to a device: a caching allocator reuses memory within a stream."""
    return getattr(torch, device.type).Stream(device=device)


def send(tensors: list[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], SideCopy | None]:
    """Sends host tensors to a device, on a side stream if it has any: the copies, and what to wait for."""
    streams = getattr(torch, device.type, None)
    if not all(hasattr(streams, name) for name in ("Stream", "Event", "stream", "current_stream", "current_device")):
        return [tensor.to(device) for tensor in tensors], None
    if device.index is None:
        device = torch.device(device.type, streams.current_device())
    # The widest types first, so that each tensor is aligned without padding.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].itemsize)
    packed, slots, begin = _pinned_bytes(sum(tensor.nbytes for tensor in tensors)), {}, 0
    for place in order:
        tensor = tensors[place]
        slots[place] = slice(begin, begin + tensor.nbytes)
        packed[slots[place]].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        begin += tensor.nbytes
    copy = SideCopy(packed, device)
    there = [copy.sent[slots[place]].view(tensor.dtype) for place, tensor in enumerate(tensors)]  # flat
    return [sent.view(tensor.shape) for sent, tensor in zip(there, tensors, strict=True)], copy


def _pinned_bytes(size: int) -> torch.Tensor:
    """Allocates `(size,)` bytes of pinned memory; pageable memory if there is none."""
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        logger.debug(error)
        logger.warning_once(
            "No pinned memory for rows on their way to the device: they go through pageable memory, which is slower. "
            "Raise the limit of locked memory (ulimit -l)."
        )
        return torch.empty(size, dtype=torch.uint8, device="cpu")
