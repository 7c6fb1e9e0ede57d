"""Budgets: how many parameters that a token does not use go to experts and how many to a memory, and what that needs.

Promises: plain arithmetic over the numbers that are given, which are all shown, and advice that names where it comes
from. Never reads a file and never loads a model.
Source: Engram (arXiv 2601.07372), sections 3.1 and 4.1.
"""

import math
import re
from dataclasses import dataclass


# The share of spare parameters that the paper gives to experts: its best results lie between these.
SHARES = (0.75, 0.80)
# Its models use about one parameter in ten for a token.
SPARSITY = 10

ADVICE = (
    "The paper (arXiv 2601.07372, section 3.1) trained mixtures of experts of 5.7 and 9.9 billion parameters, a tenth "
    "of them used for a token, and gave 75 to 80 % of the spare ones to experts: 0.014 nats better than experts alone. "
    "Each point is one run, and neighbours differ by 0.002. It holds for training from scratch: for a graft, whose "
    "experts stay, take the memory's size from your data and your host memory.",
    "Parameters are counted as there, without token embedding and head.",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
PAGE = 4096  # bytes that a disk reads at least


@dataclass(frozen=True)
class Budget:
    """A split of the parameters that a token does not use.

    Args:
        total (`int`): parameters in all.
        active (`int`): parameters that a token uses.
        share (`float`): share of the others that experts get; the memory gets the rest.
        layers (`int`, *optional*, defaults to 2): layers that read the memory.
        n_heads (`int`, *optional*, defaults to 8): heads for each order.
        head_dim (`int`, *optional*, defaults to 80): values in a row.
        max_ngram_size (`int`, *optional*, defaults to 3): longest n-gram; orders are 2 to this.

    Raises:
        `ValueError`: if nothing is spare, or a number is out of range.

    Example:

    ```python
    >>> from engram_transformers.conversion import Budget

    >>> Budget(8 * 10**9, 10**9, share=0.75).rows_of_a_head
    683593
    ```"""

    total: int
    active: int
    share: float
    layers: int = 2
    n_heads: int = 8
    head_dim: int = 80
    max_ngram_size: int = 3

    def __post_init__(self):
        if not 0 < self.active < self.total:
            raise ValueError(
                f"a model of {self.total:,} parameters of which a token uses {self.active:,} has none to spare: the "
                "total must be larger than what is active. A dense model has nothing to split; a memory is added to it."
            )
        if not 0 <= self.share < 1:
            raise ValueError(f"rho {self.share} must be at least 0 and less than 1, such as 0.75: the rest is memory.")
        for name, least in {"layers": 1, "n_heads": 1, "head_dim": 1, "max_ngram_size": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small: it must be at least {least}.")
        if not self.rows_of_a_head:
            raise ValueError(
                f"{self.memory:,} parameters of memory are fewer than the {self.reads * self.head_dim:,} of a row in "
                "every head: give the memory more, or fewer layers, heads or values."
            )

    @property
    def spare(self) -> int:
        """Parameters that a token does not use."""
        return self.total - self.active

    @property
    def memory(self) -> int:
        """Parameters of the tables."""
        return self.spare - round(self.share * self.spare)

    @property
    def reads(self) -> int:
        """Rows that a token reads: one of each head."""
        return self.layers * (self.max_ngram_size - 1) * self.n_heads

    @property
    def rows_of_a_head(self) -> int:
        """The memory's `engram_vocab_size`."""
        return self.memory // (self.reads * self.head_dim)

    @property
    def row_bytes(self) -> dict[str, int]:
        """Bytes of a row by type; "float8_e4m3fn" has a scale of one byte for 32 values, as in DeepSeek-V4.1."""
        width = self.head_dim
        return {"float32": 4 * width, "bfloat16": 2 * width, "float8_e4m3fn": width + math.ceil(width / 32)}

    def experts_left(self, experts: int, active: int) -> int:
        """Returns how many of a mixture's routed experts remain, of which a token uses `active`."""
        if not 0 < active < experts:
            raise ValueError(
                f"{active} active experts of {experts} leave none to spare: give more experts than active."
            )
        return active + round(self.share * (experts - active))


def parse_parameters(text: str) -> int:
    """Returns a number of parameters such as "8B", "568M" or "1e9".

    Raises:
        `ValueError`: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is not a number of parameters: give one such as 8B or 568M.")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def budget_lines(budgets: list[Budget], tokens_per_second: float | None = None, experts=None, active_experts=None):
    """Returns budgets of one model as lines for people, each split in a column.

    Args:
        budgets (`list[Budget]`): they differ in `share` alone.
        tokens_per_second (`float`, *optional*): the decode speed that reads have to keep up with, all texts together.
        experts, active_experts (`int`, *optional*): routed experts of a layer, and how many of them a token uses.

    Raises:
        `ValueError`: if the speed is not positive, or one of the two numbers of experts is missing.
    """
    first = budgets[0]
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second={tokens_per_second} must be larger than 0.")
    if (experts is None) != (active_experts is None):
        raise ValueError("--experts and --active-experts belong together: give both, or neither.")
    rows = {
        "share of experts (rho)": [f"{budget.share:g}" for budget in budgets],
        "experts": [f"{budget.spare - budget.memory:,}" for budget in budgets],
        "memory": [f"{budget.memory:,}" for budget in budgets],
        "rows of a head": [f"{budget.rows_of_a_head:,}" for budget in budgets],
    }
    if experts is not None:
        rows[f"experts left of {experts}"] = [str(budget.experts_left(experts, active_experts)) for budget in budgets]
    for name, size in first.row_bytes.items():
        rows[f"host bytes, {name}"] = [f"{budget.rows_of_a_head * budget.reads * size:,}" for budget in budgets]
    lines = [
        f"{first.spare:,} of {first.total:,} parameters are not used for a token",
        *(f"{name:<28}" + "".join(f"{cell:>20}" for cell in cells) for name, cells in rows.items()),
        f"A token reads {first.reads} rows of {first.head_dim} values: "
        + ", ".join(f"{first.reads * size:,} bytes in {name}" for name, size in first.row_bytes.items())
        + ".",
    ]
    if tokens_per_second is not None:
        lines += _rates(first, tokens_per_second)
    if not SPARSITY / 2 <= first.total / first.active <= SPARSITY * 2:
        lines.append(
            f"Here one parameter in {first.total / first.active:.3g} is used, which the paper did not measure."
        )
    return [*lines, *ADVICE]


def _rates(budget: Budget, speed: float) -> list[str]:
    """Returns what reading for so many tokens a second takes."""
    reads = speed * budget.reads
    bus = (f"{reads * size / 1e6:,.3g} MB/s in {name}" for name, size in budget.row_bytes.items())
    return [
        f"At {speed:g} tokens a second the bus to the device (PCIe) carries {', '.join(bus)}.",
        f"A disk makes at most {reads:,.0f} reads a second, {reads * PAGE / 1e6:,.3g} MB/s in pages of {PAGE} bytes;",
        "rows that host memory has kept are not read again.",
    ]
