"""Which response of a pair a model prefers, how far it has moved from a reference, and how long it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stillhouse.config import FilePath
from stillhouse.core.types import Prompt, Response
from stillhouse.errors import ModelError
from stillhouse.evaluate.generation import response_statistics, to_responses, with_sums
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, TaskResult
from stillhouse.evaluate.tasks.prompts import EvalSession, PromptTask, mean_over_seeds
from stillhouse.models import TeacherModel, fingerprint_of_files, load_teacher

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.evaluate.likelihood import TokenSums

LogProbs = dict[str, tuple[float, int]]
"""By the id of the prompt: the log-probability of the response in nats, and its tokens."""


@REGISTRY.register
class PreferenceTask(PromptTask):
    """Share of held-out preference pairs of which the model finds the chosen response likelier, KL to a
    reference, and the length of what it writes.

    `preference_accuracy` compares log q(response) per token, `preference_accuracy_sum` whole responses; a tie
    counts half. `preference_margin` is the mean difference in nats per token. With a `reference` (the
    student that a preference training began with): `reward_accuracy` and `reward_margin` compare
    log q(y) / q_ref(y), DPO's implicit reward without its beta, in nats; `kl_to_reference` is
    KL(model || reference) in nats per token on the model's own text, `kl_to_reference_on_pairs` on both
    responses of the pairs.

    Example: `evaluate: {tasks: [{kind: preference, data: pairs.jsonl, reference: runs/kd}]}`
    """

    kind: Literal["preference"] = "preference"
    reference: FilePath | None = None
    """A model or run folder to compare with, such as the start of the training."""
    needs: ClassVar[frozenset[str]] = frozenset({"rejected"})

    def dependencies(self, context: EvalContext) -> dict[str, Any]:
        """Those of every task, and the weights of the reference."""
        reference = self._reference(context)
        weights = None if reference is None else context.fingerprint(reference)
        return {**super().dependencies(context), "reference": weights}

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Measure both responses of each pair, then generate."""
        session = self.session(context)
        reference = self._reference(context)
        generations = session.generate(session.eval_set.prompts)
        preferences = _preferences(context, session.eval_set.prompts, reference)
        sums: TokenSums = {}
        rows = []
        for seed, completions in generations.by_seed.items():
            for example, completion in zip(session.eval_set.examples, completions, strict=True):
                row = session.row(example, seed, completion, session.decode(completion))
                rows.append({**row, **preferences[example.prompt.id]})
        metrics = mean_over_seeds(rows, dict.fromkeys(name for own in preferences.values() for name in own))
        if reference is not None:
            first = next(iter(generations.by_seed.values()))
            own = to_responses(session.eval_set.prompts, first, context.role)
            metrics |= _distance(context, reference, own, session.eval_set.prompts, sums)
        metrics |= response_statistics(rows, generations.seconds)
        return TaskResult(metrics, self._settings(session, reference), with_sums(rows, sums))

    def _settings(self, session: EvalSession, reference: nn.Module | None) -> dict[str, Any]:
        return {
            **session.settings(),
            "reference": None if self.reference is None else str(self.reference),
            "preference": "log q(chosen) > log q(rejected); per token, and as sums; ties count half",
        }

    def _reference(self, context: EvalContext) -> nn.Module | None:
        if self.reference is None:
            return None
        return _reference_at(str(self.reference)).to(next(context.model.parameters()).device)


def _reference_at(path: str) -> nn.Module:
    """The model that is there now; loaded once for all systems and tasks, while its files stay the same."""
    try:
        return _loaded(path, fingerprint_of_files(TeacherModel(path=path)))
    except ModelError:  # a name on the hub whose weights have not been downloaded yet, or no model at all
        return load_teacher(TeacherModel(path=path))


@lru_cache(maxsize=1)
def _loaded(path: str, _files: str) -> nn.Module:
    """The model at a path, by the digest of its files too: what is there may change while Python runs."""
    return load_teacher(TeacherModel(path=path))


def _preferences(
    context: EvalContext, prompts: Sequence[Prompt], reference: nn.Module | None
) -> dict[str, dict[str, float]]:
    """By the prompt's id: what the model prefers, and by how much."""
    chosen, rejected = (_side(prompts, place) for place in (0, 1))
    of_model = [_logprobs(context.model, side, context) for side in (chosen, rejected)]
    of_reference = []
    if reference is not None:
        of_reference = [_logprobs(reference, side, context) for side in (chosen, rejected)]
    found = {}
    for prompt in prompts:
        (better, tokens), (worse, other) = (logprobs[prompt.id] for logprobs in of_model)
        margin = better / tokens - worse / other
        found[prompt.id] = {
            "preference_accuracy": _preferred(margin),
            "preference_accuracy_sum": _preferred(better - worse),
            "preference_margin": margin,
        }
        if of_reference:
            gain, loss = (logprobs[prompt.id][0] for logprobs in of_reference)
            reward = (better - gain) - (worse - loss)
            found[prompt.id] |= {"reward_accuracy": _preferred(reward), "reward_margin": reward}
    return found


def _preferred(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _side(prompts: Sequence[Prompt], place: int) -> list[Response]:
    pairs = (prompt.preference_pair() for prompt in prompts)
    return [pair[place] for pair in pairs if pair is not None]


def _logprobs(model: nn.Module, responses: Sequence[Response], context: EvalContext) -> LogProbs:
    from stillhouse.evaluate.likelihood import likelihood

    sums = likelihood(model, responses, **context.likelihood_options()).sums
    return {id: (-own["loss"][0], int(own["loss"][1])) for id, own in sums.items()}


def _distance(
    context: EvalContext,
    reference: nn.Module,
    own: Sequence[Response],
    prompts: Sequence[Prompt],
    sums: TokenSums,
) -> Mapping[str, float]:
    """KL(model || reference) on the model's own text and on the pairs; `sums` gets what each prompt adds."""
    from stillhouse.evaluate.likelihood import likelihood

    metrics = {}
    texts = {"": own, "_on_pairs": [*_side(prompts, 0), *_side(prompts, 1)]}
    for ending, responses in texts.items():
        found = likelihood(context.model, responses, teacher=reference, **context.likelihood_options())
        assert found.fidelity is not None
        name = f"kl_to_reference{ending}"
        metrics[name] = found.fidelity.as_metrics()["reverse_kl_to_teacher"]
        for id, own_sums in found.sums.items():
            sums.setdefault(id, {})[name] = own_sums["reverse_kl_to_teacher"]
    return metrics
