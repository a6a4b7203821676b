"""Inference cost: size and speed of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.core.batch import TokenBatch
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, EvalTask, TaskResult
from stillhouse.models import hidden_rows, parameter_counts

if TYPE_CHECKING:
    from torch import nn


@REGISTRY.register
class InferenceCost(EvalTask):
    """Parameters, bytes, throughput of prefill and decoding, time to first token; also against the teacher.

    - `parameters`, `bytes`: tied weights counted once
    - `prompt_tokens_per_second`: prefill of `batch_size` prompts of `prompt_tokens` tokens
    - `first_token_seconds`: from the prompt to the first token, batch size 1
    - `tokens_per_second`: decoding `batch_size` responses of `new_tokens` tokens, after the first token

    Prompts are random tokens, so that every model reads the same number. Each value is the median of
    `repeats` passes. With a teacher the two alternate, and `NAME_speed_up` is the median over passes of the
    teacher's seconds over the student's, which the load of a busy machine affects less than the times
    themselves.
    """

    kind: Literal["cost"] = "cost"
    measures_time: ClassVar[bool] = True
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    new_tokens: Annotated[int, Field(ge=2)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 8
    repeats: Annotated[int, Field(ge=1)] = 5
    """Passes, after one for warm-up."""

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Count parameters and measure times."""
        models: dict[str, nn.Module] = {"": context.model}
        if context.teacher is not None:
            models["teacher"] = context.teacher
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
        with console.progress(context.title or self.title, total=self.repeats + 1) as bar:
            for repeat in range(self.repeats + 1):
                for name, model in models.items():
                    for stage, value in self._seconds(context, model).items():
                        if repeat:
                            seconds[name].setdefault(stage, []).append(value)
                bar.advance(1)
        median = {stage: statistics.median(values) for stage, values in seconds[""].items()}
        size = parameter_counts(context.model)
        metrics: dict[str, Any] = {
            "parameters": size["parameters"],
            "bytes": size["bytes"],
            "prompt_tokens_per_second": self.batch_size * self.prompt_tokens / median["prompt"],
            "first_token_seconds": median["first_token"],
            "tokens_per_second": self.batch_size * (self.new_tokens - 1) / median["decode"],
        }
        if context.teacher is not None:
            for stage, values in seconds[""].items():
                ratios = [t / s for t, s in zip(seconds["teacher"][stage], values, strict=True)]
                metrics[f"{stage}_speed_up"] = statistics.median(ratios)
            metrics["size_ratio"] = size["parameters"] / parameter_counts(context.teacher)["parameters"]
        settings = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "dtype": size["dtype"],
            "device": str(next(context.model.parameters()).device),
            "engine": context.engine.kind,
        }
        return TaskResult(metrics, settings, [])

    def _seconds(self, context: EvalContext, model: nn.Module) -> dict[str, float]:
        """Seconds of prefill, of a first token and of decoding after it."""
        import torch

        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(context.vocab_size, (self.batch_size, self.prompt_tokens), generator=generator)
        prompts = [row.tolist() for row in tokens]
        batch = TokenBatch.of(prompts, [self.prompt_tokens - 1] * len(prompts), pad_id=0)
        batch = batch.to(next(model.parameters()).device)
        engine = context.engine.build(model, context.tokenizer_info)

        def generate(count: int, new_tokens: int) -> Callable[[], object]:
            sampling = Sampling(temperature=1.0, max_tokens=new_tokens, min_tokens=new_tokens)
            return lambda: engine.generate(prompts[:count], sampling, 0)

        def prefill() -> None:
            with torch.no_grad():
                hidden_rows(model, batch)

        first = _timed(generate(self.batch_size, 1))
        return {
            "prompt": _timed(prefill),
            "first_token": _timed(generate(1, 1)),
            "decode": max(_timed(generate(self.batch_size, self.new_tokens)) - first, 1e-9),
        }


def _timed(function: Callable[[], object]) -> float:
    import torch

    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
