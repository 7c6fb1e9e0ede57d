"""Layouts of foreign memories: what they name their tensors, and where each of them lies in a memory of ours.

A layout is a weight map that can be read by eye: the foreign name, its shape, and its place here; None for what is
dropped on purpose.
Promises: every foreign tensor is checked by its header (name, shape, type, length of the file), and those of constants
by their values, before anything is written. A name that the map lacks is refused. Never reads a weight.
Source: docs/foreign.md; docs/format.md.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration import EngramConfig, EngramFormatError
from ..files_safetensors_engram import DTYPE_NAMES, TensorEntry, read_header, start_of_data
from ..hash_constants_engram import HashConstants


@dataclass(frozen=True)
class Part:
    """Rows of a dense tensor of the memory's layer, from row `first` on, in another shape.

    Args:
        shape (`tuple`): the foreign tensor's.
        name (`str`): the memory's tensor, below `memory.layers.{layer}.`.
        first (`int`, *optional*, defaults to 0): its row where the foreign tensor begins.
        turned (`bool`, *optional*, defaults to `False`): whether the foreign tensor is the transpose.
        dtype (`str`, *optional*): its type, if the layout has one; else it has that of the memory's tensor.
    """

    shape: tuple[int, ...]
    name: str
    first: int = 0
    turned: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Float8Blocks(Part):
    """As [`Part`], in float8_e4m3fn with one power of two for each 32 x 32 values, in the tensor `scale`."""

    dtype: str = "F8_E4M3"
    scale: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows of the layer's table, from row `first` of the layer on: all of their bytes, or those from `column` on."""

    shape: tuple[int, int]
    first: int = 0
    column: int = 0
    dtype: str | None = None


@dataclass(frozen=True)
class Constant:
    """Hash constants, which must be those that the configuration gives."""

    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Kept:
    """Bytes without a place in a memory, kept beside it for an export."""

    shape: tuple[int, ...]
    dtype: str


FLOATS = ("F32", "BF16", "F16")
SIZES = {"F8_E4M3": 1, "F8_E8M0": 1, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}

WeightMap = dict[str, Part | Rows | Constant | Kept | None]


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a safetensors file: the file, its entry in the header, and its first byte in the file."""

    path: Path
    entry: TensorEntry
    begin: int


@dataclass
class ForeignMemory:
    """What a folder of a layout holds, but for the weights.

    Args:
        layer_ids (`list[int]`): layers that read, counted from 0, in the order of their constants.
        fields (`dict`): fields of [`EngramConfig`] that the foreign configuration gives.
        backbone (`dict`): values that the grafted configuration must have.
        numbers (`dict`): what only the layout knows; an export gets it back.
        rows (`list[int]`, *optional*): rows of each layer's table, where the foreign configuration says them.
    """

    layer_ids: list[int]
    fields: dict[str, Any]
    backbone: dict[str, int]
    numbers: dict[str, Any] = field(default_factory=dict)
    rows: list[int] | None = None


@dataclass(frozen=True)
class Layout:
    """A foreign layout.

    Args:
        name (`str`): as the command line names it.
        inside (`str`): what stands between a layer's number and the tensor's name.
        fixed (`dict`): fields of [`EngramConfig`] that every memory of the layout has.
        read (`Callable`): from `config.json` and tensors by layer and name to a [`ForeignMemory`].
        weight_map (`Callable`): from the configuration, the number of a layer among them, and the layout's numbers to
            the [`WeightMap`] of that layer.
        write (`Callable`): from the configuration and the layout's numbers to what `config.json` says.
        numbers (`dict`, *optional*): the layout's numbers for a memory that was not imported.
    """

    name: str
    inside: str
    fixed: Mapping[str, Any]
    read: Callable[[dict, dict[int, dict[str, ForeignTensor]]], ForeignMemory]
    weight_map: Callable[[EngramConfig, int, dict], WeightMap]
    write: Callable[[EngramConfig, dict], dict]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, folder: Path) -> tuple[str, dict[int, dict[str, ForeignTensor]]]:
        """Finds the layout's tensors in a folder; returns what their names begin with, and them by layer and name.

        Raises:
            `FileNotFoundError`: if the folder has no safetensors files.
            [`EngramFormatError`]: if a file is damaged, or none of them holds such a tensor, or one is there twice.
        """
        pattern = re.compile(rf"(.*\.|)layers\.(\d+)\.{self.inside}\.(.+)")
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"'{folder}' has no .safetensors files: give the folder of the weights. A pickle (.pt, .bin) is not "
                "read; docs/foreign.md shows how its tensors are saved."
            )
        found: dict[int, dict[str, ForeignTensor]] = {}
        prefixes = set()
        for path in paths:
            start = start_of_data(path) if (header := read_header(path)) else 0
            for name, entry in header.items():
                if (match := pattern.fullmatch(name)) is None:
                    continue  # the backbone's
                prefixes.add(match[1])
                layer = found.setdefault(int(match[2]), {})
                if match[3] in layer:
                    raise EngramFormatError(f"'{path}' and '{layer[match[3]].path}' both hold '{name}': keep one.")
                layer[match[3]] = ForeignTensor(path, entry, start + entry.begin)
        if len(prefixes) != 1:
            what = "no tensor" if not prefixes else f"tensors below {sorted(prefixes)}"
            raise EngramFormatError(
                f"'{folder}' holds {what} of a memory of the layout {self.name}: their names must be "
                f"'layers.LAYER.{self.inside}.NAME', below one prefix."
            )
        return prefixes.pop(), found

    def check(
        self,
        config: EngramConfig,
        constants: HashConstants,
        tensors: Mapping[int, Mapping[str, ForeignTensor]],
        numbers: dict,
    ) -> None:
        """Checks every foreign tensor against the weight map of its layer.

        Raises:
            [`EngramFormatError`]: naming the first tensor that is missing, unknown, misshapen or of other constants.
        """
        if set(tensors) != set(config.engram_layer_ids):
            raise EngramFormatError(
                f"the files hold a memory in the layers {sorted(tensors)}, config.json names "
                f"{sorted(config.engram_layer_ids)} (counted from 0): give the config.json and all files of one model."
            )
        for number, layer in enumerate(config.engram_layer_ids):
            weights, where = self.weight_map(config, number, numbers), f"layers.{layer}.{self.inside}."
            for name in sorted(set(tensors[layer]) - set(weights)):
                raise EngramFormatError(
                    f"'{where}{name}' is unknown to the layout {self.name}, whose names are "
                    f"{', '.join(sorted(weights)[:8])}, ...: nothing is dropped unless the weight map says so."
                )
            dense: dict[str, str] = {}
            for name, place in weights.items():
                if place is None or (isinstance(place, Constant) and name in numbers["not_stored"]):
                    continue
                if name not in tensors[layer]:
                    raise EngramFormatError(f"'{where}{name}' is missing: give all files of the memory.")
                _check_tensor(where + name, tensors[layer][name], place, config)
                if isinstance(place, Constant):
                    _check_constant(where + name, tensors[layer][name], constant_of(constants, place.name, number))
                elif isinstance(place, Part):
                    dense[name] = "BF16" if isinstance(place, Float8Blocks) else tensors[layer][name].entry.dtype
            if len(set(dense.values())) > 1:
                raise EngramFormatError(f"the tensors below '{where}' have several types, and need one: {dense}.")


def read_config(folder: Path) -> dict:
    """Reads the `config.json` of a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' has no config.json, which says how the memory hashes: put it there.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngramFormatError(f"'{path}' is not JSON ({error}): copy it again.") from error
    if not isinstance(told, dict):
        raise EngramFormatError(f"'{path}' must hold an object of names and values.")
    return told


