"""The student proposes, the teacher corrects: speculative knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Completion, Progress, Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.engines.base import Sampling
from stillhouse.engines.sampling import PAD, Sampler, uniforms
from stillhouse.models import head_of, hidden_rows
from stillhouse.rollouts.base import REGISTRY, TOGETHER, ResponsesConfig, RolloutContext


@REGISTRY.register
class Speculative(ResponsesConfig):
    """The student writes blocks; the first token that is not among the teacher's best is the teacher's
    instead.

    Paper: Xu et al. 2024, Speculative Knowledge Distillation (arXiv 2410.11325), Algorithm 1; released code
    at commit c1379ed. A token is kept if it is one of the teacher's `accept_top` most likely at its place;
    at the first that is not, the rest of the block is dropped and one token is drawn from the teacher. So
    the text moves from the teacher's to the student's as the student learns. Each block costs one pass of
    the teacher over the whole sequence.

    Example: `responses: {kind: speculative, accept_top: 25, block: 5}`
    """

    kind: Literal["speculative"] = "speculative"
    accept_top: Annotated[int, Field(ge=1)] = 25
    """How many of the teacher's most likely tokens are accepted; K in the paper."""
    block: Annotated[int, Field(ge=1)] = 5
    """Tokens that the student proposes at a time; gamma in the paper."""
    sampling: Sampling | None = None
    """How the student proposes; default: `engine.sampling`."""
    teacher_temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Temperature of the teacher's replacements."""
    teacher_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The teacher draws from the fewest tokens that together have this probability."""

    def requirements(self) -> Requirements:
        """The student's proposals, and the teacher's model in this process, whose tokens replace some."""
        return Requirements.of(STUDENT, "text") | TOGETHER

    def sources(self) -> frozenset[str]:
        """The student's: it proposes most of the text."""
        return frozenset({"student"})

    def build(self, context: RolloutContext) -> SpeculativePolicy:
        """The running policy."""
        return SpeculativePolicy(self, context)


@dataclass
class Draft:
    """A response while it is written."""

    number: int
    """What tells it apart from the others of the step."""
    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    finished: bool = False


class SpeculativePolicy:
    """Writes afresh at each step, block by block, for all prompts of the step together."""

    def __init__(self, config: Speculative, context: RolloutContext) -> None:
        assert context.student is not None
        assert context.models is not None
        self._config = config
        self._student = context.student
        self._models = context.models
        self._generation_seed = context.generation_seed
        self._sampling = context.student.resolve_sampling(config.sampling)
        replacing = Sampling(temperature=config.teacher_temperature, top_p=config.teacher_top_p)
        self._replacing = Sampler(replacing, torch.tensor(context.models.facts.eos_ids))
        self._proposed = self._kept = 0

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt."""
        drafts = [Draft(number, prompt) for number, prompt in enumerate(prompts)]
        self._proposed = self._kept = 0
        block = 0
        while open_drafts := [draft for draft in drafts if not self._over(draft)]:
            seed = self._generation_seed("speculative", progress.step, block)
            for (size, least), alike in groupby(sorted(open_drafts, key=self._room), key=self._room):
                self._extend(list(alike), size, least, seed)
            block += 1
        if self._student.on_tokens is not None:
            self._student.on_tokens(self._proposed)
        version = self._student.version()
        return [
            [Response(draft.prompt, tuple(draft.ids), "student", draft.finished, version)] for draft in drafts
        ]

    def metrics(self) -> dict[str, float]:
        """The share of the proposed tokens that the teacher let stand."""
        return {"responses/accepted": self._kept / max(1, self._proposed)}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is written depends on the weights, the prompts, the seed and the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _over(self, draft: Draft) -> bool:
        return draft.finished or len(draft.ids) >= self._sampling.max_tokens

    def _room(self, draft: Draft) -> tuple[int, int]:
        """The tokens of its next block, no more than the limit leaves, and after how many it may end."""
        done = len(draft.ids)
        size = min(self._config.block, self._sampling.max_tokens - done)
        return size, min(size, max(0, self._sampling.min_tokens - done))

    def _extend(self, drafts: Sequence[Draft], size: int, least: int, seed: int) -> None:
        """One block: proposals of the student, and the teacher's verdict on them."""
        asked = [[*draft.prompt.token_ids, *draft.ids] for draft in drafts]
        numbers = [draft.number for draft in drafts]
        limited = self._sampling.model_copy(update={"max_tokens": size, "min_tokens": least})
        proposals = self._student.engine.generate(asked, limited, seed, sample_ids=numbers)
        logits = self._teacher_logits(asked, proposals)
        tokens = torch.tensor([t for p in proposals for t in p.token_ids], device=logits.device)
        better = (logits > logits.gather(1, tokens[:, None])).sum(1)
        fine = (better < self._config.accept_top).tolist()
        drawn = uniforms(derived_seed(seed, "teacher"), numbers, size)
        reached = [row[: len(p.token_ids)] for row, p in zip(drawn, proposals, strict=True)]
        replacements = self._replacements(logits, torch.cat(reached))
        start = 0
        for draft, proposal in zip(drafts, proposals, strict=True):
            end = start + len(proposal.token_ids)
            self._accept(draft, proposal, fine[start:end], replacements[start:end])
            start = end

    def _accept(self, draft: Draft, proposal: Completion, fine: list[bool], instead: list[int]) -> None:
        kept = fine.index(False) if False in fine else len(fine)
        ids = list(proposal.token_ids[:kept])
        if kept < len(fine):
            ids.append(instead[kept])
        draft.ids += ids
        draft.finished = draft.ids[-1] in self._models.facts.eos_ids
        self._proposed += len(fine)
        self._kept += kept

    def _teacher_logits(self, asked: Sequence[Sequence[int]], proposals: Sequence[Completion]) -> Tensor:
        """[N, vocabulary]: the teacher's logits at every proposed token."""
        teacher = self._models.teacher
        responses = [
            Response(Prompt(str(index), tuple(ids), ""), proposal.token_ids, "student")
            for index, (ids, proposal) in enumerate(zip(asked, proposals, strict=True))
        ]
        batch = collate(responses, self._models.facts.pad_id).to(next(teacher.parameters()).device)
        tensors = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "response_mask")}
        with torch.no_grad():
            return head_of(teacher, self._models.vocab_size).logits(hidden_rows(teacher, tensors)).float()

    def _replacements(self, logits: Tensor, uniform: Tensor) -> list[int]:
        """A token from the teacher for every place; those of places that are not reached are thrown away."""
        rows = logits.shape[0]
        history = torch.full((rows, 1), PAD, device=logits.device)
        generated = torch.zeros(rows, dtype=torch.long, device=logits.device)
        tokens, _ = self._replacing.sample(logits.clone(), history, generated, uniform.to(logits.device))
        return [int(token) for token in tokens.tolist()]
