"""What the metrics are called in tables and on the page, in which unit they are, and which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from stillhouse.console import TableColumn
from stillhouse.console.format import byte_size, compact_number, count, is_number

Kind = Literal["quality", "text", "size", "speed"]
Style = Literal["points", "nats", "share", "count", "bytes", "times", "plain"]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """How one metric is shown.

    Example: `MetricInfo("rouge_l", "ROUGE-L", "quality", "points", "higher", "F-measure in percent")`
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
        if not is_number(value) or not math.isfinite(value):
            return compact_number(value)
        styles: dict[Style, str] = {
            "points": f"{value:.1f}",
            "nats": f"{value:.3f}",
            "share": f"{100 * value:.1f}%",
            "times": f"{value:.2f}×",
            "count": count(value),
            "bytes": byte_size(value),
            "plain": compact_number(value),
        }
        return styles[self.style]

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

    def column(self) -> TableColumn:
        """Its column in a table of results."""
        better = self.better if self.kind == "quality" else None
        return TableColumn(self.label, self.name, numeric=True, better=better, about=self.about)


METRICS: dict[str, MetricInfo] = {
    metric.name: metric
    for metric in (
        MetricInfo("rouge_l", "ROUGE-L", "quality", "points", "higher",
            "F-measure of the longest common subsequence of stemmed words, best reference, 0 to 100."),
        MetricInfo("win_rate", "Win rate", "quality", "share", "higher",
            "Share of prompts on which a judge prefers it, a tie counts half; with its 95% interval."),
        MetricInfo("first_position_rate", "First position", "text", "share", None,
            "Share of the judge's decisions for the answer that stood first; 50% is no position bias."),
        MetricInfo("consistency", "Consistency", "text", "share", None,
            "Share of pairs that the judge decides alike in both orders."),
        MetricInfo("accuracy", "Accuracy", "quality", "share", "higher", "Share of right answers."),
        MetricInfo("accuracy_flexible", "Accuracy, flexible", "quality", "share", "higher",
            "Share of right answers where the last number counts as the answer if none is marked."),
        MetricInfo("exact_match", "Exact match", "quality", "share", "higher",
            "Share of responses that equal a reference."),
        MetricInfo("acc", "Accuracy", "quality", "share", "higher", "Share of right answers (lm-eval)."),
        MetricInfo("acc_norm", "Accuracy, by length", "quality", "share", "higher",
            "Share of right answers by log-probability over the length of each choice (lm-eval)."),
        MetricInfo("bleu", "BLEU", "quality", "points", "higher", "Corpus BLEU, 0 to 100."),
        MetricInfo("chrf", "chrF", "quality", "points", "higher", "Character n-gram F-score, 0 to 100."),
        MetricInfo("preference_accuracy", "Preference accuracy", "quality", "share", "higher",
            "Share of pairs of which the chosen response is likelier per token; a tie counts half."),
        MetricInfo("preference_accuracy_sum", "Preference accuracy, whole responses", "text", "share", None,
            "The same by the log-probability of whole responses, which shorter ones have higher."),
        MetricInfo("preference_margin", "Preference margin", "text", "nats", None,
            "log q(chosen) − log q(rejected), nats per token."),
        MetricInfo("reward_accuracy", "Reward accuracy", "quality", "share", "higher",
            "Share of pairs of which the chosen response has gained more on the reference."),
        MetricInfo("reward_margin", "Reward margin", "text", "nats", None,
            "Gain of the chosen response on the reference minus that of the rejected one, nats."),
        MetricInfo("kl_to_reference", "KL to reference", "text", "nats", None,
            "KL(student ‖ reference) on the student's own text, nats per token."),
        MetricInfo("kl_to_reference_on_pairs", "KL to reference, on pairs", "text", "nats", None,
            "KL(student ‖ reference) on both responses of the pairs, nats per token."),
        MetricInfo("kl_to_teacher", "KL to teacher", "quality", "nats", "lower",
            "KL(teacher ‖ student) at the response positions, nats per token."),
        MetricInfo("reverse_kl_to_teacher", "Reverse KL", "quality", "nats", "lower",
            "KL(student ‖ teacher) at the response positions, nats per token."),
        MetricInfo("tvd", "TVD", "quality", "share", "lower",
            "Total variation distance to the teacher, 0 to 1."),
        MetricInfo("top1_agreement", "Top-1 agreement", "quality", "share", "higher",
            "Share of positions where student and teacher rank the same token first."),
        MetricInfo("acceptance_rate", "Acceptance rate", "quality", "share", "higher",
            "Share of the student's proposed tokens that the teacher accepts in speculative decoding."),
        MetricInfo("block_efficiency", "Block efficiency", "quality", "plain", "higher",
            "Tokens for each pass of the teacher in speculative decoding."),
        MetricInfo("expected_acceptance_rate", "Acceptance rate, expected", "text", "share", None,
            "Mean of 1 − TVD at the places where proposals were tested."),
        MetricInfo("block_efficiency_if_independent", "Block efficiency if independent", "text", "plain",
            None, "What the acceptance rate gives where acceptances are independent of each other."),
        MetricInfo("distribution_z", "Distribution, z", "text", "plain", None,
            "How far the texts are from the teacher's distribution; within ±3 if they have it."),
        MetricInfo("assisted_distribution_z", "Distribution of assisted generation, z", "text", "plain", None,
            "The same of the texts that transformers' assisted generation produces."),
        MetricInfo("overlap", "Overlap", "text", "share", None, "Mean of 1 − TVD."),
        MetricInfo("loss", "Loss", "quality", "nats", "lower", "−log q of the references, nats per token."),
        MetricInfo("perplexity", "Perplexity", "quality", "plain", "lower",
            "exp of the cross-entropy per token."),
        MetricInfo("word_perplexity", "Word perplexity", "quality", "plain", "lower",
            "exp of the cross-entropy per word (lm-eval)."),
        MetricInfo("byte_perplexity", "Byte perplexity", "quality", "plain", "lower",
            "exp of the cross-entropy per byte (lm-eval)."),
        MetricInfo("bits_per_byte", "Bits per byte", "quality", "plain", "lower",
            "Cross-entropy per byte in bits (lm-eval)."),
        MetricInfo("self_bleu", "Self-BLEU", "text", "points", None,
            "BLEU of each response against the others; lower is more diverse."),
        MetricInfo("calibration_error", "Calibration error", "quality", "share", "lower",
            "Expected calibration error: how far confidence and accuracy of the next token are apart."),
        MetricInfo("teacher_calibration_error", "Calibration error of the teacher", "text", "share", None,
            "The same of the teacher, on the same text."),
        MetricInfo("distinct_1", "Distinct-1", "text", "share", None, "Share of different words."),
        MetricInfo("distinct_2", "Distinct-2", "text", "share", None,
            "Share of different bigrams; higher is more diverse."),
        MetricInfo("distinct_3", "Distinct-3", "text", "share", None, "Share of different trigrams."),
        MetricInfo("distinct_4", "Distinct-4", "text", "share", None, "Share of different 4-grams."),
        MetricInfo("mean_length", "Mean length", "text", "points", None, "Tokens per response."),
        MetricInfo("median_length", "Median length", "text", "points", None,
            "Tokens of the middle response."),
        MetricInfo("max_length", "Longest", "text", "count", None, "Tokens of the longest response."),
        MetricInfo("finished", "Finished", "text", "share", None,
            "Share of responses that ended by themselves instead of at the length limit."),
        MetricInfo("stopped_by_limit", "Stopped by a limit", "text", "share", None,
            "Share of programs that the sandbox ended by time, memory or size."),
        MetricInfo("pairs", "Pairs", "text", "count", None,
            "Pairs that the judge decided clearly in both orders."),
        MetricInfo("unparsable", "Unclear replies", "text", "count", None,
            "Replies of the judge without a clear verdict; their pairs take no part."),
        MetricInfo("prompt_tokens", "Prompt tokens", "text", "count", None,
            "Tokens of the prompts to the judge."),
        MetricInfo("completion_tokens", "Completion tokens", "text", "count", None,
            "Tokens that the judge generated."),
        MetricInfo("parameters", "Parameters", "size", "count", "lower", "Numbers in the model."),
        MetricInfo("bytes", "Size", "size", "bytes", "lower", "Bytes of the weights."),
        MetricInfo("prompt_tokens_per_second", "Prompt tokens/s", "speed", "count", "higher",
            "Prompt tokens read per second on the machine of the run."),
        MetricInfo("first_token_seconds", "Time to first token", "speed", "plain", "lower",
            "Seconds from a prompt to the first token."),
        MetricInfo("tokens_per_second", "Tokens/s", "speed", "count", "higher",
            "Response tokens generated per second on the machine of the run."),
        MetricInfo("prompt_speed_up", "Speed-up, prefill", "speed", "times", "higher",
            "Times as fast as the teacher in prefill, the two timed in turns."),
        MetricInfo("first_token_speed_up", "Speed-up, time to first token", "speed", "times", "higher",
            "Times as fast as the teacher to the first token, the two timed in turns."),
        MetricInfo("decode_speed_up", "Speed-up, decoding", "speed", "times", "higher",
            "Times as fast as the teacher in decoding, the two timed in turns."),
        MetricInfo("size_ratio", "Share of the teacher's size", "size", "share", None,
            "Parameters over those of the teacher."),
        MetricInfo("speed_up", "Speed-up", "speed", "times", "higher",
            "Tokens a second of assisted generation over those of the teacher alone."),
    )
}  # fmt: skip

