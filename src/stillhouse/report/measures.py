"""What the metrics are called on the page, in which unit they are, and which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import yaml

from stillhouse import console

Kind = Literal["quality", "text", "size", "speed"]
Style = Literal["points", "nats", "share", "count", "bytes", "times", "plain"]


@dataclass(frozen=True, slots=True)
class Measure:
    """How one metric is shown.

    Example: `Measure("rouge_l", "ROUGE-L", "quality", "points", "higher", "F-measure in percent")`
    """

    name: str
    label: str
    kind: Kind = "text"
    style: Style = "plain"
    better: Literal["higher", "lower"] | None = None
    about: str = ""
    main: bool = True
    """Whether it stands in the first table, or under "more measures"."""

    def show(self, value: Any) -> str:
        """The value as text; a dash where there is none."""
        if not is_number(value):
            return "–" if value is None else str(value)
        if not math.isfinite(value):
            return str(float(value))
        if self.style == "share":
            return f"{100 * value:.1f}%"
        if self.style == "bytes":
            return _scaled(value, ("B", "kB", "MB", "GB", "TB"), "\u00a0")
        if self.style == "count":
            return _scaled(value, ("", "k", "M", "B", "T"), "") if value >= 10_000 else f"{value:,.0f}"
        if self.style == "times":
            return f"{value:.2f}×"
        if self.style == "nats":
            return f"{value:.3f}"
        return f"{value:.1f}" if self.style == "points" else compact(value)

    def change(self, value: float, before: float) -> str:
        """The difference with its sign, in the unit of the metric; of shares, in percentage points."""
        difference = value - before
        if not math.isfinite(difference):
            return ""
        sign = "+" if difference >= 0 else "−"
        if self.style == "share":
            return f"{sign}{100 * abs(difference):.1f} pp"
        return sign + self.show(abs(difference))

    def improves(self, value: float, before: float) -> bool | None:
        """True if better, False if worse, None where equal or where no direction is better."""
        if self.better is None or value == before:
            return None
        return (value > before) == (self.better == "higher")


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("rouge_l", "ROUGE-L", "quality", "points", "higher",
                "F-measure of the longest common subsequence of stemmed words, best reference, 0 to 100."),
        Measure("win_rate", "Win rate", "quality", "share", "higher",
                "Share of prompts on which a judge prefers it, a tie counts half; with its 95% interval."),
        Measure("first_place", "First place", "text", "share", None,
                "Share of the judge's decisions for the answer that stood first; 50% is no position bias."),
        Measure("consistency", "Consistency", "text", "share", None,
                "Share of pairs that the judge decides alike in both orders."),
        Measure("accuracy", "Accuracy", "quality", "share", "higher", "Share of right answers."),
        Measure("accuracy_flexible", "Accuracy, flexible", "quality", "share", "higher",
                "Share of right answers where the last number counts as the answer if none is marked."),
        Measure("exact_match", "Exact match", "quality", "share", "higher",
                "Share of responses that equal a reference."),
        Measure("acc", "Accuracy", "quality", "share", "higher", "Share of right answers (lm-eval)."),
        Measure("acc_norm", "Accuracy, by length", "quality", "share", "higher",
                "Share of right answers by log-probability over the length of each choice (lm-eval)."),
        Measure("bleu", "BLEU", "quality", "points", "higher", "Corpus BLEU, 0 to 100."),
        Measure("chrf", "chrF", "quality", "points", "higher", "Character n-gram F-score, 0 to 100."),
        Measure("kl_to_teacher", "KL to teacher", "quality", "nats", "lower",
                "KL(teacher ‖ student) at the response positions, nats per token."),
        Measure("reverse_kl_to_teacher", "Reverse KL", "quality", "nats", "lower",
                "KL(student ‖ teacher) at the response positions, nats per token."),
        Measure("tvd", "TVD", "quality", "nats", "lower", "Total variation distance to the teacher, 0 to 1."),
        Measure("top1_agreement", "Top-1 agreement", "quality", "share", "higher",
                "Share of positions where student and teacher rank the same token first."),
        Measure("acceptance", "Acceptance", "quality", "share", "higher",
                "Share of the student's proposed tokens that the teacher accepts in speculative decoding."),
        Measure("block_efficiency", "Block efficiency", "quality", "nats", "higher",
                "Tokens for each pass of the teacher in speculative decoding."),
        Measure("acceptance_expected", "Acceptance, expected", "text", "share", None,
                "Mean of 1 − TVD at the places where proposals were tested."),
        Measure("block_efficiency_if_independent", "Block efficiency if independent", "text", "nats", None,
                "What the acceptance gives where acceptances are independent of each other."),
        Measure("distribution_z", "Distribution, z", "text", "plain", None,
                "How far the texts are from the teacher's distribution; within ±3 if they have it."),
        Measure("assisted_distribution_z", "Distribution of assisted generation, z", "text", "plain", None,
                "The same of the texts that transformers' assisted generation writes."),
        Measure("overlap", "Overlap", "text", "share", None, "Mean of 1 − TVD."),
        Measure("loss", "Loss", "quality", "nats", "lower", "−log q of the references, nats per token."),
        Measure("perplexity", "Perplexity", "quality", "plain", "lower",
        "exp of the cross-entropy per token."),
        Measure("word_perplexity", "Word perplexity", "quality", "plain", "lower",
                "exp of the cross-entropy per word (lm-eval)."),
        Measure("byte_perplexity", "Byte perplexity", "quality", "plain", "lower",
                "exp of the cross-entropy per byte (lm-eval)."),
        Measure("bits_per_byte", "Bits per byte", "quality", "plain", "lower",
                "Cross-entropy per byte in bits (lm-eval)."),
        Measure("self_bleu", "Self-BLEU", "text", "points", None,
                "BLEU of each response against the others; lower is more diverse."),
        Measure("calibration_error", "Calibration error", "quality", "share", "lower",
                "Expected calibration error: how far confidence and accuracy of the next token are apart."),
        Measure("teacher_calibration_error", "Calibration error of the teacher", "text", "share", None,
                "The same of the teacher, on the same text."),
        Measure("distinct_1", "Distinct-1", "text", "nats", None, "Share of different words."),
        Measure("distinct_2", "Distinct-2", "text", "nats", None,
        "Share of different bigrams; higher is more diverse."),
        Measure("mean_length", "Mean length", "text", "points", None, "Tokens per response."),
        Measure("median_length", "Median length", "text", "points", None, "Tokens of the middle response."),
        Measure("max_length", "Longest", "text", "count", None, "Tokens of the longest response."),
        Measure("finished", "Finished", "text", "share", None,
                "Share of responses that ended by themselves instead of at the length limit."),
        Measure("stopped_by_limit", "Stopped by a limit", "text", "share", None,
                "Share of programs that the sandbox ended by time, memory or size."),
        Measure("pairs", "Pairs", "text", "count", None,
                "Pairs that the judge decided clearly in both orders."),
        Measure("unparsable", "Unclear replies", "text", "count", None,
                "Replies of the judge without a clear verdict; their pairs take no part."),
        Measure("prompt_tokens", "Tokens read", "text", "count", None, "Tokens that the judge read."),
        Measure("completion_tokens", "Tokens written", "text", "count", None, "Tokens that the judge wrote."),
        Measure("parameters", "Parameters", "size", "count", "lower", "Numbers in the model."),
        Measure("bytes", "Size", "size", "bytes", "lower", "Bytes of the weights."),
        Measure("prompt_tokens_per_second", "Prompt tokens/s", "speed", "count", "higher",
                "Prompt tokens read per second on the machine of the run."),
        Measure("first_token_seconds", "First token", "speed", "plain", "lower",
                "Seconds from a prompt to the first token."),
        Measure("tokens_per_second", "Tokens/s", "speed", "count", "higher",
                "Response tokens generated per second on the machine of the run."),
        Measure("prompt_speed_up", "Speed-up, reading", "speed", "times", "higher",
                "Times as fast as the teacher in reading prompts, the two timed in turns."),
        Measure("first_token_speed_up", "Speed-up, first token", "speed", "times", "higher",
                "Times as fast as the teacher to the first token, the two timed in turns."),
        Measure("decode_speed_up", "Speed-up, writing", "speed", "times", "higher",
                "Times as fast as the teacher in writing, the two timed in turns."),
        Measure("size_ratio", "Share of the teacher's size", "size", "share", None,
                "Parameters over those of the teacher."),
        Measure("speed_up", "Speed-up", "speed", "times", "higher",
                "Tokens a second of assisted generation over those of the teacher alone."),
    )
}  # fmt: skip

MORE = (
    "reverse_kl_to_teacher", "tvd", "loss", "perplexity", "self_bleu", "distinct_1", "distinct_2",
    "wins", "ties", "losses", "prompt_tokens", "completion_tokens", "median_length", "max_length", "bytes",
    "accuracy_flexible", "calibration_error",
    "teacher_calibration_error", "acceptance_expected", "block_efficiency_if_independent",
    "tokens_per_second_of_teacher", "prompt_tokens_per_second", "first_token_seconds", "distinct_3",
    "distinct_4", "distribution_z", "assisted_distribution_z", "prompt_speed_up", "first_token_speed_up",
    "size_ratio",
)  # fmt: skip
"""Known measures that would crowd the first table."""

PAIRED = {
    "tokens_per_second": "decode_speed_up",
    "prompt_tokens_per_second": "prompt_speed_up",
    "first_token_seconds": "first_token_speed_up",
}
"""Speeds with the measure that says how many times as fast as the teacher it is, the two timed in turns: on a
busy machine nearer to the truth than the ratio of two speeds of different times."""

PASS = Measure("pass_at_k", "pass@k", "quality", "share", "higher",
               "Estimated share of problems that one of {} samples or more solves.")  # fmt: skip

ENDS = ("_std", "_se", "_low", "_high")
"""End the name of a number that says how sure another one is."""

TEXTS = {
    "_on_own_text": ("own", "the system's own answers"),
    "_on_teacher_text": ("teacher's", "text that the teacher wrote"),
}
"""Ends the name of a measure that was taken on other text than the references."""

NOT_COLUMNS = ("rows", "tokens", "seconds", "gamma")
"""Counts that say how a result was made; they are no columns of a table of results."""


def measure(name: str) -> Measure:
    """The known measure, or a plain one under its own name."""
    for ending, (whose, told) in TEXTS.items():
        if name.endswith(ending):
            base = measure(name.removesuffix(ending))
            label, about = f"{base.label}, {whose} text", f"{base.about} On {told}."
            return replace(base, name=name, label=label, about=about, main=False)
    if found := re.fullmatch(r"pass_at_(\d+)", name):
        return replace(PASS, name=name, label=f"pass@{found[1]}", about=PASS.about.format(found[1]))
    if "." in name and name not in MEASURES:
        return _of_part(name)
    known = MEASURES.get(name) or Measure(name, name.replace("_", " ").capitalize())
    return replace(known, main=name not in MORE)


def _of_part(name: str) -> Measure:
    """A measure of a part of lm-eval's groups, or of one of its rules: PART.acc, exact_match.strict-match."""
    known = [part for part in name.split(".") if part in MEASURES]
    if len(known) != 1:
        return Measure(name, name.replace("_", " ").capitalize())
    rest = ", ".join(part for part in name.split(".") if part != known[0])
    base = MEASURES[known[0]]
    return replace(base, name=name, label=f"{base.label} ({rest})", main=known[0] not in MORE)


