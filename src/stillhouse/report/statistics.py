"""How sure a number is: bootstrap over prompts, and Student's t over training seeds.

Pure functions on arrays, with the same result at every call.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
"""The confidence of every interval."""
RESAMPLES = 5000
DRAWS_AT_A_TIME = 2_000_000


def resampled(totals: Floats, weights: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Measures on prompts that are drawn again, with replacement, as many as there are.

    A measure is sum(totals) / sum(weights) over the prompts: a mean with weights of 1, a mean over tokens
    with token counts as weights. All columns see the same draws, so the difference of two columns is a paired
    bootstrap.

    Source: Efron (1979), "Bootstrap methods: another look at the jackknife"; over test sets Koehn (2004),
    "Statistical significance tests for machine translation evaluation".

    Args:
        totals: [N, K], one row a prompt, one column a measure.
        weights: [N, K]; 0 where a prompt takes no part.
        resamples: how often N prompts are drawn.
        seed: of the draws.

    Returns:
        [resamples, K]; NaN where no drawn prompt has a weight.
    """
    prompts, measures = totals.shape
    both = np.hstack([totals, weights])
    generator = np.random.default_rng(seed)
    at_a_time = max(1, DRAWS_AT_A_TIME // prompts)
    sums = []
    for start in range(0, resamples, at_a_time):
        draws = min(at_a_time, resamples - start)
        drawn = generator.integers(prompts, size=(draws, prompts)) + prompts * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * prompts).reshape(draws, prompts)
        sums.append(times.astype(np.float64) @ both)
    whole = np.concatenate(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(whole[:, :measures] / whole[:, measures:])


def bootstrap_interval(values: Floats, prompts: int, level: float = LEVEL) -> tuple[float, float] | None:
    """The expanded percentile interval of resampled values.

    The tails are Φ(-sqrt(n / (n - 1)) t), with t the quantile of Student's distribution for n - 1: plain
    percentiles are too narrow for few prompts.

    Source: Hesterberg (2015), "What teachers should know about the bootstrap", section 4.

    Args:
        values: [resamples] of one measure, or of a difference.
        prompts: n, how many were drawn.
        level: the confidence.

    Returns:
        None for fewer than two prompts, or where a value is missing.
    """
    if prompts < 2 or not np.isfinite(values).all():
        return None
    reach = math.sqrt(prompts / (prompts - 1)) * student_t(0.5 + level / 2, prompts - 1)
    tail = 0.5 * math.erfc(reach / math.sqrt(2))
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def wilson_interval(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a share of independent yes-or-no answers, which has a width at 0 and at 1 too.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    square = student_t(0.5 + level / 2, math.inf) ** 2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t(share: float, freedom: float) -> float:
    """The quantile of Student's t distribution, of the normal one for infinite freedom.

    With t = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1).

    Example:
        >>> round(student_t(0.975, 2), 2)
        4.3
    """
    freedom = min(freedom, 1e6)
    # For a large freedom all of the mass lies close to 0.
    angles = np.linspace(0.0, min(math.pi / 2, 40 / math.sqrt(freedom)), 20_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(abs(share - 0.5) * 2, mass / mass[-1], angles)
    return math.copysign(math.sqrt(freedom) * math.tan(angle), share - 0.5)


def fewest_prompts(comparisons: int = 1, level: float = LEVEL) -> int:
    """The fewest prompts by which two systems can be told apart at all: by chance one of two equal systems
    wins on all n prompts with probability 2^(1 - n)."""
    return math.ceil(1 + math.log2(max(1, comparisons) / (1 - level)))
