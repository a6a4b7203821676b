"""Seeds that need no state.

Every random draw of a run is a function of (seed, purpose, step), so a resumed run repeats the draws of an
uninterrupted one, and all ranks agree without communicating.
"""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose of a run, the same on every machine and rank."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_uniform(seed: int, *purpose: object) -> float:
    """A number in [0, 1) for one purpose of a run, the same on every machine and rank."""
    return derived_seed(seed, *purpose) / 2**63