def columns(all_metrics: Iterable[dict[str, Any]]) -> list[Measure]:
    """The measures that occur, in the order of MEASURES and then as they come. `NAME_std` belongs to NAME."""
    names: dict[str, None] = {}
    for metrics in all_metrics:
        names.update(
            dict.fromkeys(name for name, value in metrics.items() if is_number(value) or value is None)
        )
    shown = [
        name
        for name in names
        if name not in NOT_COLUMNS and not any(name == f"{other}{end}" for other in names for end in ENDS)
    ]
    order = {name: index for index, name in enumerate(MEASURES)}
    order |= {name: order["accuracy"] for name in shown if name.startswith("pass_at_")}
    shown.sort(key=lambda name: order.get(re.sub("_on_(own|teacher)_text$", "", name), len(order)))
    return [measure(name) for name in shown]


def interval(metrics: dict[str, Any], name: str) -> tuple[float, float] | None:
    """What a value may as well be: its confidence interval (`NAME_low`, `NAME_high`), or else one standard
    deviation (`NAME_std`) or standard error (`NAME_se`) to both sides; None where none is known."""
    value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high):
        return float(low), float(high)
    spread = metrics.get(f"{name}_std", metrics.get(f"{name}_se"))
    if is_number(value) and is_number(spread) and math.isfinite(spread) and spread > 0:
        return value - spread, value + spread
    return None


def main_measure(all_metrics: Iterable[dict[str, Any]]) -> Measure | None:
    """The first measure of quality that occurs as a number: what a task is about."""
    known = list(all_metrics)
    return next(
        (
            column
            for column in columns(known)
            if column.kind == "quality" and any(is_number(metrics.get(column.name)) for metrics in known)
        ),
        None,
    )


def is_number(value: Any) -> TypeGuard[float]:
    """True for int and float, not for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def compact(value: float) -> str:
    """Four significant digits without a tail of zeros."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def plain(value: Any) -> str:
    """A setting as it would stand in YAML, on one line."""
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
        text = yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
        )
    except yaml.YAMLError:
        return str(value)
    return text.strip()


def duration(seconds: Any) -> str:
    """Seconds as people say them; a dash where unknown."""
    if not is_number(seconds) or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    return console.duration(seconds)


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"
    return f"{digits}{gap}{units[power]}"
