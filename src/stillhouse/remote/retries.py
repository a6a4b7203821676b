"""When a request is sent again, how long that waits, and what is said when it is given up."""

from __future__ import annotations

import datetime
import email.utils
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from tenacity import RetryCallState
from tenacity.wait import wait_base, wait_exponential

from stillhouse.console import duration

MAX_BACKOFF = 60.0
"""Seconds; the doubling ends here."""

MAX_RETRY_AFTER = 900.0
"""Seconds; a server that asks to wait longer than this is not waited for."""

UNREACHABLE_STATUSES = frozenset({502, 504, 521, 522, 523})
"""A proxy answers, and says that nobody is behind it."""

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Rate limits, restarts and overload, also those of common proxies: statuses that a retry may change."""


class TransientError(Exception):
    """An attempt failed in a way that a retry may not.

    Example: `TransientError("status 429", retry_after=2.0)`
    """

    def __init__(
        self, kind: str, detail: str = "", retry_after: float | None = None, *, unreachable: bool = False
    ) -> None:
        super().__init__(kind)
        self.kind = kind
        """Failures of one kind are counted together."""
        self.detail = detail
        """What else is known, such as the server's own message."""
        self.retry_after = retry_after
        """Seconds that the server asked to wait; None: it did not say."""
        self.unreachable = unreachable
        """Nothing shows that there is a server at all."""


class Backoff(wait_base):
    """Exponential backoff with jitter, at least as long as the server asks for (Retry-After).

    base * 2^(attempt - 1) seconds up to a minute, times a number in [1/2, 1), so that requests that failed
    together do not come back together.
    """

    def __init__(self, base: float, seed: int) -> None:
        """Equal arguments, equal waits.

        Args:
            base: seconds before the first retry.
            seed: of the jitter.
        """
        self._exponential = wait_exponential(multiplier=base, max=MAX_BACKOFF)
        self._random = random.Random(seed)

    def __call__(self, retry_state: RetryCallState) -> float:
        """Seconds before the next attempt."""
        wait = self._exponential(retry_state) * self._random.uniform(0.5, 1.0)
        return max(wait, failure_of(retry_state).retry_after or 0.0)


def failure_of(state: RetryCallState) -> TransientError:
    failure = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(failure, TransientError)  # nothing else is retried
    return failure


def parse_retry_after(headers: Mapping[str, str], now: datetime.datetime | None = None) -> float | None:
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
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - (now or datetime.datetime.now(datetime.UTC))).total_seconds())


def exhausted_message(url: str, failures: Sequence[TransientError], seconds: float) -> str:
    """The message for a request whose retries are used up."""
    counts = Counter(failure.kind for failure in failures)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    last = failures[-1]
    detail = f" Last: {last.detail.rstrip('.')}." if last.detail else ""
    if (last.retry_after or 0.0) > MAX_RETRY_AFTER:
        advice = f"It asks to wait {duration(last.retry_after or 0.0)}; start again then."
    else:
        advice = "Look whether the server runs and has room; lower concurrency, or raise retries or timeout."
    times = "time" if len(failures) == 1 else "times"
    return (
        f"{url}: not answered, asked {len(failures)} {times} in {duration(seconds)} ({kinds}).{detail} "
        f"{advice} What was answered before is kept where it is saved."
    )
