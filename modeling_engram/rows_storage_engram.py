"""Rows outside of a model: in host memory, or in the files of a checkpoint.

What it chooses: rows on disk are read with `preadv`, not through a mapping: if a mapped file shrinks or cannot be read,
the process dies, where a read raises an error. Rows in the page cache are read at once (`RWF_NOWAIT`); the kernel is
told of all others before the first is waited for.
Promises: a row that is read is the file's, or an error is raised; files are opened once, shared by copies and forks,
and closed with their last user; nothing is copied to another file and no page is made dirty. Never holds a table.
Source: Engram (arXiv 2601.07372), section 2.5 (tables beyond accelerator memory); docs/performance.md for measurements.
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


# Reads of at most this many rows are tried at once, before a thread is started for them.
FEW_ROWS = 256

# Rows at most this many bytes apart are read by one call: copying the gap is cheaper than another call.
NEAR = 512

# Binary (Windows would change line ends), and not inherited by new processes.
OPEN = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "RWF_NOWAIT", None)  # Linux
# Without this flag a private mapping is counted against RAM and swap.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0) if os.name == "posix" else 0


class ShardFile:
    """Read-only handle of a checkpoint's file; reads fail once its size or modification time changes.

    A file that was replaced or deleted stays readable through the handle.

    Args:
        path (`str` or `os.PathLike`): a file that does not change while it is in use.

    Raises:
        `FileNotFoundError`: if it does not exist.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.descriptor = os.open(self.path, OPEN)
        self.one_at_a_time = threading.Lock()  # where a read moves the file position
        self.identity = self.seen()

    def seen(self) -> tuple[int, int]:
        """Returns size and modification time."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raises [`EngramFormatError`] if the file changed since it was opened."""
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
            [`EngramFormatError`]: if the file is too short.
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
        """Reads up to `len(buffer)` bytes; returns how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [buffer], offset)
        with self.one_at_a_time:  # Windows
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            found = os.read(self.descriptor, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def read_resident(self, buffer: memoryview, offset: int) -> bool:
        """Fills a buffer if all of it is in the page cache; returns whether it was."""
        if NO_WAIT is None or not hasattr(os, "preadv"):
            return False
        try:
            return os.preadv(self.descriptor, [buffer], offset, NO_WAIT) == len(buffer)
        except OSError:  # EAGAIN: not in the cache; the blocking read reports other errors
            return False

    def expect(self, offset: int, length: int) -> None:
        """Tells the kernel that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def map(self) -> mmap.mmap:
        """Maps the file copy-on-write; unlike safetensors' mapping it may be larger than RAM and swap."""
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
    """Reopens a pickled file and checks that it has not changed."""
    file = ShardFile(path)
    file.identity = identity
    file.check()
    return file


@dataclass(frozen=True)
class FilePart:
    """Location of a part of a table: file, first byte, shape `(rows, width)` and dtype."""

    file: ShardFile
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def within(self, mapping: mmap.mmap) -> torch.Tensor:
        """Returns the part as a tensor `(rows, width)` on the mapped file."""
        size = math.prod(self.shape) * self.dtype.itemsize
        data = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=self.offset)  # (bytes,)
        return data.view(self.dtype).view(self.shape)  # (rows, width)


class CheckpointTables:
    """Parts of tables by state-dict name, in the files of a local checkpoint; files are opened when needed.

    Args:
        folder (`Path`): the folder of the index.
        locate ([`HubFiles`], *optional*): for a checkpoint on the Hub: downloads a file by its name.
    """

    def __init__(self, folder: Path, locate=None):
        self.folder, self.locate = Path(folder), locate
        self.files: dict[str, ShardFile] = {}
        self.headers: dict[str, dict] = {}
        self.weight_map = read_index(self.folder)

    @property
    def name(self) -> str:
        """Name by which another process finds the checkpoint: a Hub id, or a folder."""
        return os.path.abspath(self.folder) if self.locate is None else self.locate.repository

    @property
    def revision(self) -> str | None:
        """Commit of a checkpoint on the Hub."""
        return None if self.locate is None else self.locate.revision

    @property
    def subfolder(self) -> str:
        """Subfolder of a checkpoint on the Hub."""
        return "" if self.locate is None else self.locate.subfolder

    def part(self, name: str) -> FilePart:
        """Returns the location of a tensor.

        Raises:
            `FileNotFoundError` or [`EngramFormatError`]: if the checkpoint does not hold it.
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
    """Returns the location of a tensor in a safetensors file; raises [`EngramFormatError`] if it is missing."""
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
        """Copies rows `(reads,)`, in any order, to `(reads, width)`.

        Raises:
            `IndexError`: for rows that the table does not have.
            [`EngramFormatError`] or `OSError`: if a file changed, is too short, or cannot be read.
        """

    @abstractmethod
    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        """As `read`; None if that might wait for a disk."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Returns the parts as tensors of shape `(part rows, width)`, for a state dict."""

    @abstractmethod
    def part(self, number: int):
        """Returns access to one part: `shape`, `read(rows)`, `write(rows, values)`, `expect(rows)`."""