MORE = (
    "reverse_kl_to_teacher", "tvd", "loss", "perplexity", "self_bleu", "distinct_1", "distinct_2",
    "wins", "ties", "losses", "prompt_tokens", "completion_tokens", "median_length", "max_length", "bytes",
    "accuracy_flexible", "calibration_error",
    "teacher_calibration_error", "expected_acceptance_rate", "block_efficiency_if_independent",
    "teacher_tokens_per_second", "prompt_tokens_per_second", "first_token_seconds", "distinct_3",
    "distinct_4", "distribution_z", "assisted_distribution_z", "prompt_speed_up", "first_token_speed_up",
    "size_ratio",
)  # fmt: skip
"""Known metrics that would crowd the first table."""

PAIRED = {
    "tokens_per_second": "decode_speed_up",
    "prompt_tokens_per_second": "prompt_speed_up",
    "first_token_seconds": "first_token_speed_up",
}
"""Speeds with the metric that says how many times as fast as the teacher it is, the two timed in turns: on a
busy machine nearer to the truth than the ratio of two speeds of different times."""

MEASURED_BY = {
    "prompt_tokens_per_second": ("cost",),
    "first_token_seconds": ("cost",),
    "tokens_per_second": ("cost", "speculative"),
}
"""Speeds with the kinds of task that measure them for their own sake, one model after the other. What else an
evaluation says of its speed depends on what the machine did meanwhile, and stays in its file."""

