"""The student proposes, the teacher corrects: speculative knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Completion, Progress, Prompt, Response, images_of
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.engines.base import Sampling
from stillhouse.engines.sampling import PAD, Sampler, uniforms
from stillhouse.models import head_of, hidden_rows
from stillhouse.rollouts.base import (
    REGISTRY,
    SAMPLES_FROM_BOTH,
    ResponsesConfig,
    RolloutContext,
    StatelessPolicy,
)


@REGISTRY.register
class SpeculativeConfig(ResponsesConfig):
    """The student generates blocks of tokens; the first that is not among the teacher's best is replaced by
    one of the teacher's.

    Paper: Xu et al. 2024, Speculative Knowledge Distillation (arXiv 2410.11325), Algorithm 1; released code
    at commit c1379ed. A token is accepted if it is one of the teacher's `accept_top_k` most likely at its
    position; at the first that is not, the rest of the block is dropped and one token is sampled from the
    teacher. So the text moves from the teacher's to the student's as the student learns. Each block costs one
    forward pass of the teacher over the whole sequence.

    Example: `responses: {kind: speculative, accept_top_k: 25, block_size: 5}`
    """

    kind: Literal["speculative"] = "speculative"
    accept_top_k: Annotated[int, Field(ge=1)] = 25
    """How many of the teacher's most likely tokens are accepted; K in the paper."""
    block_size: Annotated[int, Field(ge=1)] = 5
    """Tokens that the student proposes at a time; gamma in the paper."""
    sampling: Sampling | None = None
    """How the student proposes; default: `engine.sampling`."""
    teacher_temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Temperature of the teacher's replacements."""
    teacher_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The teacher samples from the fewest tokens that together have this probability."""

    def requirements(self) -> Requirements:
        """The student's proposals, and the teacher's model in this process, whose tokens replace some."""
        return Requirements.of(STUDENT, "text") | SAMPLES_FROM_BOTH

    def sources(self) -> frozenset[str]:
        """The student's: it proposes most of the text."""
        return frozenset({"student"})

    def build(self, context: RolloutContext) -> SpeculativePolicy:
        """The running policy."""
        return SpeculativePolicy(self, context)


@dataclass
class _Draft:
    """An unfinished response."""

    sample_id: int
    """Its place among the prompts of the step."""
    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    finished: bool = False

    def prefix(self) -> Prompt:
        """The prompt and what is written so far, as the prompt of what follows."""
        written, teacher = tuple(self.ids), self.prompt.teacher_ids
        return replace(
            self.prompt,
            token_ids=(*self.prompt.token_ids, *written),
            teacher_ids=None if teacher is None else (*teacher, *written),
        )


