"""Transplants: a graft begins with the table of another memory.

What it chooses: sizes that are not given are those of the other memory. If token map and hash constants are equal, its
rows are copied as they are; else they are re-addressed over a text, which both tokenizers read. The reader
(projections, norms, convolution) is fresh, because it belongs to the backbone that it was trained with; it is taken
over on request, where its shapes fit.
Promises: what cannot be transplanted is refused before anything is written. Never changes the other checkpoint.
Source: docs/surgery.md.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.utils import logging

from ..configuration import EngramConfig
from ..files_atomic_engram import CONFIG_NAME
from ..hash_constants_engram import derive_constants
from ..hash_ngrams_engram import NgramHasher
from ..memory_engram import EngramMemory
from .backbone import FreshMemory
from .donor import DonorRead
from .new_checkpoint import NewTensors, pieces
from .readdress import TextNgrams, readdress, text_blocks
from .source_checkpoint import LAYERS_PREFIX, SourceCheckpoint


logger = logging.get_logger(__name__)

# Fields that a graft takes from the other memory if they are not given.
SIZES = (
    "engram_vocab_size",
    "engram_max_ngram_size",
    "engram_n_heads",
    "engram_head_dim",
    "engram_seed",
    "engram_kernel_size",
    "engram_gate",
    "engram_projection_bias",
    "engram_norm_eps",
    "engram_conv_norm_eps",
    "engram_table_dtype",
    "engram_hash_scheme",
)
# Token ids, which mean the same only with the same token map.
TOKENS = ("engram_pad_token_id", "engram_reset_token_ids")


def transplant(folder: str | os.PathLike | None, text: str | os.PathLike | None, reader: bool) -> "Transplant | None":
    """Returns the memory that a graft begins with, from the arguments of [`graft`]; None if there is none.

    Raises:
        `ValueError`: for a reader without a memory.
    """
    if folder is not None:
        return Transplant(folder, None if text is None else text_blocks(text), reader)
    if reader:
        raise ValueError("init_reader is about the memory that init_from names: name it as well.")
    return None


class Transplant:
    """The memory that a graft begins with.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint, or a memory that `extract_memory` wrote.
        texts (iterable of `str`, *optional*): for re-addressing.
        reader (`bool`, *optional*, defaults to `False`): whether to take its reader too.
    """

    def __init__(self, folder: str | os.PathLike, texts: Iterable[str] | None = None, reader: bool = False):
        self.source, self.texts, self.reader = SourceCheckpoint(folder), texts, reader
        self.report: str | None = None

    def fresh_memory(self, donor: DonorRead, layer_ids: list[int] | None, fields: dict) -> FreshMemory:
        """Works out the memory of a graft, as `DonorRead.fresh_memory`, and checks that it can take the rows.

        Args:
            donor ([`DonorRead`]): the donor.
            layer_ids (`list[int]`, *optional*): layers that read; the other memory's if None.
            fields (`dict`): fields of [`EngramConfig`] that are given.

        Raises:
            `ValueError`: if rows have another width, there are other orders or another number of layers, if rows need a
                text and none is given, or if the reader is wanted and has other shapes.
        """
        sizes = {name: getattr(self.source.config, name) for name in SIZES}
        made = donor.fresh_memory(layer_ids or self.source.config.engram_layer_ids, **sizes | fields)
        self._check_rows(made.config)
        if self.reader:
            self._check_reader(made.config)
        self._find_rows(made, fields, donor.tokenizer)
        return made

    def _check_rows(self, config: EngramConfig) -> None:
        """Raises ValueError if rows, orders or layers do not correspond."""
        theirs = self.source.config
        for name in ("engram_max_ngram_size", "engram_head_dim"):
            if getattr(config, name) != getattr(theirs, name):
                raise ValueError(
                    f"{name}={getattr(config, name)}, and the rows of '{self.source.folder}' were trained with "
                    f"{getattr(theirs, name)}: leave it out, or give the same."
                )
        if len(config.engram_layer_ids) != len(theirs.engram_layer_ids):
            raise ValueError(
                f"engram_layer_ids={config.engram_layer_ids} are {len(config.engram_layer_ids)} layers, and "
                f"'{self.source.folder}' has tables for {len(theirs.engram_layer_ids)} "
                f"({theirs.engram_layer_ids}): name as many."
            )

    def _find_rows(self, made: FreshMemory, fields: dict, tokenizer) -> None:
        """Decides whether rows stay where they are; completes the configuration by the other memory's token ids."""
        config, theirs = made.config, self.source.config
        same_tokens = config.engram_token_map_sha256 == theirs.engram_token_map_sha256
        for name in TOKENS if same_tokens else ():
            if fields.get(name) is None:
                setattr(config, name, getattr(theirs, name))
        constants = derive_constants(config, made.token_map)
        self.as_they_are = same_tokens and constants.sha256() == self.source.hasher.constants.sha256()
        self.layout = NgramHasher(config.engram_layer_ids, made.token_map, constants)
        if self.as_they_are:
            return
        if self.texts is None:
            what = "the sizes or the seed" if same_tokens else "the token map"
            raise ValueError(
                f"{what} of this graft differ from those of '{self.source.folder}', so its rows lie elsewhere: give a "
                "text of what it has learned (init_text, --init-text), over which they are re-addressed, or leave out "
                "the sizes that you gave."
            )
        # One tokenizer reads the text once, and then it need not say where its tokens are.
        old = tokenizer if same_tokens else self.source.tokenizer()
        self.ngrams = TextNgrams(self.texts, self.source.hasher, self.layout, old, tokenizer)

    def input_files(self) -> list[Path]:
        """Returns the files of the other memory that are read."""
        weights = sorted({self.source.folder / file_name for file_name in self.source.weight_map.values()})
        return [self.source.folder / CONFIG_NAME, *weights]

    def fill(self, draft: Path) -> None:
        """Writes the rows, and if wanted the reader, into a graft's draft.

        Raises:
            `ValueError`: if no n-gram of the text was found.
        """
        new = NewTensors(draft)
        for name, tensor in self._renamed_reader(self.layout.layer_ids).items() if self.reader else ():
            new.overwrite(name, tensor)
        if not self.as_they_are:
            self.report = str(readdress(self.source, self.layout, self.ngrams, new, draft))
            logger.warning(f"{self.report}.")
            return
        for layer in self.source.config.engram_layer_ids:
            for order in self.source.config.engram_orders:
                begin = 0
                for part in self.source.order_parts(layer, order):
                    for first, rows in pieces(part):
                        same = new.table_dtype == getattr(torch, self.source.config.engram_table_dtype)
                        new.write_order(layer, order, rows if same else self.source.values(rows), begin + first)
                    begin += len(part)

    def told(self) -> dict:
        """Returns what a receipt says of it."""
        how = self.report or "its rows as they are"
        return {"init_from": {"memory": self.source.folder.resolve().name, "rows": how, "reader": self.reader}}

    def _renamed_reader(self, layer_ids: list[int]) -> dict[str, torch.Tensor]:
        """Returns the other memory's reader by the names that it has in the graft."""
        found = {}
        for theirs, ours in zip(self.source.config.engram_layer_ids, layer_ids, strict=True):
            prefix = f"{LAYERS_PREFIX}{theirs}."
            for name in self.source.names(prefix):
                found[f"{LAYERS_PREFIX}{ours}.{name.removeprefix(prefix)}"] = self.source.tensor(name)
        return found

    def _check_reader(self, config: EngramConfig) -> None:
        """Raises ValueError if the other memory's reader has other shapes than the graft's."""
        with torch.device("meta"):
            fresh = EngramMemory(config, hold_tables=False).layers.state_dict()
        ours = {f"{LAYERS_PREFIX}{name}": tensor.shape for name, tensor in fresh.items()}
        if {name: tensor.shape for name, tensor in self._renamed_reader(config.engram_layer_ids).items()} != ours:
            raise ValueError(
                f"the reader of '{self.source.folder}' has other shapes than this graft's (another backbone, number of "
                "heads or kernel size): leave out init_reader (--init-reader), and train the fresh one with "
                'model.set_trainable("reader").'
            )
