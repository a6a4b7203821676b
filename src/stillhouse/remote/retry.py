"""What is worth another try, how long to wait before it, and what to say when no try is left."""

from __future__ import annotations

import datetime
import email.utils
import math
import random
from collections import Counter
from collections.abc import Mapping

from stillhouse.console import duration

LONGEST_BACKOFF = 60.0
"""Seconds; the doubling ends here."""
LONGEST_ORDERED_WAIT = 900.0
"""Seconds; a server that asks to wait longer than this is not waited for."""

TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that another try may change: rate limits, restarts and overload, also those of common proxies."""


class Again(Exception):
    """A try failed in a way that another one may not.

    Example: `Again("status 429", after=2.0)`
    """

    def __init__(self, what: str, detail: str = "", after: float | None = None) -> None:
        super().__init__(what)
        self.what = what
        """The kind of failure; equal ones are counted together."""
        self.detail = detail
        """What else is known, such as the server's own words."""
        self.after = after
        """Seconds that the server asked to wait; None: it did not say."""


class Refused(Exception):
    """The server understood a request and will not answer it, however often it is asked."""


def pause(fault: Again, attempt: int, backoff: float, source: str) -> float:
    """Seconds to wait before the next try.

    `backoff` doubled with each try up to a minute, times a number in [1/2, 1) so that requests that failed
    together do not come back together; at least what the server asked for.

    Args:
        fault: what went wrong.
        attempt: tries so far, minus one.
        backoff: seconds before the first repetition.
        source: names the request; the same name and attempt give the same number.
    """
    jitter = random.Random(f"{source}/{attempt}").uniform(0.5, 1.0)
    own = min(backoff * 2.0 ** min(attempt, 30), LONGEST_BACKOFF) * jitter
    return max(own, fault.after or 0.0)


def retry_after(headers: Mapping[str, str], now: datetime.datetime | None = None) -> float | None:
    """The seconds of a Retry-After header, which holds seconds or a date; None without a readable one."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - (now or datetime.datetime.now(datetime.UTC))).total_seconds())


def gave_up(url: str, faults: Counter[str], last: Again, seconds: float) -> str:
    """The message for a request that was never answered."""
    tries = sum(faults.values())
    kinds = ", ".join(f"{count} x {what}" for what, count in faults.most_common())
    detail = f" Last: {last.detail.rstrip('.')}." if last.detail else ""
    if last.after is not None and last.after > LONGEST_ORDERED_WAIT:
        advice = f"It asks to wait {duration(last.after)}; start again then."
    else:
        advice = "Look whether the server runs and has room; lower concurrency, or raise retries or timeout."
    times = "time" if tries == 1 else "times"
    return (
        f"{url}: not answered, asked {tries} {times} in {duration(seconds)} ({kinds}).{detail} {advice} "
        "What was answered before is kept where it is saved."
    )
