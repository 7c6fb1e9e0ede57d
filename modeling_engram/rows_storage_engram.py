"""Rows outside of a model: in host memory, or in the files of a checkpoint.

What it chooses: rows on disk are read by position (`preadv`) and never through a mapping, because a mapping of a file
that shrinks or cannot be read kills the process, where a read gives an error. Rows that are in the page cache are read
at once (`RWF_NOWAIT`); for the others the kernel is told all their places before the first of them is waited for.
Promises: a row that is read is the file's or an error is raised; files are opened once, shared by copies and forks, and
closed with the last who reads them; nothing is copied to another file and no page is made dirty. Never holds a table.
Source: Engram (arXiv 2601.07372), section 2.5 (tables beyond accelerator memory); docs/performance.md for the measured
ways of reading.
"""

import copy
import math
import mmap
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from .configuration_engram import EngramFormatError
from .files_safetensors_engram import read_header, read_index, start_of_data, torch_dtype
from .rows_table_engram import check_range, part_of, read_parts


# Reads of at most this many rows are tried at once, before a thread is made for them (about 60 microseconds).
FEW_ROWS = 256

# Rows at most this many bytes apart are read by one call: copying those between costs less than another call (1.4
# microseconds). Rows of one page need no more: the page is there after the first.
NEAR = 512

# As bytes (Windows would change line ends), and not by processes that are started.
OPEN = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "RWF_NOWAIT", None)  # Linux
# A private mapping is counted against RAM and swap unless it says that it needs none.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0) if os.name == "posix" else 0


