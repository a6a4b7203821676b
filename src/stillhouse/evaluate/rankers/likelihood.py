"""The likelihood of a response under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.errors import DataError
from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankingPlace
from stillhouse.models import TeacherModel, fingerprint_of_files, load_teacher, load_tokenizer, local_device
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.scoring import mean_logprobs


@REGISTRY.register
class LikelihoodRanker(Ranker):
    """The mean log-probability of a response in nats per token, under a teacher with the tokenizer of the
    model that wrote it."""

    kind: Literal["likelihood"] = "likelihood"
    teacher: str
    """Folder or hub name of the model."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences in one forward pass."""

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """Of all responses together.

        Raises:
            DataError: a response has no token ids, or ids that the teacher does not know.
        """
        where = TeacherModel(path=self.teacher)
        vocab = len(load_tokenizer(where))
        responses = [sample.response for group in groups for sample in group]
        for response in responses:
            ids = (*response.prompt.token_ids, *response.token_ids)
            if not response.token_ids or not response.prompt.token_ids:
                raise DataError(
                    f"{response.prompt.id}: has no token ids to score; files of `stillhouse generate` have "
                    "them."
                )
            if max(ids) >= vocab:
                raise DataError(
                    f"{response.prompt.id}: has token ids that the tokenizer of {self.teacher} does not know."
                )
        model = load_teacher(where).to(local_device())
        found = iter(mean_logprobs(model, responses, pad_id=0, vocab=vocab, batch_size=self.batch_size))
        return [[next(found) for _ in group] for group in groups]

    def depends_on(self) -> str:
        """The weights."""
        return fingerprint_of_files(TeacherModel(path=self.teacher))
