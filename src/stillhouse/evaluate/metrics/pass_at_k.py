"""The chance that at least one of k programs passes."""

from __future__ import annotations

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, programs that were written for a problem; at least k.
        passed: c, how many of them passed.
        k: how many would be tried.

    Returns:
        A number between 0 and 1; its mean over problems is pass@k.

    Raises:
        ValueError: there are fewer than k samples, from which it cannot be estimated without bias.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {passed} of {samples} samples")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