class SpeculativePolicy(StatelessPolicy):
    """Generates at each step, block by block, for all prompts of the step together."""

    def __init__(self, config: SpeculativeConfig, context: RolloutContext) -> None:
        assert context.student is not None
        assert context.models is not None
        self._config = config
        self._student = context.student
        self._models = context.models
        self._seed = context.seed
        self._world = context.world
        self._sampling = context.student.resolve_sampling(config.sampling)
        teacher_sampling = Sampling(temperature=config.teacher_temperature, top_p=config.teacher_top_p)
        self._teacher_sampler = Sampler(teacher_sampling, torch.tensor(context.models.tokenizer_info.eos_ids))
        self._proposed = self._accepted = 0

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response to each prompt."""
        places = self._world.local_indices(len(prompts))
        drafts = [_Draft(place, prompt) for place, prompt in zip(places, prompts, strict=True)]
        self._proposed = self._accepted = 0
        block = 0
        while unfinished := [draft for draft in drafts if not self._complete(draft)]:
            seed = derived_seed(self._seed, "speculative", progress.step, block)
            unfinished.sort(key=self._block_limits)
            for (max_tokens, min_tokens), alike in groupby(unfinished, key=self._block_limits):
                self._extend(list(alike), max_tokens, min_tokens, seed)
            block += 1
        if self._student.on_tokens is not None:
            self._student.on_tokens(self._proposed)
        version = self._student.version()
        return [
            [Response(draft.prompt, tuple(draft.ids), "student", draft.finished, version)] for draft in drafts
        ]

    def metrics(self) -> dict[str, float]:
        """The share of the proposed tokens that the teacher accepted."""
        return {"responses/accepted": self._accepted / max(1, self._proposed)}

    def _complete(self, draft: _Draft) -> bool:
        return draft.finished or len(draft.ids) >= self._sampling.max_tokens

    def _block_limits(self, draft: _Draft) -> tuple[int, int]:
        """The most and the fewest tokens of the next block, so that the response keeps to its own limits."""
        done = len(draft.ids)
        max_tokens = min(self._config.block_size, self._sampling.max_tokens - done)
        return max_tokens, min(max_tokens, max(0, self._sampling.min_tokens - done))

    def _extend(self, drafts: Sequence[_Draft], max_tokens: int, min_tokens: int, seed: int) -> None:
        """One block: the student's proposals, checked by the teacher."""
        prefixes = [[*draft.prompt.token_ids, *draft.ids] for draft in drafts]
        sample_ids = [draft.sample_id for draft in drafts]
        limited = self._sampling.model_copy(update={"max_tokens": max_tokens, "min_tokens": min_tokens})
        images = images_of([draft.prompt for draft in drafts])
        proposals = self._student.engine.generate(
            prefixes, limited, seed, sample_ids=sample_ids, images=images
        )
        logits = self._teacher_logits(drafts, proposals)
        tokens = torch.tensor([t for p in proposals for t in p.token_ids], device=logits.device)
        rank = (logits > logits.gather(1, tokens[:, None])).sum(1)
        accepted = (rank < self._config.accept_top_k).tolist()
        drawn = uniforms(derived_seed(seed, "teacher"), sample_ids, max_tokens)
        used = [row[: len(p.token_ids)] for row, p in zip(drawn, proposals, strict=True)]
        replacements = self._replacements(logits, torch.cat(used))
        start = 0
        for draft, proposal in zip(drafts, proposals, strict=True):
            end = start + len(proposal.token_ids)
            self._accept(draft, proposal, accepted[start:end], replacements[start:end])
            start = end

    def _accept(
        self, draft: _Draft, proposal: Completion, accepted: list[bool], replacements: list[int]
    ) -> None:
        """Append the accepted prefix of a proposal, and one replacement if it is not the whole."""
        count = accepted.index(False) if False in accepted else len(accepted)
        draft.ids += proposal.token_ids[:count]
        if count < len(accepted):
            draft.ids.append(replacements[count])
        draft.finished = draft.ids[-1] in self._models.tokenizer_info.eos_ids
        self._proposed += len(accepted)
        self._accepted += count

    def _teacher_logits(self, drafts: Sequence[_Draft], proposals: Sequence[Completion]) -> Tensor:
        """[N, V]: the teacher's logits at every proposed token."""
        teacher = self._models.teacher
        responses = [
            Response(draft.prefix(), proposal.token_ids, "student")
            for draft, proposal in zip(drafts, proposals, strict=True)
        ]
        pad_id = self._models.tokenizer_info.pad_id
        batch = read_by_teacher(collate(responses, pad_id), pad_id).to(next(teacher.parameters()).device)
        with torch.no_grad():
            return head_of(teacher, self._models.vocab_size).logits(hidden_rows(teacher, batch)).float()

    def _replacements(self, logits: Tensor, uniform: Tensor) -> list[int]:
        """A token of the teacher for every position; most of them are not needed."""
        rows = logits.shape[0]
        history = torch.full((rows, 1), PAD, device=logits.device)
        generated = torch.zeros(rows, dtype=torch.long, device=logits.device)
        tokens, _ = self._teacher_sampler.sample(
            logits.clone(), history, generated, uniform.to(logits.device)
        )
        return [int(token) for token in tokens.tolist()]