def needed(told: Mapping, names: Iterable[str], layout: str) -> list:
    """Returns values of a configuration by their names; refuses it if one is missing."""
    if not isinstance(told, Mapping):
        raise EngramFormatError(f"config.json holds {told!r} in the place of names and values: copy it again.")
    missing = [name for name in names if told.get(name) is None]
    if missing:
        raise EngramFormatError(
            f"config.json lacks {', '.join(missing)}, which a memory of the layout {layout} needs: "
            "give the configuration that the memory was trained with (docs/foreign.md)."
        )
    return [told[name] for name in names]


def table_dtype(tensors: Mapping[int, Mapping[str, ForeignTensor]], name: str) -> str:
    """Returns `engram_table_dtype` for a tensor of rows; what is missing or of another type is refused later."""
    known = {entry: str(dtype).removeprefix("torch.") for dtype, entry in DTYPE_NAMES.items() if entry in FLOATS}
    found = next((layer[name].entry.dtype for layer in tensors.values() if name in layer), "F32")
    return known.get(found, "float32")


def constant_of(constants: HashConstants, name: str, number: int) -> torch.Tensor:
    """Returns constants of the layer with this number among them, flat."""
    return constants.named()[name][number].flatten()  # (values,)


def read_tensor(tensor: ForeignTensor) -> torch.Tensor:
    """Reads a tensor; float8 as bytes."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    dtype = dtypes.get(tensor.entry.dtype, torch.uint8)
    data = bytearray(tensor.entry.end - tensor.entry.begin)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.begin)
        file.readinto(data)
    return torch.frombuffer(data, dtype=dtype).view(tensor.entry.shape)


def _check_tensor(name: str, tensor: ForeignTensor, place, config: EngramConfig) -> None:
    """Checks shape and type of a foreign tensor."""
    shape, dtype = tensor.entry.shape, tensor.entry.dtype
    if shape != place.shape:
        raise EngramFormatError(
            f"'{name}' has the shape {list(shape)}, and config.json and the backbone ask for {list(place.shape)}: "
            "the memory needs a backbone of its own width and number of residual streams, and its own config.json."
        )
    if isinstance(place, Constant):
        wanted = ["I64"]
    elif isinstance(place, Part):
        wanted = FLOATS if place.dtype is None else [place.dtype]
    else:
        wanted = [place.dtype or DTYPE_NAMES[getattr(torch, config.engram_table_dtype)]]
    if dtype not in wanted or tensor.entry.end - tensor.entry.begin != math.prod(shape) * SIZES[dtype]:
        raise EngramFormatError(f"'{name}' is of type {dtype}, and the layout has {' or '.join(wanted)}.")


def _check_constant(name: str, tensor: ForeignTensor, own: torch.Tensor) -> None:
    """Checks stored hash constants against those that the configuration gives."""
    stored = read_tensor(tensor).flatten()  # (values,)
    if not torch.equal(stored, own):
        raise EngramFormatError(
            f"'{name}' begins with {stored[:3].tolist()}, and config.json and the backbone's tokenizer give "
            f"{own[:3].tolist()}: rows would be read at wrong addresses. Give the config.json that belongs to the "
            "weights, and a backbone with the tokenizer that the memory was trained with."
        )
