"""From the budgets of many samples to one list of shares: average, renormalise, and ask whether samples agree."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

from kvcache.budget import fill
from vlmeff.errors import ConfigError, DataError

LARGEST_CHANGE = 0.01
UNSTABLE_ABOVE = 0.03


def mean_shares(samples: Sequence[Sequence[float]]) -> list[float]:
    """[samples][L] -> [L]: the mean over the samples."""
    return [sum(column) / len(samples) for column in zip(*samples, strict=True)]


def std_shares(samples: Sequence[Sequence[float]]) -> list[float]:
    """[samples][L] -> [L]: the standard deviation over the samples (divided by their number)."""
    means = mean_shares(samples)
    return [
        (sum((x - mean) ** 2 for x in column) / len(samples)) ** 0.5
        for column, mean in zip(zip(*samples, strict=True), means, strict=True)
    ]


def renormalise(shares: Sequence[float], keep_ratio: float) -> list[float]:
    """Scale averaged shares so that their mean is ``keep_ratio``; shares that would exceed 1 are 1.

    Rounding to whole tokens and short samples move an average off its budget a little.

    Raises:
        DataError: a share changes by 0.01 or more: these are not shares of that budget.
    """
    out = fill(shares, total=keep_ratio * len(shares), low=[0.0] * len(shares), high=[1.0] * len(shares))
    change = max(abs(a - b) for a, b in zip(out, shares, strict=True))
    if change >= LARGEST_CHANGE:
        raise DataError(
            f"renormalise: a share changes by {change:.3f} (limit {LARGEST_CHANGE}) to reach keep_ratio={keep_ratio}. "
            "The samples' prompts are too short for this budget, or the shares belong to another one."
        )
    return out


def half_difference(samples: Sequence[Sequence[float]], *, seed: int = 0) -> float:
    """Mean absolute difference between the averages of two random halves of the samples; warns above 0.03.

    Args:
        samples: [samples][L] shares kept, two samples or more.

    Raises:
        ConfigError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ConfigError(f"half_difference: samples has {len(samples)} entries; two halves need 2 or more.")
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    middle = len(order) // 2
    first, second = (mean_shares([samples[i] for i in half]) for half in (order[:middle], order[middle:]))
    difference = sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)
    if difference > UNSTABLE_ABOVE:
        warnings.warn(
            f"recipe: two random halves of the {len(samples)} samples differ by {difference:.3f} on average "
            f"(more than {UNSTABLE_ABOVE}); calibrate on more.",
            stacklevel=2,
        )
    return difference
