"""A judge on a server, who compares the responses to a prompt two by two."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.config import FilePath
from stillhouse.core.journal import Journal
from stillhouse.evaluate.judge import AnswerPair, Rubric, judge_pairs
from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankingPlace
from stillhouse.remote import ServerConnection
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class JudgeRanker(Ranker):
    """The share of the other responses to the prompt that a judge finds worse, each pair in both orders; a
    response none of whose pairs has a clear verdict cannot be answered. n (n - 1) requests a prompt."""

    kind: Literal["judge"] = "judge"
    url: str
    """OpenAI-compatible server of the judge, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """Name of the judge at the server; default: the only model it serves."""
    key_env: str | None = None
    """Environment variable with the server's key."""
    rubric: FilePath | None = None
    """File with {question}, {answer_a}, {answer_b} that asks for [[A]], [[B]] or [[C]]."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Length limit of a reply."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Requests in flight at most."""

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """Replies are kept as they come, so that no request is repeated after an interruption."""
        server = ServerConnection(
            url=self.url, model=self.model, key_env=self.key_env, concurrency=self.concurrency
        )
        won: list[list[list[float]]] = [[[] for _ in group] for group in groups]
        places: list[tuple[int, int, int]] = []
        pairs: list[AnswerPair] = []
        for number, group in enumerate(groups):
            for one, other in combinations(range(len(group)), 2):
                if group[one].text == group[other].text:
                    won[number][one].append(0.5)
                    won[number][other].append(0.5)
                    continue
                prompt = group[one].response.prompt
                id = f"{prompt.id}#{one}-{other}"
                places.append((number, one, other))
                texts = group[one].text, group[other].text
                pairs.append(AnswerPair(id, prompt.question, *texts, prompt.images))
        replies = Journal(place.beside("replies"))
        rubric = Rubric(file=self.rubric, max_tokens=self.max_tokens)
        client = server.client()
        try:
            model = server.model_name(client)
            with console.progress("Judging", total=2 * len(pairs)) as bar:
                judged = judge_pairs(pairs, client, model, rubric, replies, bar.advance)
        finally:
            client.close()
        for (number, one, other), found in zip(places, judged, strict=True):
            if found.score is not None:
                won[number][one].append(found.score)
                won[number][other].append(1 - found.score)
        return [[statistics.fmean(own) if own else None for own in group] for group in won]