class HostRows(RowStore):
    """Rows of one order in host memory, allocated or mapped from the checkpoint.

    Args:
        parts (`list[torch.Tensor]`): of shape `(part rows, width)`, all but the last of the same height.
        files (`list[ShardFile]`, *optional*): the files that they are mapped from.
    """

    kind = "cpu"
    files: list[ShardFile] = []

    def __init__(self, parts: list[torch.Tensor], files: list[ShardFile] | None = None):
        self.parts, self.files = [part.detach() for part in parts], files or []
        self.heights = [len(part) for part in parts]
        self.width, self.dtype = parts[0].shape[1], parts[0].dtype

    def tensors(self) -> list[torch.Tensor]:
        self.check()
        return self.parts

    def check(self) -> None:
        """Raises [`EngramFormatError`] if a mapped file changed: reading a truncated one would kill the process."""
        for file in self.files:
            file.check()

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        check_range(rows, sum(self.heights))
        self.check()
        values = read_parts(rows, self.heights[0], self.parts)
        self.check()
        return values

    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        return self.read(rows)

    def part(self, number: int) -> "HostPart":
        return HostPart(self, number)

    def own(self) -> None:
        """Copies file-mapped rows into anonymous memory."""
        self.parts = [part.clone() if is_mapped(part) else part for part in self.parts]
        self.files = []

    def __deepcopy__(self, memo) -> "HostRows":
        return HostRows(copy.deepcopy(self.parts, memo))  # in memory, independent of the files

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
        """Returns rows `(rows,)` as `(rows, width)`."""
        self.store.check()
        return self.store.parts[self.number].index_select(0, rows)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `values` to rows `(rows,)`, ascending and unique."""
        self.store.check()
        self.store.parts[self.number].index_copy_(0, rows, values.to(self.store.dtype))

    def expect(self, rows: torch.Tensor) -> None:
        """Does nothing: the rows are allocated."""


class FileRows(RowStore):
    """Rows of one order in a checkpoint's files, read-only.

    Args:
        parts (`list[FilePart]`): location of the parts, all but the last of the same height.
    """

    kind = "disk"

    def __init__(self, parts: list[FilePart]):
        self.parts = parts
        self.heights = [part.shape[0] for part in parts]
        self.width, self.dtype = parts[0].shape[1], parts[0].dtype

    @property
    def files(self) -> list[ShardFile]:
        return list(dict.fromkeys(part.file for part in self.parts))

    def tensors(self, mappings: dict[ShardFile, mmap.mmap] | None = None) -> list[torch.Tensor]:
        """Returns the parts as tensors mapped from the files; missing mappings are added to `mappings`."""
        # One for each file and call: a mapping takes a descriptor, and its users see each other's writes.
        mappings = {} if mappings is None else mappings
        for file in set(self.files) - mappings.keys():
            mappings[file] = file.map()
        return [part.within(mappings[part.file]) for part in self.parts]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        check_range(rows, sum(self.heights))
        ascending, order = rows.sort()
        runs = self.runs(ascending)
        # All positions are announced before the first is waited for.
        for part_runs in runs:
            part_runs.begin()
        return self.in_order(order, [part_runs.finish() for part_runs in runs])

    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        """As `read`, for few rows that are all in the page cache; else tells the kernel and returns None."""
        if len(rows) > FEW_ROWS:
            return None
        check_range(rows, sum(self.heights))
        ascending, order = rows.sort()
        runs = self.runs(ascending)
        if sum(not part_runs.begin() for part_runs in runs):  # all of them begin
            return None
        return self.in_order(order, [part_runs.finish() for part_runs in runs])

    def in_order(self, order: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        """Puts rows that were read in ascending order into the order of the request, `(reads, width)`."""
        values = torch.empty(len(order), self.width, dtype=self.dtype, device="cpu")  # (reads, width)
        if found:
            values[order] = torch.cat(found)
        return values

    def part(self, number: int):
        """Raises TypeError: files are never written to."""
        raise TypeError("rows in files are for reading alone: RowOverlay(rows) keeps changes over them.")

    def runs(self, rows: torch.Tensor) -> list["Runs"]:
        """Groups ascending rows by part; neighbours are read by one call."""
        height = self.heights[0]
        inside = part_of(rows, height, len(self.parts))  # (reads,)
        own = [rows[inside == number] - number * height for number in range(len(self.parts))]
        return [Runs(part, theirs) for part, theirs in zip(self.parts, own, strict=True) if len(theirs)]


class Runs:
    """Ascending rows of one part, read in runs of neighbours.

    Args:
        part ([`FilePart`]): where they are.
        rows (`torch.LongTensor` of shape `(rows,)`): row numbers within the part.
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
        """Reads what is in the page cache and announces the rest to the kernel; returns whether that was all."""
        file, self.buffer = self.part.file, _as_bytes(self.scratch)
        missed = []
        for slot, length, offset in self.runs:
            if not file.read_resident(self.buffer[slot : slot + length], offset):
                missed.append((slot, length, offset))
        self.runs = missed
        for _, length, offset in missed:
            file.expect(offset, length)
        if missed:
            file.check()  # it may have been truncated
        return not missed

    def finish(self) -> torch.Tensor:
        """Reads the rest; returns the rows, `(rows, width)`."""
        file = self.part.file
        for slot, length, offset in self.runs:
            file.read(self.buffer[slot : slot + length], offset)
        file.check()  # after the reads: it may have changed during them
        windows = self.scratch.as_strided((len(self.scratch) - self.size + 1, self.size), (1, 1))  # overlapping
        return windows[self.starts].view(self.part.dtype)  # (rows, width)


def mapping_of(tensor: torch.Tensor) -> tuple[int, dict[str, str]] | None:
    """Returns inode and page counts of the mapping that a tensor begins in; None where the system does not say (not
    Linux).

    The inode is that of a privately mapped file, 0 for other memory.
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
    """Whether a file's mapping has private pages, which differ from the file; True where the system does not say."""
    mapping = mapping_of(mapped)
    return mapping is None or any(int(mapping[1].get(field, 0)) for field in ("Private_Dirty", "Swap"))


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in a privately mapped file; False where the system does not say."""
    mapping = mapping_of(tensor) if tensor.is_cpu else None
    return mapping is not None and mapping[0] != 0


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor, for writing."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
