"""Plans: what a graft would read, write and need, before any weight is downloaded or written.

Promises: computed from configuration and tokenizer by the code that grafts, so that a donor or size which a graft
refuses is refused here. Never reads or downloads weights.
Source: docs/grafting.md.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ..configuration import EngramConfig
from ..modeling_engram import EngramForCausalLM
from .donor import donor_folder, donor_weight_files, read_donor
from .graft import check_start, checked_start, existing, fresh_memory_of
from .initial_tables import Init
from .sizes import count_parameters, table_bytes, table_rows
from .transplant import transplant


@dataclass
class GraftPlan:
    """What a graft would be.

    Args:
        donor (`str`): folder or Hub id.
        model_type (`str`): of the model that is grafted.
        parameters (`int`): of the donor.
        donor_bytes (`int`): of its weights: of the files if they are here, else in the donor's dtype.
        config ([`EngramConfig`]): of the graft.
        rows (`int`): of all tables.
        table_bytes (`int`): of all tables; they take no disk until they are trained.
        dense_bytes (`int`): of the memory's other weights.
        start ([`Init`]): what the tables start from.
        init_from (`str`, *optional*): the memory whose rows they start from.
        free_disk (`int`): bytes, where the graft would be written.
        free_memory (`int`): bytes of host memory.
    """

    donor: str
    model_type: str
    parameters: int
    donor_bytes: int
    config: EngramConfig = field(repr=False)
    rows: int
    table_bytes: int
    dense_bytes: int
    start: Init
    init_from: str | None
    free_disk: int
    free_memory: int

    @property
    def memory_share(self) -> float:
        """Share of all parameters that is memory."""
        memory = self.rows * self.config.engram_head_dim + self.dense_bytes // self.config.dtype.itemsize
        return memory / (memory + self.parameters)

    @property
    def warnings(self) -> list[str]:
        """What should be considered before the graft is made."""
        found = []
        if self.table_bytes > self.donor_bytes:
            found.append(f"the tables are larger than the donor ({self.donor_bytes:,} bytes).")
        places = {
            'memory, so they cannot be trained on "device" or "cpu"': self.free_memory,
            f"disk, so they cannot be {'saved once they are trained' if self.zero else 'written'}": self.free_disk,
        }
        for place, free in places.items():
            if self.table_bytes > free:
                found.append(f"the tables do not fit into the {free:,} bytes of free {place}.")
        return found

    @property
    def zero(self) -> bool:
        """Whether the tables start as zeros."""
        return self.start.kind == "zero" and self.init_from is None

    def lines(self) -> list[str]:
        """Returns the plan as lines for people."""
        config, running = self.config, self.donor_bytes + self.dense_bytes
        heads = f"{config.engram_n_heads} heads of {config.engram_vocab_size} rows or more"
        depth = config.text_config.num_hidden_layers
        text = "" if self.start.text is None else f" and {self.start.text}"
        writes = f"{running:,} bytes; tables of zeros take no disk until they are trained"
        if not self.zero:
            writes = f"{'up to ' if text else ''}{running + self.table_bytes:,} bytes, tables included"
        told = {
            "donor": f"{self.donor}: {self.model_type}, {self.parameters:,} parameters, {self.donor_bytes:,} bytes",
            "layers": f"{', '.join(map(str, config.engram_layer_ids))} of {depth}, counted from 0",
            "tables": f"orders {', '.join(map(str, config.engram_orders))}, {heads}",
            "": f"{self.rows:,} rows of {config.engram_head_dim} values in {config.engram_table_dtype}, "
            f"{self.table_bytes:,} bytes",
            "other weights": f"{self.dense_bytes:,} bytes of projections, norms and convolution",
            "share": f"{self.memory_share:.1%} of all parameters are memory",
            "starts as": "the donor, because tables are zeros"
            if self.zero
            else f"the donor nearly, not exactly: its tables are not zeros (init: {self.init_from or self.start.kind})",
            "a graft reads": f"{self.donor_bytes:,} bytes{text}",
            "and writes": writes,
            "runs with": f'{running + self.table_bytes:,} bytes on the device; placed on "cpu", {running:,} there and '
            f'{self.table_bytes:,} on the host; on "disk", rows alone are read',
        }
        lines = [f"{name:<14}{text}" for name, text in told.items()]
        return lines + [f"{'warning:':<14}{text}" for text in self.warnings]


def plan_graft(
    donor: str | os.PathLike,
    engram_layer_ids: list[int] | None = None,
    *,
    out: str | os.PathLike = ".",
    tokenizer: str | os.PathLike | None = None,
    text_only: bool | None = None,
    init: str = "zero",
    init_text: str | os.PathLike | None = None,
    init_std: float | None = None,
    init_from: str | os.PathLike | None = None,
    init_reader: bool = False,
    max_memory_shard_size: int | str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike | None = None,
    **engram_fields,
) -> GraftPlan:
    """Works out what [`graft`] would do with the same arguments; nothing is written but the Hub's cache.

    `max_memory_shard_size` changes nothing in a plan.

    Example:

    ```python
    >>> from engram_transformers.conversion import plan_graft

    >>> print(*plan_graft("runs/donor", [1, 10], engram_vocab_size=200_000).lines(), sep="\\n")
    ```"""
    start = checked_start(init, init_text, init_std, init_from)
    hub = {"token": token, "cache_dir": cache_dir}
    folder = donor_folder(donor, subfolder, revision=revision, weights=False, **hub)
    read = read_donor(folder, tokenizer, text_only, trust_remote_code, **hub)
    other = transplant(init_from, None if start.text else init_text, init_reader)
    made = fresh_memory_of(read, other, engram_layer_ids, engram_fields)
    check_start(made.config, start)
    config = made.config
    parameters = count_parameters(read.config, read.make) if made.parameters is None else made.parameters
    config.dtype = config.dtype or torch.float32
    files = donor_weight_files(folder)
    here = sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else 0
    with torch.device("meta"):
        layers = EngramForCausalLM.class_for(config)(config, hold_tables=False).memory.layers
    return GraftPlan(
        donor=os.fspath(donor),
        model_type=config.whole_config.model_type,
        parameters=parameters,
        donor_bytes=here or parameters * config.dtype.itemsize,
        config=config,
        rows=table_rows(config),
        table_bytes=table_bytes(config),
        dense_bytes=sum(weight.numel() for weight in layers.parameters()) * config.dtype.itemsize,
        start=start,
        init_from=None if init_from is None else os.fspath(init_from),
        free_disk=shutil.disk_usage(existing(Path(out))).free,
        free_memory=psutil.virtual_memory().available,
    )
