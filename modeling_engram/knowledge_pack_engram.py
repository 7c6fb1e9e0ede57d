"""KnowledgePack: records that are looked up by the n-gram itself, and the packs that a model reads.

What it chooses: a record is found by a 64-bit key and then compared class by class, so a text that holds none of a
pack's n-grams reads nothing of it; hashed rows cannot promise that. One record holds a vector for each Engram layer.
Promises: loading, ordering and unloading packs changes no weight, so unloading restores every bit; a file is checked
completely before anything is loaded; a damaged file or a pack of another memory changes nothing. Never unpickles.
Source: docs/packs.md.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .configuration_engram import EngramFormatError
from .files_atomic_engram import flush
from .files_safetensors_engram import read_header


SUFFIX = ".engram-pack.safetensors"
KIND = "engram-pack"
VERSION = "1"
MODES = ("add", "replace")

# What a pack has to share with the memory that reads it.
FITS = ("token_map", "classes", "layers", "widths", "reader")


class KnowledgePack:
    """A dictionary from n-grams to vectors.

    Args:
        ngrams (`dict[int, torch.LongTensor]`): by order n, classes `(records, n)` in the order of the text.
        vectors (`dict[int, dict[int, torch.Tensor]]`): by layer and order, `(records, width)`; stored in float32.
        fits (`dict`): the memory that it was made for, from `pack_identity`.
        mode (`str`, *optional*, defaults to `"add"`):
            "add" adds a record to what is read so far (table and earlier packs), "replace" stands in for it.
        provenance (`dict`, *optional*): anything that JSON can hold, such as a licence.

    Raises:
        `ValueError`: if shapes do not belong together, an n-gram is given twice or is not made of the memory's
            classes, or a vector is not finite.

    Example:

    ```python
    >>> pack = KnowledgePack.load("people.engram-pack.safetensors")
    >>> model.load_memory(pack, name="people")
    ```"""

    def __init__(
        self,
        ngrams: Mapping[int, torch.Tensor],
        vectors: Mapping[int, Mapping[int, torch.Tensor]],
        fits: Mapping,
        mode: str = "add",
        provenance: Mapping | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} of a pack must be one of {', '.join(map(repr, MODES))}.")
        self.fits, self.mode, self.provenance = dict(fits), mode, dict(provenance or {})
        _check_shapes(ngrams, vectors, self.fits)
        self.records: dict[int, _Records] = {}
        for order, grams in sorted(ngrams.items()):
            _check_classes(order, grams, self.fits["classes"])
            own = {layer: by_order[order] for layer, by_order in sorted(vectors.items())}
            self.records[order] = _Records(grams, own)

    def __len__(self) -> int:
        return sum(len(records.ngrams) for records in self.records.values())

    @property
    def nbytes(self) -> int:
        """Bytes of n-grams and vectors."""
        return sum(t.nbytes for records in self.records.values() for t in (records.ngrams, *records.vectors.values()))

    def ngrams(self) -> set[tuple[int, ...]]:
        """Returns all n-grams, as tuples of classes."""
        return {tuple(gram) for records in self.records.values() for gram in records.ngrams.tolist()}

    def without(self, ngrams: Iterable[Sequence[int]]) -> "KnowledgePack":
        """Returns a pack without some n-grams, given as classes.

        Raises:
            `ValueError`: for an n-gram that the pack does not hold.
        """
        gone = {tuple(gram) for gram in ngrams}
        if gone - self.ngrams():
            raise ValueError(f"the pack holds no record of {sorted(gone - self.ngrams())[:3]}: nothing was removed.")
        keeps = {
            order: torch.tensor(
                [tuple(gram) not in gone for gram in records.ngrams.tolist()], dtype=torch.bool, device="cpu"
            )
            for order, records in self.records.items()
        }
        grams = {order: self.records[order].ngrams[keep] for order, keep in keeps.items()}
        vectors = {
            layer: {order: self.records[order].vectors[layer][keep] for order, keep in keeps.items()}
            for layer in self.fits["layers"]
        }
        return KnowledgePack(grams, vectors, self.fits, self.mode, self.provenance)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one file, under another name first, and returns its path; `<name>.engram-pack.safetensors` is usual.

        Equal packs give equal bytes.
        """
        path = Path(path)
        tensors = {}
        for order, records in self.records.items():
            tensors[f"order{order}.ngrams"] = records.ngrams.contiguous()
            for layer, vectors in records.vectors.items():
                tensors[f"layers.{layer}.order{order}.vectors"] = vectors.contiguous()
        told = {"version": VERSION, "fits": self.fits, "mode": self.mode, "provenance": self.provenance}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        try:
            save_file(
                tensors, draft, {KIND: json.dumps(told, sort_keys=True)}
            )  # one entry, so that bytes are reproducible
            flush(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KnowledgePack":
        """Reads a file.

        Raises:
            `FileNotFoundError`: if it is missing.
            [`EngramFormatError`]: if it is truncated, damaged, or another kind of file.
        """
        path = Path(path)
        entries = read_header(path)  # sizes, before anything is allocated
        try:
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get(KIND)
                if told is not None:
                    return cls(*_content(file, entries, json.loads(told)))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise EngramFormatError(
                f"'{path}' is a damaged or newer knowledge pack ({error}). Copy or download it again, or install a "
                "newer engram-transformers."
            ) from error
        raise EngramFormatError(
            f"'{path}' is a safetensors file, but not a knowledge pack: KnowledgePack.save writes one."
        )


def pack_file(path: str | os.PathLike, **hub) -> Path:
    """Returns a pack's file: `path` itself, or the one pack of a repository on the Hub, downloaded.

    Args:
        path (`str` or `os.PathLike`): a file, or a repository's id such as "me/people".
        hub: `revision`, `token` and `cache_dir` of `huggingface_hub.snapshot_download`.

    Raises:
        `FileNotFoundError`: if there is neither such a file nor such a repository.
        `ValueError`: if the repository holds several packs, or none.
    """
    file, id_ = Path(path), str(path)
    if file.exists() or id_.endswith(SUFFIX) or not _may_be_repository(id_):
        if hub.get("revision") is not None:
            raise ValueError(
                f"revision={hub['revision']!r} is for packs on the Hub, and '{id_}' is a file: leave it out."
            )
        return file  # a missing one is refused where it is read
    try:
        folder = Path(snapshot_download(id_, allow_patterns=f"*{SUFFIX}", **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"'{id_}' is not a file here, and its repository on the Hub cannot be read ({str(error).splitlines()[0]}). "
            "Name a pack's file, or a repository; a private one needs token=."
        ) from error
    found = sorted(folder.rglob(f"*{SUFFIX}"))
    if len(found) != 1:
        names = [file.relative_to(folder).as_posix() for file in found]
        raise ValueError(
            f"'{id_}' holds {len(found)} knowledge packs {names[:5]}, and one is needed: download the one that you "
            f'want with huggingface_hub.hf_hub_download("{id_}", ...), and name its file.'
        )
    return found[0]


def _may_be_repository(text: str) -> bool:
    """Whether a text has the form "owner/name"."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def _content(file: safe_open, entries: Mapping, told: Mapping) -> tuple:
    """Returns the arguments of [`KnowledgePack`] from an open file, its header's entries and its metadata."""
    if told["version"] != VERSION:
        raise ValueError(f"version {told['version']!r}, and this code reads {VERSION!r}")
    fits, mode, provenance = told["fits"], told["mode"], told["provenance"]
    if type(fits["classes"]) is not int:
        raise ValueError(f"{fits['classes']!r} token classes")
    orders = sorted(int(order) for order in fits["widths"])
    wanted = {f"order{n}.ngrams" for n in orders}
    wanted |= {f"layers.{layer}.order{n}.vectors" for layer in fits["layers"] for n in orders}
    if set(entries) != wanted:
        raise ValueError(f"tensors {sorted(set(entries) ^ wanted)[:3]} are missing or unknown")
    ngrams = {n: file.get_tensor(f"order{n}.ngrams") for n in orders}
    vectors = {
        layer: {n: file.get_tensor(f"layers.{layer}.order{n}.vectors") for n in orders} for layer in fits["layers"]
    }
    return ngrams, vectors, fits, mode, provenance


class _Records:
    """Records of one order, and the index that finds them.

    Args:
        ngrams (`torch.LongTensor` of shape `(records, n)`): classes.
        vectors (`dict[int, torch.Tensor]`): by layer, `(records, width)`.
    """

    def __init__(self, ngrams: torch.Tensor, vectors: Mapping[int, torch.Tensor]):
        ngrams = ngrams.to("cpu", torch.int64)
        for seed in count():
            generator = torch.Generator(device="cpu").manual_seed(seed)
            factors = torch.randint(-(2**62), 2**62, (ngrams.shape[1],), generator=generator, device="cpu") * 2 + 1
            keys = (ngrams * factors).sum(-1)  # (records,), int64 overflow wanted
            order = None if bool((keys[1:] > keys[:-1]).all()) else keys.argsort(stable=True)  # files are in order
            keys, sorted_grams = _in_order(keys, order), _in_order(ngrams, order)
            same = keys[1:] == keys[:-1]  # (records - 1,)
            if not bool(same.any()):
                break
            twice = (sorted_grams[1:] == sorted_grams[:-1]).all(-1) & same
            if bool(twice.any()):
                raise ValueError(f"n-gram {sorted_grams[1:][twice][0].tolist()} is given twice.")
        self.factors, self.keys, self.ngrams = factors, keys, sorted_grams
        # Not copied if they are in order: a file's vectors stay in its mapped pages until they are read.
        self.vectors = {layer: _in_order(rows.to("cpu", torch.float32), order) for layer, rows in vectors.items()}
        self._elsewhere: dict[tuple[torch.device, bool], _Records] = {}

    def on(self, device: torch.device, with_vectors: bool = True) -> "_Records":
        """Returns these records on a device, or only what finds them; copied at the first use."""
        if device == self.keys.device:
            return self
        if (device, with_vectors) not in self._elsewhere:
            copied = object.__new__(_Records)
            for name in ("factors", "keys", "ngrams"):
                setattr(copied, name, getattr(self, name).to(device))
            vectors = self.vectors.items()
            copied.vectors = {layer: rows.to(device) if with_vectors else rows for layer, rows in vectors}
            self._elsewhere[device, with_vectors] = copied
        return self._elsewhere[device, with_vectors]

    def find(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds n-grams `(batch, length, n)`: slots `(batch, length)`, and where there is one."""
        keys = (window * self.factors).sum(-1)  # (batch, length)
        slots = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)  # (batch, length)
        return slots, (self.ngrams[slots] == window).all(-1)


def _in_order(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Returns rows in an order; as they are if it is None."""
    return rows if order is None else rows[order]


class PackRead(NamedTuple):
    """A pack that a batch reads.

    Args:
        pack ([`KnowledgePack`]): the pack.
        rows (`list[int]`, *optional*): of the batch, which read it; None for all rows.
        with_vectors (`bool`): whether its vectors are copied to the device; else only those that are found travel.
    """

    pack: KnowledgePack
    rows: list[int] | None = None
    with_vectors: bool = True


class Found(NamedTuple):
    """What one pack and order hold of a batch.

    Args:
        mode (`str`): the pack's.
        order (`int`): of the n-grams.
        rows (`slice` or `torch.LongTensor` of shape `(rows,)`): of the batch, which read the pack.
        records ([`_Records`]): of the pack.
        slots (`torch.LongTensor` of shape `(rows, length)`): which record, where there is one.
        matches (`torch.BoolTensor` of shape `(rows, length)`): where there is one.
    """

    mode: str
    order: int
    rows: slice | torch.Tensor
    records: "_Records"
    slots: torch.Tensor
    matches: torch.Tensor


class FoundRecords:
    """The records that one forward pass reads.

    Args:
        packs (iterable of [`PackRead`]): in the order of reading.
        classes (`torch.LongTensor` of shape `(N, batch, length)`): entry i is i positions back; -1 ends an n-gram.
    """

    def __init__(self, packs: Iterable["PackRead"], classes: torch.Tensor):
        self.found: list[Found] = []
        backwards = classes.permute(1, 2, 0)  # (batch, length, N)
        for pack, rows, with_vectors in packs:
            rows = slice(None) if rows is None else torch.tensor(rows, device=classes.device)
            own = backwards[rows]  # (rows, length, N)
            for order, records in pack.records.items():
                if len(records.ngrams):
                    records = records.on(classes.device, with_vectors)
                    found = records.find(own[..., :order].flip(-1))
                    self.found.append(Found(pack.mode, order, rows, records, *found))

    def apply(self, layer_id: int, vectors: torch.Tensor) -> torch.Tensor:
        """Adds records to a layer's memory vectors `(batch, length, orders * width)`, or puts them in their place.

        Positions without a record keep every bit. Returns float32, which holds every type of a table exactly.
        """
        vectors, device = vectors.to(torch.float32, copy=True), vectors.device
        for mode, order, rows, records, slots, matches in self.found:
            stored, matches = records.vectors[layer_id], matches.to(device)
            rows = rows if isinstance(rows, slice) else rows.to(device)
            width = stored.shape[1]
            own = slice((order - 2) * width, (order - 1) * width)
            read = stored[slots.to(stored.device)].to(device)  # (rows, length, width)
            before = vectors[rows, :, own]  # (rows, length, width)
            vectors[rows, :, own] = torch.where(matches[..., None], before + read if mode == "add" else read, before)
        return vectors


class _RowNames(threading.local):
    """Which packs each row of this thread's batches reads; None while all rows read the active ones."""

    # Set here, which runs once in each thread, and not in the class: compilers check the instance for the attribute.
    def __init__(self):
        self.names: tuple[tuple[str, ...], ...] | None = None

    def __reduce__(self):  # copies and pickles of a model run outside of any batch
        return _RowNames, ()


class PackStack:
    """The packs of a memory by name, and which of them are read, in which order."""

    def __init__(self):
        self.loaded: dict[str, KnowledgePack] = {}
        self.active: tuple[str, ...] = ()
        self.on_host: frozenset[str] = frozenset()
        self.rows = _RowNames()

    def load(self, pack: KnowledgePack, name: str, identity: Mapping, placement: str = "device") -> None:
        """Adds a pack and reads it after the others.

        Raises:
            `ValueError`: for a name in use, a pack of another memory, or another placement than "device" and "cpu".
        """
        if placement not in ("device", "cpu"):
            raise ValueError(f"placement {placement!r} of a pack must be 'device' or 'cpu'.")
        if name in self.loaded:
            raise ValueError(f"a memory named {name!r} is loaded already: unload it first, or give another name.")
        for key in FITS:
            made_for, here = pack.fits.get(key), identity[key]
            if made_for != here and not (key == "reader" and made_for is None):
                raise ValueError(
                    f"memory {name!r} was made for {_SAID[key]} {_short(made_for)}, and this model has {_short(here)}: "
                    "load it into the model that it was made with, or make it again for this one."
                )
        self.loaded = {**self.loaded, name: pack}
        self.active = (*self.active, name)
        self.on_host |= {name} if placement == "cpu" else set()

    def unload(self, name: str) -> KnowledgePack:
        """Removes a pack and returns it."""
        self._check([name])
        self.active = tuple(other for other in self.active if other != name)
        self.on_host -= {name}
        pack = self.loaded[name]
        self.loaded = {other: kept for other, kept in self.loaded.items() if other != name}
        return pack

    def choose(self, names: Sequence[str]) -> None:
        """Reads these packs, in this order."""
        if isinstance(names, str):
            raise TypeError(f"names are a list, such as [{names!r}], and not one text.")
        names = tuple(names)
        self._check(names)
        self.active = names

    @contextmanager
    def chosen_by_row(self, names: Sequence[str | Sequence[str] | None], batch: int):
        """Lets the rows of this thread's batches read these packs, and not the active ones, while the block runs.

        Args:
            names (`list`): for each row a name, names in their order, or None.
            batch (`int`): rows of the batch, before `generate` repeats them for beams.

        Raises:
            `ValueError`: for another number of names than rows, or a name that is not loaded.
        """
        if isinstance(names, str):
            raise TypeError(
                f"memory_names are a list with an entry for each row, such as [{names!r}], and not one text."
            )
        rows = tuple((row,) if isinstance(row, str) else tuple(row or ()) for row in names)
        if len(rows) != batch:
            raise ValueError(
                f"memory_names has {len(rows)} entries, and the batch has {batch} rows: give one for each."
            )
        for row in rows:
            self._check(row)
        before, self.rows.names = self.rows.names, rows
        try:
            yield
        finally:
            self.rows.names = before

    def find(self, classes: torch.Tensor) -> FoundRecords:
        """Returns what the packs that are read hold of n-grams `(N, batch, length)`."""
        if self.rows.names is None:
            return FoundRecords([self._read(name) for name in self.active], classes)
        batch, rows = classes.shape[1], self.rows.names
        if batch % len(rows):
            raise ValueError(
                f"memory_names was given for {len(rows)} rows, and a batch of {batch} is not made of them."
            )
        rows = [names for names in rows for _ in range(batch // len(rows))]  # beams of a row are beside each other
        reads = []
        for turn in zip_longest(*rows):  # every row keeps its own order
            for name in dict.fromkeys(turn):
                if name is not None:
                    reads.append(self._read(name, [row for row, own in enumerate(turn) if own == name]))
        return FoundRecords(reads, classes)

    def _read(self, name: str, rows: list[int] | None = None) -> PackRead:
        return PackRead(self.loaded[name], rows, name not in self.on_host)

    def conflicts(self) -> dict[tuple[int, ...], list[str]]:
        """Returns n-grams that several active packs hold, and the packs, in the order in which they are read."""
        holders: dict[tuple[int, ...], list[str]] = {}
        for name in self.active:
            for gram in self.loaded[name].ngrams():
                holders.setdefault(gram, []).append(name)
        return {gram: names for gram, names in holders.items() if len(names) > 1}

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.loaded:
                raise ValueError(f"no memory named {name!r} is loaded; loaded are {sorted(self.loaded)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"a memory is named twice in {list(names)}: each is read once.")


_SAID = {
    "token_map": "the token map",
    "classes": "token classes to the number of",
    "layers": "the Engram layers",
    "widths": "vectors by order of width",
    "reader": "the projections and norms with the digest",
}


def _short(value) -> str:
    """Returns a value as text, digests shortened."""
    return f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def pack_identity(config, layers: nn.ModuleDict) -> dict:
    """Returns what a pack must share with a memory: token map, layers, widths and a digest of the reader.

    The reader is what turns a vector into an addition to the stream (projections, norms, convolution). Its digest is
    taken in bfloat16, so that a model that was loaded in another type still has the reader that it was trained with.

    Raises:
        `ValueError`: if accelerate or FSDP keep the weights elsewhere.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(layers.state_dict().items()):
        if tensor.is_meta or hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"'{name}' of the memory is offloaded or sharded, so it cannot be compared with a pack: load packs "
                "before dispatching or sharding the model."
            )
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    width = config.engram_n_heads * config.engram_head_dim
    return {
        "token_map": config.engram_token_map_sha256,
        "classes": config.engram_compressed_vocab_size,
        "layers": list(config.engram_layer_ids),
        "widths": {str(order): width for order in range(2, config.engram_max_ngram_size + 1)},
        "reader": digest.hexdigest(),
    }


def _check_shapes(ngrams: Mapping, vectors: Mapping, fits: Mapping) -> None:
    """Raises ValueError if n-grams and vectors do not belong together, or to the memory."""
    orders, layers = {int(order): width for order, width in fits["widths"].items()}, list(fits["layers"])
    if set(ngrams) != set(orders) or sorted(vectors) != sorted(layers):
        raise ValueError(
            f"a pack of this memory needs n-grams of the orders {sorted(orders)} (none is a tensor of shape (0, n)) "
            f"and vectors for the layers {layers}; given are orders {sorted(ngrams)} and layers {sorted(vectors)}."
        )
    for order, width in orders.items():
        grams = ngrams[order]
        if grams.ndim != 2 or grams.shape[1] != order or grams.is_floating_point():
            raise ValueError(f"n-grams of order {order} have shape {tuple(grams.shape)}, type {grams.dtype}.")
        for layer in layers:
            rows = vectors[layer].get(order)
            if rows is None or tuple(rows.shape) != (len(grams), width) or not rows.is_floating_point():
                found = None if rows is None else tuple(rows.shape)
                raise ValueError(
                    f"vectors of layer {layer}, order {order} have shape {found}, needed is {(len(grams), width)}."
                )
            # One pass without a copy; the sum of finite numbers may overflow, so a second look decides.
            if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
                raise ValueError(f"vectors of layer {layer}, order {order} hold infinity or NaN.")


def _check_classes(order: int, ngrams: torch.Tensor, classes: int) -> None:
    """Raises ValueError for an n-gram that no text can hold."""
    if len(ngrams) and (int(ngrams.min()) < 0 or int(ngrams.max()) >= classes):
        outside = ((ngrams < 0) | (ngrams >= classes)).any(-1)
        raise ValueError(
            f"n-gram {ngrams[outside][0].tolist()} is not made of the memory's token classes 0 to {classes - 1}."
        )
