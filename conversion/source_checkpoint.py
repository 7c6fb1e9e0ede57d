"""A checkpoint that another one is made from: checked, then read tensor by tensor through mapped files.

Promises: headers, shapes, hash constants and token map are checked before anything is read; tables of any size take
no memory but the page cache. Never loads a model, and never writes.
Source: docs/surgery.md.
"""

import mmap
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..configuration import EngramConfig
from ..files_atomic_engram import CONFIG_NAME, checkpoint_in
from ..files_checkpoint_engram import expected_shards
from ..files_safetensors_engram import check_folder
from ..hash_tokens_engram import check_token_map
from ..inspection.verify import stored_hashing
from ..memory_engram import MEMORY_PREFIX
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_quantised_engram import vectors_of
from ..rows_storage_engram import CheckpointTables, ShardFile


LAYERS_PREFIX = f"{MEMORY_PREFIX}layers."
_BACKBONE_PREFIX = "backbone."


class SourceCheckpoint:
    """A whole Engram checkpoint in a folder, or a memory that `extract_memory` wrote.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Raises:
        `FileNotFoundError`: if there is no checkpoint, or a file is missing.
        `ValueError`: if it holds no memory, or only what training changed in another checkpoint.
        [`EngramFormatError`]: if a file is damaged or of another memory.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"'{folder}' has no {CONFIG_NAME}: name the folder of an Engram checkpoint. One on the Hub has to be "
                "downloaded first, with `hf download`."
            )
        self.config = EngramConfig.from_pretrained(self.folder)
        if checkpoint_in(self.folder) == "delta":
            raise ValueError(
                f"'{folder}' holds only what training changed in another checkpoint: load it with from_pretrained, "
                "save it with save_pretrained into a new folder, and name that."
            )
        check_folder(self.folder, expected_shards(self.config))
        self.hasher = stored_hashing(self.folder, self.config)
        self.hasher.check(self.config)
        self.files = CheckpointTables(self.folder)
        self._maps: dict[ShardFile, mmap.mmap] = {}
        self._refuse_mixed_files()

    def _refuse_mixed_files(self) -> None:
        """Raises ValueError for a file with tables and other weights, which no save of this package writes."""
        tables = {file for name, file in self.weight_map.items() if name.startswith(TABLES_PREFIX)}
        for name, file in self.weight_map.items():
            if file in tables and not name.startswith(TABLES_PREFIX):
                raise ValueError(
                    f"'{self.folder / file}' holds tables and '{name}': load the checkpoint, save it with "
                    "save_pretrained, which separates them, and name that folder."
                )

    @property
    def weight_map(self) -> dict[str, str]:
        """File name of every tensor."""
        return self.files.weight_map

    def names(self, prefix: str) -> list[str]:
        """Returns the tensors whose names begin so, in the order of the index."""
        return [name for name in self.weight_map if name.startswith(prefix)]

    def backbone(self) -> dict[str, str]:
        """Returns the names of the backbone's tensors in this checkpoint, by their names in the backbone."""
        names = [name for name in self.weight_map if not name.startswith(MEMORY_PREFIX)]
        return {name.removeprefix(_BACKBONE_PREFIX): name for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor on its mapped file; only read it."""
        part = self.files.part(name)
        if part.file not in self._maps:
            self._maps[part.file] = part.file.map()
        return part.within(self._maps[part.file])

    def order_parts(self, layer: int, order: int) -> list[torch.Tensor]:
        """Returns the parts `(rows, width)` of an order's table, mapped."""
        parts = range(self.config.engram_table_parts)
        return [self.tensor(f"{TABLES_PREFIX}{layer}.order{order}.{part}") for part in parts]

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the values of rows `(..., stored width)` of a table: `(..., width)`; quantised ones in float32."""
        return vectors_of(rows, getattr(torch, self.config.engram_table_dtype), self.config.engram_head_dim)

    def tokenizer(self):
        """Loads the checkpoint's own tokenizer.

        Raises:
            `ValueError`: if there is none, or it gives another token map.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
            raise ValueError(f"'{self.folder}' holds no tokenizer that can be read: {error}") from error
        config = self.config
        check_token_map(self.hasher.token_map, tokenizer, config.engram_compressed_vocab_size, config.placeholder_ids)
        return tokenizer
