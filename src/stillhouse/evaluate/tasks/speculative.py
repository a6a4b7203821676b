"""The student as the teacher's draft model in speculative decoding."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.config import ListOf
from stillhouse.engines.base import Sampling
from stillhouse.errors import ConfigError, Fault
from stillhouse.evaluate.tasks.asking import Asking, Sitting
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome

Gamma = Annotated[int, Field(ge=1, le=64)]


@REGISTRY.register
class SpeculativeProbe(Asking):
    """How many of the student's tokens the teacher accepts, and what that saves.

    - `acceptance`: accepted of the proposals that were tested; `acceptance_expected`: the mean of 1 - TVD at
      the same places, which it estimates
    - `block_efficiency`: tokens for each pass of the teacher, at most gamma + 1; for every gamma in
      `metrics.by_gamma`, with (1 - a^(gamma + 1)) / (1 - a) for acceptance a beside it, which holds where
      acceptances are independent of each other
    - `speed_up`: tokens a second of transformers' assisted generation over those of the teacher alone, one
      text at a time, the two in turns

    - `distribution_z`, `assisted_distribution_z`: whether the texts have the teacher's distribution, ours and
      those of assisted generation; near a standard normal number if so (`drafting.Surprise`)

    The plain metrics are those of `gamma`.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), sections 2 and 3.1; as DistillSpec (arXiv 2310.08461)
    measures drafts.
    """

    kind: Literal["speculative"] = "speculative"
    of_teacher: ClassVar[bool] = False
    limit: Annotated[int, Field(ge=1)] | None = 16
    """At most this many questions: texts are written one at a time."""
    gamma: Gamma = 4
    """Tokens that the student proposes at a time, for the plain metrics and the speed."""
    gammas: ListOf[Gamma] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Also counted with these."""
    sampling: Sampling | None = Sampling(temperature=1.0, max_tokens=64)
    """Temperature and length limit; nothing else may be set."""
    speed: bool = True
    """Also time transformers' assisted generation."""

    def measure(self, bench: Bench) -> Outcome:
        """Count and time.

        Raises:
            ConfigError: there is no teacher, or the sampling has other settings than temperature and length.
            ModelError: a model keeps a state that cannot be taken back.
        """
        from stillhouse.core.types import Response
        from stillhouse.evaluate.likelihood import likelihood

        if bench.teacher is None:
            raise ConfigError(
                Fault(f"evaluate.tasks ({self.title})", "needs a teacher with the student's tokenizer")
            )
        sitting = self.begin(bench)
        self._check(sitting.sampling)
        gammas = sorted({*self.gammas, self.gamma})
        by_gamma: list[dict[str, float]] = []
        rows: list[dict[str, Any]] = []
        responses: list[Response] = []
        with console.progress(bench.title or self.title, total=len(gammas)) as bar:
            for gamma in gammas:
                point, texts = self._counted(sitting, gamma)
                by_gamma.append(point)
                bar.advance(1, acceptance=point["acceptance"])
                if gamma == self.gamma:
                    responses = [
                        Response(prompt, tuple(ids), "teacher", ids[-1] == sitting.encoder.end_id)
                        for prompt, ids in zip(sitting.prompts, texts, strict=True)
                    ]
        for question, response in zip(sitting.asked.questions, responses, strict=True):
            text = bench.tokenizer.decode(list(response.token_ids), skip_special_tokens=True).strip()
            row = {**sitting.row(question, sitting.seeds[0]), "response": text}
            rows.append({**row, "tokens": len(response.token_ids), "finished": response.finished})
        metrics: dict[str, Any] = dict(next(point for point in by_gamma if point["gamma"] == self.gamma))
        found = likelihood(bench.model, responses, teacher=bench.teacher, **bench.options()).fidelity
        if found is not None and sitting.sampling.temperature == 1.0:
            metrics["overlap_on_teacher_text"] = 1.0 - found.tvd
        if self.speed:
            metrics |= self._timed(sitting)
        settings = {
            **sitting.settings(),
            "gamma": self.gamma,
            "speed_up": "assisted generation of transformers, one text at a time, in turns; tokens a second",
        }
        return Outcome({**metrics, "by_gamma": by_gamma}, settings, rows)

    def _check(self, sampling: Sampling) -> None:
        plain = Sampling(temperature=sampling.temperature, max_tokens=sampling.max_tokens)
        other = [
            name for name in type(sampling).model_fields if getattr(sampling, name) != getattr(plain, name)
        ]
        if other:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title}).sampling.{other[0]}",
                    "is not known to speculative decoding",
                    got=str(getattr(sampling, other[0])),
                    allowed="temperature and max_tokens",
                )
            )

    def _counted(self, sitting: Sitting, gamma: int) -> tuple[dict[str, float], list[list[int]]]:
        from stillhouse.evaluate import drafting

        bench = sitting.bench
        assert bench.teacher is not None
        counts = drafting.write(
            bench.teacher,
            bench.model,
            [prompt.token_ids for prompt in sitting.prompts],
            drafting.Settings(
                gamma=gamma,
                max_tokens=sitting.sampling.max_tokens,
                eos_id=sitting.encoder.end_id,
                vocab=bench.vocab,
                temperature=sitting.sampling.temperature,
                seed=sitting.seeds[0],
            ),
        )
        a = counts.acceptance
        independent = gamma + 1.0 if a >= 1 else (1 - a ** (gamma + 1)) / (1 - a)
        point = {
            "gamma": gamma,
            "acceptance": a,
            "acceptance_expected": counts.expected,
            "block_efficiency": counts.block_efficiency,
            "block_efficiency_if_independent": independent,
            **({"distribution_z": counts.surprise.z} if sitting.sampling.temperature > 0 else {}),
        }
        return point, counts.texts

    def _timed(self, sitting: Sitting) -> dict[str, float]:
        """Both ways in turns; the ratio of medians over prompts of tokens a second."""
        import torch
        from transformers import set_seed

        from stillhouse.evaluate.drafting import Surprise

        bench = sitting.bench
        teacher: Any = bench.teacher
        temperature = sitting.sampling.temperature
        how: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": sitting.sampling.max_tokens}
        if temperature > 0:
            how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        how |= {"eos_token_id": sitting.encoder.end_id, "pad_token_id": bench.facts.pad_id}
        rates: dict[str, list[float]] = {"plain": [], "assisted": []}
        surprise = Surprise()
        device = next(teacher.parameters()).device
        with _drafting(bench.model, self.gamma), torch.no_grad():
            for index, prompt in enumerate([sitting.prompts[0], *sitting.prompts]):
                ids = torch.tensor([list(prompt.token_ids)], device=device)
                for name, more in (("plain", {}), ("assisted", {"assistant_model": bench.model})):
                    set_seed(sitting.seeds[0] + index)
                    start = time.perf_counter()
                    output = teacher.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)
                    seconds = time.perf_counter() - start
                    if index:  # the first one warms up
                        rates[name].append((output.shape[1] - ids.shape[1]) / seconds)
                    if index and more and temperature > 0:
                        logits = teacher(output).logits[0, ids.shape[1] - 1 : -1].double()
                        surprise.add((logits / temperature).softmax(-1), output[0, ids.shape[1] :])
        plain, assisted = statistics.median(rates["plain"]), statistics.median(rates["assisted"])
        return {
            "speed_up": assisted / plain,
            "tokens_per_second": assisted,
            "tokens_per_second_of_teacher": plain,
            **({"assisted_distribution_z": surprise.z} if temperature > 0 else {}),
        }


@contextlib.contextmanager
def _drafting(student: Any, gamma: int) -> Iterator[None]:
    """Let the student propose exactly `gamma` tokens at a time to transformers; its settings are put back."""
    before = copy.deepcopy(student.generation_config)
    student.generation_config.num_assistant_tokens = gamma
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    try:
        yield
    finally:
        student.generation_config = before
