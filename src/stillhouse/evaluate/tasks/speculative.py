"""The student as the teacher's draft model in speculative decoding."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.config import ListOf
from stillhouse.core.requirements import MAIN, Requirements
from stillhouse.engines.base import Sampling
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.generation import with_sums
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, TaskResult
from stillhouse.evaluate.tasks.prompts import EvalSession, PromptTask

if TYPE_CHECKING:
    from stillhouse.evaluate.speculative_decoding import SpeculativeResult

Gamma = Annotated[int, Field(ge=1, le=64)]


@REGISTRY.register
class DraftModelQuality(PromptTask):
    """Acceptance rate of the student as the teacher's draft model, measured and expected (1 - TVD); block
    efficiency for gamma 1 to 8; speed-up of assisted generation; whether responses have the teacher's
    distribution (`distribution_z`, within ±3).

    - `acceptance_rate`: accepted share of the tested tokens; `expected_acceptance_rate`: the mean of
      1 - TVD at the same positions, which it estimates
    - `block_efficiency`: tokens per forward pass of the teacher, at most gamma + 1;
      `block_efficiency_if_independent`: (1 - a^(gamma + 1)) / (1 - a) for acceptance rate a, which holds
      where acceptances are independent. Both for every gamma in `metrics.by_gamma`
    - `speed_up`: tokens per second of transformers' assisted generation over those of the teacher alone,
      batch size 1, alternating
    - `distribution_z`, `assisted_distribution_z`: z of `DistributionTest` on our responses and on those of
      assisted generation

    The plain metrics are those of `gamma`.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), sections 2 and 3.1; as DistillSpec (arXiv 2310.08461)
    measures draft models.
    """

    kind: Literal["speculative"] = "speculative"
    measures_time: ClassVar[bool] = True
    limit: Annotated[int, Field(ge=1)] | None = 16
    """At most this many prompts: the batch size is 1."""
    gamma: Gamma = 4
    """Tokens that the student proposes per block, for the plain metrics and the speed-up."""
    gammas: ListOf[Gamma] = (1, 2, 3, 4, 5, 6, 7, 8)
    """The points of `metrics.by_gamma`."""
    sampling: Sampling | None = Sampling(temperature=1.0, max_tokens=64)
    """Temperature and length limit; nothing else may be set."""
    speed: bool = True
    """Also time transformers' assisted generation."""

    def requirements(self) -> Requirements:
        """The teacher in this process, reading the student's token ids."""
        return replace(Requirements.of(MAIN, "weights"), same_tokenizer=frozenset({MAIN}))

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Count accepted tokens and time assisted generation.

        Raises:
            ConfigError: there is no teacher, or the sampling has other settings than temperature and length.
            ModelError: a model keeps a state that cannot be rolled back.
        """
        from stillhouse.core.types import Response
        from stillhouse.evaluate.likelihood import likelihood

        if context.teacher is None:
            raise ConfigError(
                Fault(f"evaluate.tasks ({self.title})", "needs a teacher with the student's tokenizer")
            )
        session = self.session(context)
        self._check_sampling(session.sampling)
        points: list[dict[str, float]] = []
        responses: list[Response] = []
        sums: dict[str, dict[str, tuple[float, float]]] = {}
        gammas = sorted({*self.gammas, self.gamma})
        with console.progress(context.title or self.title, total=len(gammas)) as bar:
            for gamma in gammas:
                point, result = self._decode_with(session, gamma)
                points.append(point)
                bar.advance(1, acceptance=point["acceptance_rate"])
                if gamma == self.gamma:
                    responses = [
                        Response(prompt, tuple(ids), "teacher", ids[-1] in session.facts.eos_ids)
                        for prompt, ids in zip(session.eval_set.prompts, result.responses, strict=True)
                    ]
                    prompts = session.eval_set.prompts
                    sums = {p.id: own for p, own in zip(prompts, result.by_prompt, strict=True)}
        rows = [
            session.row(example, session.seeds[0], response, session.decode(response))
            for example, response in zip(session.eval_set.examples, responses, strict=True)
        ]
        metrics: dict[str, Any] = dict(next(point for point in points if point["gamma"] == self.gamma))
        options = context.likelihood_options()
        fidelity = likelihood(context.model, responses, teacher=context.teacher, **options).fidelity
        if fidelity is not None and session.sampling.temperature == 1.0:
            metrics["overlap_on_teacher_text"] = 1.0 - fidelity.tvd
        if self.speed:
            metrics |= self._time_assisted_generation(session)
        settings = {
            **session.settings(),
            "gamma": self.gamma,
            "speed_up": "assisted generation of transformers, batch size 1, alternating; tokens per second",
        }
        return TaskResult({**metrics, "by_gamma": points}, settings, with_sums(rows, sums))

    def _check_sampling(self, sampling: Sampling) -> None:
        plain = Sampling(temperature=sampling.temperature, max_tokens=sampling.max_tokens)
        for name in type(sampling).model_fields:
            if getattr(sampling, name) != getattr(plain, name):
                raise ConfigError(
                    Fault(
                        f"evaluate.tasks ({self.title}).sampling.{name}",
                        "is not supported by speculative decoding",
                        got=str(getattr(sampling, name)),
                        allowed="temperature and max_tokens",
                    )
                )

    def _decode_with(self, session: EvalSession, gamma: int) -> tuple[dict[str, float], SpeculativeResult]:
        """The point of the curve for one gamma, and what was generated and counted for it."""
        from stillhouse.evaluate.speculative_decoding import SpeculativeDecoder

        context = session.context
        assert context.teacher is not None
        decoder = SpeculativeDecoder(
            gamma=gamma,
            max_tokens=session.sampling.max_tokens,
            eos_ids=session.facts.eos_ids,
            vocab_size=context.vocab_size,
            temperature=session.sampling.temperature,
            seed=session.seeds[0],
        )
        if shown := next((one.id for one in session.eval_set.prompts if one.images), None):
            raise DataError(
                f"{self.title}: {shown} has images, and speculative decoding is tried on text alone"
            )
        prompts = [prompt.token_ids for prompt in session.eval_set.prompts]
        result = decoder.generate(context.teacher, context.model, prompts)
        a = result.acceptance_rate
        independent = gamma + 1.0 if a >= 1 else (1 - a ** (gamma + 1)) / (1 - a)
        point = {
            "gamma": gamma,
            "acceptance_rate": a,
            "expected_acceptance_rate": result.expected_acceptance_rate,
            "block_efficiency": result.block_efficiency,
            "block_efficiency_if_independent": independent,
            **({"distribution_z": result.distribution.z} if session.sampling.temperature > 0 else {}),
        }
        return point, result

    def _time_assisted_generation(self, session: EvalSession) -> dict[str, float]:
        """Tokens per second of the teacher with and without the student: medians over prompts."""
        import torch
        from transformers import set_seed

        from stillhouse.evaluate.speculative_decoding import DistributionTest
        from stillhouse.models.hidden import unwrap
        from stillhouse.models.vocabulary_rows import with_rows

        context = session.context
        teacher: Any = context.teacher
        # transformers takes a model with other padding behind its vocabulary for one with another tokenizer
        draft = with_rows(unwrap(context.model), unwrap(teacher).get_output_embeddings().weight.shape[0])
        temperature = session.sampling.temperature
        options: dict[str, Any] = {
            "do_sample": temperature > 0,
            "use_cache": True,  # a model may have been saved without, as trainers set it
            "max_new_tokens": session.sampling.max_tokens,
            "eos_token_id": list(session.facts.eos_ids),
            "pad_token_id": context.tokenizer_info.pad_id,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        rates: dict[str, list[float]] = {"plain": [], "assisted": []}
        distribution = DistributionTest()
        device = next(teacher.parameters()).device
        prompts = session.eval_set.prompts
        with _constant_gamma(draft, self.gamma), torch.no_grad():
            for index, prompt in enumerate([prompts[0], *prompts]):  # the first one is warm-up
                ids = torch.tensor([list(prompt.token_ids)], device=device)
                for name, extra in (("plain", {}), ("assisted", {"assistant_model": draft})):
                    set_seed(session.seeds[0] + index)
                    start = time.perf_counter()
                    output = teacher.generate(ids, attention_mask=torch.ones_like(ids), **options, **extra)
                    seconds = time.perf_counter() - start
                    if index:
                        rates[name].append((output.shape[1] - ids.shape[1]) / seconds)
                    if index and extra and temperature > 0:
                        logits = teacher(output).logits[0, ids.shape[1] - 1 : -1].double()
                        distribution.update((logits / temperature).softmax(-1), output[0, ids.shape[1] :])
        plain, assisted = statistics.median(rates["plain"]), statistics.median(rates["assisted"])
        return {
            "speed_up": assisted / plain,
            "tokens_per_second": assisted,
            "teacher_tokens_per_second": plain,
            **({"assisted_distribution_z": distribution.z} if temperature > 0 else {}),
        }


@contextlib.contextmanager
def _constant_gamma(student: Any, gamma: int) -> Iterator[None]:
    """Make transformers' assisted generation propose exactly `gamma` tokens; restores the settings."""
    before = copy.deepcopy(student.generation_config)
    student.generation_config.num_assistant_tokens = gamma
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    try:
        yield
    finally:
        student.generation_config = before
