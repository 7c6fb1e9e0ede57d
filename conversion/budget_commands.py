"""The verb `engram budget`: a split between experts and memory for a model that is to be trained.

Promises: the result on stdout, and with it where the advice comes from.
Source: docs/grafting.md, "Budgets".
"""

from typing import Annotated

import typer

from .budget import SHARES, Budget, budget_lines, parse_parameters
from .terminal import user_errors


@user_errors
def budget(
    total: Annotated[str, typer.Option(help="Parameters in all, such as 8B, without token embedding and head.")],
    active: Annotated[str, typer.Option(help="Parameters that a token uses, such as 1B.")],
    rho: Annotated[
        float | None, typer.Option(help="Share of the others that experts get; 0.75 and 0.8 if left out.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts of a layer, if all were experts.")] = None,
    active_experts: Annotated[int | None, typer.Option(help="Routed experts that a token uses.")] = None,
    layers: Annotated[int, typer.Option(help="How many layers read the memory.")] = 2,
    n_heads: Annotated[int, typer.Option(help="Heads for each order.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Values in a row.")] = 80,
    max_ngram_size: Annotated[int, typer.Option(help="Longest n-gram.")] = 3,
    tokens_per_second: Annotated[float | None, typer.Option(help="Decode speed of all texts together.")] = None,
) -> None:
    """Split the parameters that a token does not use between experts and a memory, as the paper does.

    Example: engram budget --total 8B --active 1B --tokens-per-second 50
    """
    sizes = {"layers": layers, "n_heads": n_heads, "head_dim": head_dim, "max_ngram_size": max_ngram_size}
    spent = parse_parameters(total), parse_parameters(active)
    budgets = [Budget(*spent, share, **sizes) for share in (SHARES if rho is None else (rho,))]
    for line in budget_lines(budgets, tokens_per_second, experts, active_experts):
        print(line)
