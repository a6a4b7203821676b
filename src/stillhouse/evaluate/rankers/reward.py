"""The number that a reward model gives a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.errors import DataError
from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankingPlace
from stillhouse.models import TeacherModel, fingerprint_of_files, load_reward_model, local_device, rewards
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class RewardRanker(Ranker):
    """The reward that a model of `stillhouse reward` gives, which reads the token ids of the file."""

    kind: Literal["reward"] = "reward"
    model: str
    """Folder of the reward model."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences in one forward pass."""

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """Of all responses together.

        Raises:
            DataError: a response has no token ids, or ids that the model does not know.
        """
        model = load_reward_model(self.model).to(local_device())
        vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        responses = [sample.response for group in groups for sample in group]
        sequences = [[*one.prompt.token_ids, *one.token_ids] for one in responses]
        for response, ids in zip(responses, sequences, strict=True):
            if not response.prompt.token_ids or not response.token_ids or max(ids) >= vocab:
                raise DataError(
                    f"{response.prompt.id}: has no token ids that {self.model} can read; files of "
                    "`stillhouse generate` have them, of a model with its tokenizer."
                )
        found = iter(rewards(model, sequences, self.batch_size))
        return [[next(found) for _ in group] for group in groups]

    def depends_on(self) -> str:
        """The weights."""
        return fingerprint_of_files(TeacherModel(path=self.model))
