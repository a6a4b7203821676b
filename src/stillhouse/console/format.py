"""Numbers, durations and untrusted text as people read them: the one place that formats them.

A function takes whatever a JSON file may hold: None becomes a dash, what is no number stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeGuard

import yaml

MISSING = "–"

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def is_number(value: Any) -> TypeGuard[float]:
    """True for int and float, not for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> str:
    """A number with a fixed number of decimals, for columns: `1,250`, `57.10`, `0.0312`, `1.2e-05`."""
    if not is_number(value) or not math.isfinite(value):
        return _no_number(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.4f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def compact_number(value: object) -> str:
    """A number with four significant digits and no tail of zeros: `1,250`, `57.1`, `0.03125`, `12,346`."""
    if not is_number(value) or not math.isfinite(value):
        return _no_number(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def count(value: object) -> str:
    """A whole number, from ten thousand on with three significant digits: `9,290`, `164k`, `2.03M`."""
    if not is_number(value) or not math.isfinite(value):
        return _no_number(value)
    return _scaled(value, ("", "k", "M", "B", "T")) if value >= 10_000 else f"{value:,.0f}"


def byte_size(value: object) -> str:
    """Bytes with three significant digits: `512 B`, `4.06 MB`."""
    if not is_number(value) or not math.isfinite(value):
        return _no_number(value)
    return _scaled(value, ("\u00a0B", "\u00a0kB", "\u00a0MB", "\u00a0GB", "\u00a0TB"))


def duration(seconds: object, *, tenths: bool = False) -> str:
    """Seconds as `8 s`, `2 min 41 s` or `3 h 05 min`; with `tenths`, those below ten as `7.6 s`."""
    if not is_number(seconds) or not math.isfinite(seconds):
        return MISSING
    if tenths and seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def age(seconds: float | None) -> str:
    """`just now`, `5 min ago`, `3 h ago`, `12 days ago`."""
    if seconds is None:
        return MISSING
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= size:
            many = int(seconds // size)
            return f"{many} {unit}{'s' * (unit == 'day' and many > 1)} ago"
    return "just now"


def setting_text(value: object) -> str:
    """A value of a configuration as it would stand in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    try:
        text: str = yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
        )
    except yaml.YAMLError:
        return str(value)
    return text.strip()


def visible(text: str) -> str:
    """The text with control characters made visible.

    Model text and names from other people's folders may hold escape sequences for the terminal, null bytes,
    or marks that turn the direction of everything that follows. They are shown as `␀`, `␛` or `[U+202E]`;
    tabs and line breaks stay.
    """
    return _HIDDEN.sub(_shown, text)


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON for standard output: text as it is, but for what `visible` would change, in escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"[U+{code:04X}]"


def _no_number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value is None else str(value)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return (f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}") + units[power]