PASS = MetricInfo("pass_at_k", "pass@k", "quality", "share", "higher",
               "Estimated share of problems that one of {} samples or more solves.")  # fmt: skip

ENDS = ("_std", "_se", "_low", "_high")
"""End the name of a number that says how sure another one is."""

TEXTS = {
    "_on_own_text": ("own", "the system's own responses"),
    "_on_teacher_text": ("teacher's", "the teacher's responses"),
}
"""Ends the name of a metric that was measured on other text than the references."""

NOT_COLUMNS = ("rows", "tokens", "seconds", "gamma")
"""Counts that say how a result was made; they are no columns of a table of results."""


def metric_info(name: str) -> MetricInfo:
    """The known metric, or a plain one under its own name."""
    for ending, (whose, texts) in TEXTS.items():
        if name.endswith(ending):
            base = metric_info(name.removesuffix(ending))
            label, about = f"{base.label}, {whose} text", f"{base.about} On {texts}."
            return replace(base, name=name, label=label, about=about, main=False)
    if found := re.fullmatch(r"pass_at_(\d+)", name):
        return replace(PASS, name=name, label=f"pass@{found[1]}", about=PASS.about.format(found[1]))
    if "." in name and name not in METRICS:
        return _of_subtask(name)
    known = METRICS.get(name) or MetricInfo(name, name.replace("_", " ").capitalize())
    return replace(known, main=name not in MORE)


def _of_subtask(name: str) -> MetricInfo:
    """A metric of a subtask of an lm-eval group, or of one of its filters: SUBTASK.acc or
    exact_match.strict-match."""
    known = [part for part in name.split(".") if part in METRICS]
    if len(known) != 1:
        return MetricInfo(name, name.replace("_", " ").capitalize())
    rest = ", ".join(part for part in name.split(".") if part != known[0])
    base = METRICS[known[0]]
    return replace(base, name=name, label=f"{base.label} ({rest})", main=known[0] not in MORE)


def shown_metrics(all_metrics: Iterable[dict[str, Any]]) -> list[MetricInfo]:
    """The metrics that occur, in the order of METRICS and then as they come. `NAME_std` belongs to NAME."""
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
    order = {name: index for index, name in enumerate(METRICS)}
    order |= {name: order["accuracy"] for name in shown if name.startswith("pass_at_")}
    shown.sort(key=lambda name: order.get(re.sub("_on_(own|teacher)_text$", "", name), len(order)))
    return [metric_info(name) for name in shown]


def interval(metrics: dict[str, Any], name: str) -> tuple[float, float] | None:
    """The ends of a value's 95 % interval, `NAME_low` and `NAME_high`; None where it is not known."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high):
        return float(low), float(high)
    return None


def main_metric(all_metrics: Iterable[dict[str, Any]]) -> MetricInfo | None:
    """The first metric of quality that occurs as a number: what a task is about."""
    known = list(all_metrics)
    return next(
        (
            metric
            for metric in shown_metrics(known)
            if metric.kind == "quality" and any(is_number(metrics.get(metric.name)) for metrics in known)
        ),
        None,
    )
