"""Sizes: the default number of rows of a fresh memory, and the bytes of its tables.

Promises: the default depends only on the backbone's shape, so that its addresses are the same whatever dtype it is
loaded in; it is written into the configuration as a number, and a checkpoint never depends on the rule. The size of
tables is logged before they are made. Never allocates anything.
Source: docs/design.md, "Grafting".
"""

import copy
from bisect import bisect_right
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_engram import EngramConfig
from ..hash_constants_engram import derive_constants
from ..rows_quantised_engram import row_bytes


logger = logging.get_logger(__name__)

# The default: bytes for each parameter of the backbone, as in bfloat16,
BYTES_FOR_A_PARAMETER = 2
# in whole thousands of rows a head, at least one thousand,
STEP = 1000
# and at most the rows of the measurements in docs/training.md: only very large corpora need more.
MOST_ROWS = 200_000

# Share of free memory that tables of the default size may take.
SHARE_OF_FREE = 0.5


def count_parameters(config: PreTrainedConfig, make: Callable[[PreTrainedConfig], PreTrainedModel]) -> int:
    """Counts the parameters of a backbone, tied ones once, without allocating them; the same for a quantised one.

    Args:
        config (`PreTrainedConfig`): the backbone's.
        make (callable): makes a model of a configuration.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(copy.deepcopy(config)).parameters())


def table_rows(config: EngramConfig) -> int:
    """Returns the rows of all tables."""
    return sum(map(sum, derive_constants(config, None).order_rows()))


def table_bytes(config: EngramConfig) -> int:
    """Returns the bytes of all tables."""
    return table_rows(config) * row_bytes(getattr(torch, config.engram_table_dtype), config.engram_head_dim)


def default_rows(config: EngramConfig, parameters: int) -> int:
    """Returns the default rows of a head (`engram_vocab_size`) for a backbone.

    All tables together take at most 2 bytes for each parameter of the backbone, as many as the backbone in bfloat16.
    The result is the largest multiple of 1,000 that does, at least 1,000 (10 MB with the default heads) and at most
    200,000 (2 GB). SmolLM2-135M gets 26,000, backbones of 1.1 billion parameters and more 200,000.

    Args:
        config ([`EngramConfig`]): layers, orders, heads, width and type of the rows.
        parameters (`int`): of the backbone.
    """

    sized = copy.copy(config)

    def bytes_with(rows: int) -> int:
        sized.engram_vocab_size = rows
        return table_bytes(sized)

    choices = range(STEP, MOST_ROWS + 1, STEP)
    fitting = bisect_right(choices, parameters * BYTES_FOR_A_PARAMETER, key=bytes_with)
    return choices[max(0, fitting - 1)]


def log_size(config: EngramConfig, free: int, where: str, parameters: int | None) -> None:
    """Logs the size of tables; refuses a default that takes more than half of the free bytes.

    Args:
        config ([`EngramConfig`]): the memory's.
        free (`int`): free bytes.
        where (`str`): of what, such as "memory".
        parameters (`int`, *optional*): of the backbone, if the size was derived from it.

    Raises:
        `ValueError`: if the size is derived and too large.
    """
    taken = table_bytes(config)
    rows = f"engram_vocab_size={config.engram_vocab_size}"
    if parameters is not None and taken > SHARE_OF_FREE * free:
        raise ValueError(
            f"the tables would take {taken:,} bytes, and of {where} {free:,} bytes are free: more than half of that "
            f"needs to be asked for. Give {rows} (rows of a head, derived from the backbone's {parameters:,} "
            "parameters) or a smaller number, engram_table_dtype='bfloat16', or fewer layers."
        )
    whence = "as given" if parameters is None else f"derived from the backbone's {parameters:,} parameters"
    # A warning, because the default verbosity hides the rest, and tables may be large.
    logger.warning(
        f"Engram memory: {table_rows(config):,} rows, {taken:,} bytes of {where} ({free:,} are free); {rows}, {whence}."
    )
