"""Sizes of memory and files in a config: a number of bytes, or text such as `20GB`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(value: Any) -> Any:
    """A number of bytes, or text such as `500MB`, `20 GB` or `1.5GiB`."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", value.upper())
    if found is None or found[2] not in UNITS:
        raise ValueError("is a size such as 500MB, 20GB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
"""The annotation of a config field that holds a size."""


def parse_count(value: Any) -> Any:
    """A number, or text such as `60M`, `350 M` or `1.5B`."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMB]?)\s*", value.upper())
    if found is None:
        raise ValueError("is a number such as 60M or 1.5B")
    return round(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2]])


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
"""The annotation of a config field that holds a large number, such as one of parameters."""
