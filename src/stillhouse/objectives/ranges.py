"""The ranges of numbers that several objectives share; each may be a schedule."""

from stillhouse.schedules import scheduled

Temperature = scheduled(0.01, 100.0)
"""Divides logits."""

Skew = scheduled(0.0, 0.9999)
"""A share that must leave something to the other side."""

InnerShare = scheduled(1e-4, 1 - 1e-4)
"""A share that leaves something to both sides."""

Exponent = scheduled(-1.0, 3.0)
"""The exponents of the AB divergence."""

MixtureAlpha = scheduled(-5.0, 5.0)
"""The order of a generalised mean."""

Discount = scheduled(0.0, 1.0)
"""How much a later reward counts."""
