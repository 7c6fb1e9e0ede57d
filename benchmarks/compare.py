"""Comparisons on a noisy machine: every way runs once in every round, and ratios are taken inside a round.

Promises: a ratio compares two measurements of one round, so what slows the machine for minutes slows both; the order
of the ways moves on by one in every round, so none is always first. Never asserts anything about a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np


# A median and quartiles of fewer rounds say nothing; a time limit never cuts below this.
LEAST_ROUNDS = 3

# What a way returns: a number, or the parts of one as they are measured.
Measured = float | Iterator[float]


def interleave(
    ways: Mapping[str, Callable[[], Measured]], rounds: int, warm_up: int = 1, limit_s: float = math.inf
) -> dict[str, list[float]]:
    """Runs all ways round by round (A B C, B C A, ...).

    A way that yields the parts of its round one by one takes turns with the others after every part: what slows the
    machine for less than a round then slows all of them too. Rounds to warm up do not count, and no round starts after
    `limit_s` seconds once there are `LEAST_ROUNDS`. Returns one number of each way for each round.
    """
    measured: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.monotonic()
    for number in range(warm_up + rounds):
        counted = number - warm_up
        if counted >= min(LEAST_ROUNDS, rounds) and time.monotonic() - begun > limit_s:
            break
        for name, value in one_round(ways, number).items():
            if counted >= 0:
                measured[name].append(value)
    return measured


def one_round(ways: Mapping[str, Callable[[], Measured]], number: int) -> dict[str, float]:
    """Every way once, the one at index `number` first."""
    totals, in_parts = {}, {}
    for name in [*ways][number % len(ways) :] + [*ways][: number % len(ways)]:
        value = ways[name]()
        if isinstance(value, Iterator):
            totals[name], in_parts[name] = 0.0, value
        else:
            totals[name] = value
    while in_parts:
        number += 1
        for name in [*in_parts][number % len(in_parts) :] + [*in_parts][: number % len(in_parts)]:
            part = next(in_parts[name], None)
            if part is None:
                del in_parts[name]
            else:
                totals[name] += part
    return totals


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 6) -> dict[str, float | int]:
    """Median, quartiles, extremes and number of values, rounded to significant digits."""
    if not values:
        raise ValueError("a median needs at least one value, and no round was run.")
    shares = {"median": 0.5, "q1": 0.25, "q3": 0.75, "min": 0.0, "max": 1.0}
    found = {name: float(f"{np.quantile(values, share):.{digits}g}") for name, share in shares.items()}
    return found | {"rounds": len(values)}


def ratios(upper: list[float], lower: list[float]) -> list[float]:
    """Round by round `upper / lower`; both must have been measured in the same rounds."""
    return [one / other for one, other in zip(upper, lower, strict=True)]


def speeds(seconds: Mapping[str, list[float]], against: str, amount: float) -> dict[str, dict]:
    """For each way the spread of `amount` a second, of the seconds, and of its speed as a share of `against`'s."""
    return {
        name: {
            "per_second": spread([amount / value for value in values]),
            "seconds": spread(values),
            "speed_ratio": spread(ratios(seconds[against], values)),
        }
        for name, values in seconds.items()
    }