class ShardFile:
    """An open file of a checkpoint, which is read as long as it stays what it was.

    A file that is replaced or deleted is read on as it was when it was opened. One that is written into or cut is not.

    Args:
        path (`str` or `os.PathLike`): a file that does not change while it is in use.

    Raises:
        `FileNotFoundError`: if it is not there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.descriptor = os.open(self.path, OPEN)
        self.one_at_a_time = threading.Lock()  # where a read moves the place of the next one
        self.identity = self.seen()

    def seen(self) -> tuple[int, int]:
        """Length and time of the last change."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raises [`EngramFormatError`] if the file is not what it was when it was opened."""
        seen = self.seen()
        if seen != self.identity:
            what = f"has {seen[0]:,} bytes, {self.identity[0]:,} when it was opened"
            if seen[0] == self.identity[0]:
                what = "was written into"
            raise EngramFormatError(
                f"'{self.path}' changed while its rows were in use: it {what}. Restore the file and load the model "
                "again; replace files by renaming, never by writing into them."
            )

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from `offset` on.

        Raises:
            [`EngramFormatError`]: if the file ends before.
            `OSError`: if the disk cannot be read, naming the file.
        """
        done = 0
        while done < len(buffer):
            try:
                count = self.read_some(buffer[done:], offset + done)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"rows at byte {offset:,} cannot be read ({os.strerror(error.errno)}): check the disk, or load the "
                    "model from a copy",
                    str(self.path),
                ) from error
            if count == 0:
                self.check()
                raise EngramFormatError(f"'{self.path}' ends before byte {offset + len(buffer):,}: it is truncated.")
            done += count

    def read_some(self, buffer: memoryview, offset: int) -> int:
        """Reads as many bytes at a place as the system gives at once; how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [buffer], offset)
        with self.one_at_a_time:  # Windows
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            found = os.read(self.descriptor, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def read_resident(self, buffer: memoryview, offset: int) -> bool:
        """Fills a buffer if all of it is in the page cache; whether it was."""
        if NO_WAIT is None or not hasattr(os, "preadv"):
            return False
        try:
            return os.preadv(self.descriptor, [buffer], offset, NO_WAIT) == len(buffer)
        except OSError:  # EAGAIN: not there. Everything else is for the read that waits to report.
            return False

    def expect(self, offset: int, length: int) -> None:
        """Tells the kernel that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def map(self) -> mmap.mmap:
        """The file as memory that is none before it is written to; writes stay out of the file.

        Unlike safetensors' mapping it may be larger than RAM and swap.
        """
        self.check()
        if os.name != "posix":
            return mmap.mmap(self.descriptor, self.identity[0], access=mmap.ACCESS_COPY)
        flags, access = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(self.descriptor, self.identity[0], flags=flags, prot=access)

    def __deepcopy__(self, memo) -> "ShardFile":
        return self

    def __reduce__(self):
        return _reopen, (self.path, self.identity)

    def __del__(self):
        descriptor = self.__dict__.pop("descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def _reopen(path: Path, identity: tuple[int, int]) -> ShardFile:
    """A file that was pickled, if it still is what it was."""
    file = ShardFile(path)
    file.identity = identity
    file.check()
    return file


@dataclass(frozen=True)
class FilePart:
    """Where a part of a table lies: a file, the first byte, and the shape `(rows, width)` and type of what is there."""

    file: ShardFile
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def within(self, mapping: mmap.mmap) -> torch.Tensor:
        """The part as a tensor of shape `(rows, width)` of the mapped file."""
        size = math.prod(self.shape) * self.dtype.itemsize
        data = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=self.offset)  # (bytes,)
        return data.view(self.dtype).view(self.shape)  # (rows, width)


class CheckpointTables:
    """Parts of tables by their state-dict names, in the files of a local checkpoint; files are opened when needed.

    Args:
        folder (`Path`): the folder of the index.
        locate ([`HubFiles`], *optional*): of a checkpoint on the Hub; fetches a file of the index by its name.
    """

    def __init__(self, folder: Path, locate=None):
        self.folder, self.locate = Path(folder), locate
        self.files: dict[str, ShardFile] = {}
        self.headers: dict[str, dict] = {}
        self.weight_map = read_index(self.folder)

    @property
    def name(self) -> str:
        """By which another process finds the checkpoint: a Hub id, or a folder."""
        return os.path.abspath(self.folder) if self.locate is None else self.locate.repository

    @property
    def revision(self) -> str | None:
        """The commit of a checkpoint on the Hub."""
        return None if self.locate is None else self.locate.revision

    @property
    def subfolder(self) -> str:
        """Where in its repository a checkpoint on the Hub is."""
        return "" if self.locate is None else self.locate.subfolder

    def part(self, name: str) -> FilePart:
        """Where a tensor lies.

        Raises:
            `FileNotFoundError` or [`EngramFormatError`]: if the checkpoint does not hold it whole.
        """
        if name not in self.weight_map:
            raise EngramFormatError(f"the index of '{self.folder}' does not name '{name}': the memory is incomplete.")
        file_name = self.weight_map[name]
        if file_name not in self.files:
            path = self.folder / file_name if self.locate is None else Path(self.locate(file_name))
            self.headers[file_name] = read_header(path)
            self.files[file_name] = ShardFile(path)
        return file_part(self.files[file_name], self.headers[file_name], name)


def file_part(file: ShardFile, header: dict, name: str) -> FilePart:
    """Where a tensor lies in a safetensors file.

    Raises:
        [`EngramFormatError`]: if it is not there.
    """
    if name not in header:
        raise EngramFormatError(f"'{file.path}' does not hold '{name}', as the index says: restore the file.")
    entry = header[name]
    return FilePart(file, start_of_data(file.path) + entry.begin, entry.shape, torch_dtype(entry.dtype))


class RowStore(ABC):
    """Where the rows of one order are while its parts hold none."""

    kind: str  # "cpu" or "disk"
    heights: list[int]  # rows of each part
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(self.heights) * self.width * self.dtype.itemsize

    @property
    @abstractmethod
    def files(self) -> list[ShardFile]:
        """The files that rows are read from."""

    @abstractmethod
    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Copies rows `(reads,)` in any order out: `(reads, width)`.

        Raises:
            `IndexError`: for rows that the table does not have.
            [`EngramFormatError`] or `OSError`: if a file changed, ends too early, or cannot be read.
        """

    @abstractmethod
    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        """As `read`; None if that might wait for a disk."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """The parts as tensors of shape `(part rows, width)`, for a state dict."""

    @abstractmethod
    def part(self, number: int):
        """What reads and writes the rows of one part: `shape`, `read(rows)`, `write(rows, values)`, `expect(rows)`."""


class HostRows(RowStore):
    """Rows of one order in host memory: tensors of their own, or a mapping of the checkpoint's.

    Args:
        parts (`list[torch.Tensor]`): of shape `(part rows, width)`, each but the last of the same height.
        files (`list[ShardFile]`, *optional*): what they are mapped from.
    """

    kind = "cpu"
    files: list[ShardFile] = []

    def __init__(self, parts: list[torch.Tensor], files: list[ShardFile] | None = None):
        self.parts, self.files = [part.detach() for part in parts], files or []
        self.heights = [len(part) for part in parts]
        self.width, self.dtype = parts[0].shape[1], parts[0].dtype

    def tensors(self) -> list[torch.Tensor]:
        """See [`RowStore`]."""
        self.check()
        return self.parts

    def check(self) -> None:
        """Raises [`EngramFormatError`] if a mapped file changed; one that was cut would kill the process."""
        for file in self.files:
            file.check()

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """See [`RowStore`]."""
        check_range(rows, sum(self.heights))
        self.check()
        values = read_parts(rows, self.heights[0], self.parts)
        self.check()
        return values

    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See [`RowStore`]."""
        return self.read(rows)

    def part(self, number: int) -> "HostPart":
        """See [`RowStore`]."""
        return HostPart(self, number)

    def own(self) -> None:
        """Copies rows that lie in a mapped file into memory, whatever becomes of the file."""
        self.parts = [part.clone() if is_mapped(part) else part for part in self.parts]
        self.files = []

    def __deepcopy__(self, memo) -> "HostRows":
        return HostRows(copy.deepcopy(self.parts, memo))  # in memory, whatever becomes of the files

    def __reduce__(self):
        return HostRows, (self.parts,)


@dataclass
class HostPart:
    """One part of rows in host memory."""

    store: HostRows
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.store.heights[self.number], self.store.width

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(rows,)`: `(rows, width)`."""
        return self.store.parts[self.number].index_select(0, rows)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Changes rows `(rows,)`, ascending and unique, to `values`."""
        self.store.parts[self.number].index_copy_(0, rows, values.to(self.store.dtype))

    def expect(self, rows: torch.Tensor) -> None:
        """There is room."""


class FileRows(RowStore):
    """Rows of one order in a checkpoint's files, as they are stored: for reading alone.

    Args:
        parts (`list[FilePart]`): where the parts lie, each but the last of the same height.
    """

    kind = "disk"

    def __init__(self, parts: list[FilePart]):
        self.parts = parts
        self.heights = [part.shape[0] for part in parts]
        self.width, self.dtype = parts[0].shape[1], parts[0].dtype

    @property
    def files(self) -> list[ShardFile]:
        """The files that rows are read from."""
        return list(dict.fromkeys(part.file for part in self.parts))

    def tensors(self, mappings: dict[ShardFile, mmap.mmap] | None = None) -> list[torch.Tensor]:
        """The parts as tensors that are mapped from the files, for a state dict.

        Args:
            mappings (`dict`, *optional*): of files, to which those that are missing are added.
        """
        # Once for each file and call: a mapping takes a descriptor, and all users of one see what is written to it.
        mappings = {} if mappings is None else mappings
        for file in set(self.files) - mappings.keys():
            mappings[file] = file.map()
        return [part.within(mappings[part.file]) for part in self.parts]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Reads rows `(reads,)` in any order: `(reads, width)`.

        Raises:
            [`EngramFormatError`] or `OSError`: if a file changed, ends too early, or cannot be read.
        """
        check_range(rows, sum(self.heights))
        ascending, order = rows.sort()
        runs = self.runs(ascending)
        # All places are told before the first is waited for.
        for part_runs in runs:
            part_runs.begin()
        return self.in_order(order, [part_runs.finish() for part_runs in runs])

    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        """As `read`, for a few rows that are all in the page cache; None (and the kernel is told) if they are not."""
        if len(rows) > FEW_ROWS:
            return None
        check_range(rows, sum(self.heights))
        ascending, order = rows.sort()
        runs = self.runs(ascending)
        if sum(not part_runs.begin() for part_runs in runs):  # all of them begin
            return None
        return self.in_order(order, [part_runs.finish() for part_runs in runs])

    def in_order(self, order: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        """Rows that were read in ascending order, `(reads, width)` as they were asked for."""
        values = torch.empty(len(order), self.width, dtype=self.dtype, device="cpu")  # (reads, width)
        if found:
            values[order] = torch.cat(found)
        return values

    def part(self, number: int):
        """Files are never written to."""
        raise TypeError("rows in files are for reading alone: RowOverlay(rows) keeps changes over them.")

    def runs(self, rows: torch.Tensor) -> list["Runs"]:
        """What reads ascending rows, of each part that has some; neighbours by one call."""
        height = self.heights[0]
        inside = part_of(rows, height, len(self.parts))  # (reads,)
        own = [rows[inside == number] - number * height for number in range(len(self.parts))]
        return [Runs(part, theirs) for part, theirs in zip(self.parts, own, strict=True) if len(theirs)]


class Runs:
    """Ascending rows of one part, read in runs of neighbours.

    Args:
        part ([`FilePart`]): where they are.
        rows (`torch.LongTensor` of shape `(rows,)`): counted in the part.
    """

    def __init__(self, part: FilePart, rows: torch.Tensor):
        self.part, self.size = part, part.shape[1] * part.dtype.itemsize
        begin = rows * self.size  # (rows,)
        breaks = torch.nonzero(begin.diff() > self.size + NEAR).flatten() + 1
        first = torch.cat([breaks.new_zeros(1), breaks])  # (runs,): each run's first row
        last = torch.cat([breaks, breaks.new_full((1,), len(rows))]) - 1  # (runs,)
        lengths = begin[last] + self.size - begin[first]  # (runs,)
        slots = lengths.cumsum(0) - lengths  # (runs,): where each run goes
        self.scratch = torch.empty(int(lengths.sum()), dtype=torch.uint8, device="cpu")
        self.runs = list(zip(slots.tolist(), lengths.tolist(), (part.offset + begin[first]).tolist(), strict=True))
        run_of_row = torch.zeros_like(rows).index_fill_(0, breaks, 1).cumsum(0)  # (rows,)
        self.starts = (slots - begin[first])[run_of_row] + begin  # (rows,): where each row is among the runs

    def begin(self) -> bool:
        """Reads what is in the page cache, and tells the kernel what else will be read; whether that was all."""
        file, self.buffer = self.part.file, _as_bytes(self.scratch)
        missed = []
        for slot, length, offset in self.runs:
            if not file.read_resident(self.buffer[slot : slot + length], offset):
                missed.append((slot, length, offset))
        self.runs = missed
        for _, length, offset in missed:
            file.expect(offset, length)
        if missed:
            file.check()  # it may have been cut
        return not missed

    def finish(self) -> torch.Tensor:
        """Reads the rest; the rows, `(rows, width)`."""
        file = self.part.file
        for slot, length, offset in self.runs:
            file.read(self.buffer[slot : slot + length], offset)
        file.check()  # behind the reads: it may have changed among them
        windows = self.scratch.as_strided((len(self.scratch) - self.size + 1, self.size), (1, 1))  # overlapping
        return windows[self.starts].view(self.part.dtype)  # (rows, width)


def mapping_of(tensor: torch.Tensor) -> tuple[int, dict[str, str]] | None:
    """What the system says of the memory in which a tensor begins; None where it does not say (other than Linux).

    The inode of the file that is mapped there for this process alone (0 for none, and for memory that processes share),
    and the account of its pages by name.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    found = None
    for line in lines:
        head, *rest = line.split()
        if not head.endswith(":"):  # "first-last permissions offset device inode path"
            if found is not None:
                return found
            first, last = (int(bound, 16) for bound in head.split("-"))
            if first <= tensor.data_ptr() < last:
                found = int(rest[3]) if rest[0].endswith("p") else 0, {}
        elif found is not None:
            found[1][head[:-1]] = rest[0] if rest else ""
    return found


def written_to(mapped: torch.Tensor) -> bool:
    """Whether a mapping of a file holds anything that is not the file's; True where the system does not say.

    Its private pages tell, also of writes that torch does not count.
    """
    mapping = mapping_of(mapped)
    return mapping is None or any(int(mapping[1].get(field, 0)) for field in ("Private_Dirty", "Swap"))


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a file that is mapped privately; False where the system does not say."""
    mapping = mapping_of(tensor) if tensor.is_cpu else None
    return mapping is not None and mapping[0] != 0


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to be written into."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
