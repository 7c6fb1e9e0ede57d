"""Fetches: rows on their way from host memory or disk to the device that asked for them.

What it chooses: one short-lived thread for each forward pass, not a pool: it ends when its rows are there, so that a
fork, a dropped model or an interrupt leaves nothing behind. Few rows that are in memory are read at once, without one.
Promises: unique rows travel, and one small number for each read; a fetch that fails raises where its rows are needed,
and one whose thread died is done again there; a wait never hangs. Never changes a table.
Source: Engram (arXiv 2601.07372), section 2.5 (addresses are known before the first layer runs, so reads can be hidden
behind the layers in front).
"""

import threading

import torch
from transformers.utils import logging

from .rows_engram import FEW_ROWS, FileRows, HostRows
from .table_engram import BroughtRows


logger = logging.get_logger(__name__)

# Numbers of rows that take more than this share of the rows' own bytes are worth a second step.
LEAST_SHARE = 0.03

# A thread that dies without a word is noticed after this many seconds.
WAIT_SECONDS = 0.5


class RowFetch:
    """Rows of one order that a pass will need.

    Args:
        source ([`HostRows`] or [`FileRows`]): where they are.
        rows (`torch.LongTensor` of any shape): which; a wait for the device if they are on one.
        device (`torch.device`): where they are needed.
    """

    def __init__(self, source: HostRows | FileRows, rows: torch.Tensor, device: torch.device):
        self.source, self.device, self.shape = source, device, rows.shape
        self.rows = rows.to("cpu").flatten()  # (reads,)
        self.there = threading.Event()
        self.thread: threading.Thread | None = None
        self.dropped = False
        self.error: BaseException | None = None
        self.brought: BroughtRows | None = None
        self.copied = None
        self.numbers: list[torch.Tensor] = []

    def try_at_once(self) -> bool:
        """Fetches a few rows if no disk must be waited for; whether they are there."""
        if len(self.rows) <= FEW_ROWS:
            unique, places = self.unique_rows()
            values = self.source.read_resident(unique)
            if values is not None:
                self.finish(unique, places, values)
        return self.there.is_set()

    def run(self) -> None:
        """Fetches the rows; an error is kept for whoever waits for them."""
        try:
            unique, places = self.unique_rows()
            self.finish(unique, places, self.source.read(unique))
        except Exception as error:  # what ends a thread without one is seen by whoever waits
            self.error = error
            self.there.set()

    def unique_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows without repeats, and which of them each read is."""
        if self.device.type == "cpu" and (len(self.rows) <= FEW_ROWS or self.source.kind == "cpu"):
            return self.rows, torch.arange(len(self.rows), device="cpu")  # finding repeats costs more than reading them
        return torch.unique(self.rows, return_inverse=True)

    def finish(self, rows: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
        """Sends rows on to the device, if there is one to send them to."""
        places = places.view(self.shape)
        if self.device.type != "cpu":
            (values, *self.numbers), self.copied = send([values, *numbers_of(places, values)], self.device)
            places = self.numbers[0]
        self.brought = BroughtRows(values, places, rows)
        self.there.set()

    def result(self) -> BroughtRows:
        """The rows, waited for, in the order of what is computed on their device.

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
        """Says that nobody will ask for the rows."""
        self.dropped = True


def fetch_ahead(fetches: list[RowFetch]) -> None:
    """Begins fetches in their order, in the background unless they are there at once."""
    waiting = [fetch for fetch in fetches if not fetch.try_at_once()]
    if not waiting:
        return
    thread = threading.Thread(target=run_all, args=(waiting,), name="engram-fetch", daemon=True)
    for fetch in waiting:
        fetch.thread = thread
    try:
        thread.start()
    except RuntimeError:  # no more threads to be had: read where they are needed
        for fetch in waiting:
            fetch.thread = None


def run_all(fetches: list[RowFetch]) -> None:
    """What the thread does."""
    while fetches:
        fetch = fetches.pop(0)  # whoever waits for a fetch holds it; the thread does not keep what nobody wants
        if not fetch.dropped:
            fetch.run()


def numbers_of(places: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What says to a device which of the rows each read is, in few bytes.

    Args:
        places (`torch.LongTensor` of any shape): each read's row among `values`.
        values (`torch.Tensor` of shape `(unique, width)`): the rows.

    Returns:
        `list[torch.Tensor]`: the places; where texts repeat each other, the different lists of places along the last
        dimension (heads), and for each position which of them it has.
    """
    numbers = narrow(places, len(values))
    if numbers.ndim < 2 or numbers.nbytes <= LEAST_SHARE * values.nbytes:
        return [numbers]
    lists, texts = torch.unique(places.flatten(0, -2), dim=0, return_inverse=True)  # (different, heads), (positions,)
    two_steps = [narrow(lists, len(values)), narrow(texts.view(places.shape[:-1]), len(lists))]
    return min([numbers], two_steps, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))


def narrow(places: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers below `count` in the smallest type that holds them: they travel with the rows."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if count - 1 <= torch.iinfo(dtype).max:
            return places.to(dtype)
    return places


class SideCopy:
    """Copies that were made on a stream of their own, and the event behind them."""

    def __init__(self, streams, device: torch.device):
        self.streams, self.device = streams, device
        self.stream = streams.Stream(device=device)
        self.event = streams.Event()

    def send(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Begins to copy pinned tensors to the device."""
        with self.streams.stream(self.stream):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            self.event.record(self.stream)
        return sent

    def wait(self, sent: list[torch.Tensor]) -> None:
        """Lets what is computed from now on wait for the copies."""
        current = self.streams.current_stream(self.device)
        current.wait_event(self.event)
        for tensor in sent:
            tensor.record_stream(current)  # its memory is not reused before that is done


def send(tensors: list[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], SideCopy | None]:
    """Sends host tensors to a device, beside what it computes if it can: the copies, and what to wait for."""
    streams = getattr(torch, device.type, None)
    if not all(hasattr(streams, name) for name in ("Stream", "Event", "stream", "current_stream")):
        return [tensor.to(device) for tensor in tensors], None
    copy = SideCopy(streams, device)
    return copy.send([pinned(tensor) for tensor in tensors]), copy


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that a device can read by itself; the tensor as it is where there is none to be had."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        logger.debug(error)
        logger.warning_once(
            "No pinned memory for rows on their way to the device: they go through pageable memory, which is slower. "
            "Raise the limit of locked memory (ulimit -l)."
        )
        return tensor
