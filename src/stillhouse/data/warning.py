"""What people should hear about a set of prompts: rows that are lost, rows that are in two sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stillhouse.types import Prompt

if TYPE_CHECKING:
    from stillhouse.data.load import PromptSet


def overlap(train: Sequence[Prompt], other: PromptSet) -> list[str]:
    """A warning if prompts of `other` are training prompts too (equal token for token)."""
    seen = {prompt.token_ids for prompt in train}
    both = sum(prompt.token_ids in seen for prompt in other.prompts)
    if not both:
        return []
    other.report["also_in_train"] = both
    return [
        f"{both} of {len(other.prompts)} prompts of data.{other.name} ({other.report['path']}) are also in "
        "data.train: what is measured on them says little about new prompts"
    ]


def losses(one: PromptSet) -> list[str]:
    """A warning if more than a tenth of the rows could not be used as they are."""
    report = one.report
    lost = {key: count for key, count in report["dropped"].items() if key != "unlabelled"}
    lost |= {f"{key} cut": count for key, count in report["truncated"].items()}
    if sum(lost.values()) * 10 <= report["rows"]:
        return []
    told = ", ".join(f"{count} x {reason}" for reason, count in lost.items())
    return [
        f"data.{one.name} ({report['path']}): of {report['rows']} rows {told}. "
        "See data.max_prompt, data.max_response and data.too_long"
    ]
