"""What a model costs: size, and time for reading and writing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome, Probe
from stillhouse.models import hidden_rows, parameter_counts

if TYPE_CHECKING:
    from torch import nn


@REGISTRY.register
class CostProbe(Probe):
    """Size and speed of a model, and of the teacher beside it.

    - `parameters`, `bytes`: tied weights counted once
    - `prompt_tokens_per_second`: reading `batch` prompts of `prompt_tokens` tokens at once
    - `first_token_seconds`: from the prompt to the first token, one text
    - `tokens_per_second`: writing `batch` texts of `new_tokens` tokens side by side, after the first token

    Prompts are drawn tokens, so that every model reads the same number. Each is the median of `repeats`
    passes. With a teacher both take turns and `NAME_speed_up` is the median of the teacher's seconds over the
    student's of the same turn, which the noise of a busy machine touches less than the times themselves.
    """

    kind: Literal["cost"] = "cost"
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    new_tokens: Annotated[int, Field(ge=2)] = 32
    batch: Annotated[int, Field(ge=1)] = 8
    """Texts side by side."""
    repeats: Annotated[int, Field(ge=1)] = 5
    """Passes, after one that warms up."""

    def measure(self, bench: Bench) -> Outcome:
        """Count and time."""
        models: dict[str, nn.Module] = {"": bench.model}
        if bench.teacher is not None:
            models["teacher"] = bench.teacher
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
        with console.progress(bench.title or self.title, total=self.repeats + 1) as bar:
            for turn in range(self.repeats + 1):
                for name, model in models.items():
                    for what, value in self._timed(bench, model).items():
                        if turn:
                            seconds[name].setdefault(what, []).append(value)
                bar.advance(1)
        own = {what: statistics.median(values) for what, values in seconds[""].items()}
        facts = parameter_counts(bench.model)
        metrics: dict[str, Any] = {
            "parameters": facts["parameters"],
            "bytes": facts["bytes"],
            "prompt_tokens_per_second": self.batch * self.prompt_tokens / own["prompt"],
            "first_token_seconds": own["first_token"],
            "tokens_per_second": self.batch * (self.new_tokens - 1) / own["decode"],
        }
        if bench.teacher is not None:
            for what, values in seconds[""].items():
                turns = zip(seconds["teacher"][what], values, strict=True)
                metrics[f"{what}_speed_up"] = statistics.median(theirs / ours for theirs, ours in turns)
            metrics["size_ratio"] = facts["parameters"] / parameter_counts(bench.teacher)["parameters"]
        settings = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "batch": self.batch,
            "repeats": self.repeats,
            "dtype": facts["dtype"],
            "device": str(next(bench.model.parameters()).device),
            "engine": bench.writer.kind,
        }
        return Outcome(metrics, settings, [])

    def _timed(self, bench: Bench, model: nn.Module) -> dict[str, float]:
        """Seconds of reading, of a first token and of writing after it."""
        import torch

        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(bench.vocab, (self.batch, self.prompt_tokens), generator=generator)
        ids = drawn.to(next(model.parameters()).device)
        ones = torch.ones_like(ids)
        last = torch.arange(self.prompt_tokens, device=ids.device).expand_as(ids) == self.prompt_tokens - 1
        prompts = [row.tolist() for row in drawn]
        engine = bench.writer.build(model, bench.facts)

        def writing(count: int, tokens: int) -> Callable[[], object]:
            sampling = Sampling(temperature=1.0, max_tokens=tokens, min_tokens=tokens)
            return lambda: engine.generate(prompts[:count], sampling, 0)

        def reading() -> None:
            with torch.no_grad():
                hidden_rows(model, {"input_ids": ids, "attention_mask": ones, "response_mask": last})

        first = _seconds(writing(self.batch, 1))
        return {
            "prompt": _seconds(reading),
            "first_token": _seconds(writing(1, 1)),
            "decode": max(_seconds(writing(self.batch, self.new_tokens)) - first, 1e-9),
        }


def _seconds(work: Callable[[], object]) -> float:
    import torch

    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
