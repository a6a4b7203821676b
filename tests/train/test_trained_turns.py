"""Tokens of a response that are not trained on change nothing but what the others are conditioned on."""

from __future__ import annotations

import torch
from tests import tiny

from stillhouse.core.batch import IGNORED
from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.evaluate.likelihood import likelihood
from stillhouse.models import head_of, hidden_rows
from stillhouse.rollouts.hidden_cache import NO_SLOT, TeacherHiddenCache
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.teachers.cached_teachers import concatenated
from stillhouse.teachers.read_through import content_keys
from stillhouse.train.reduce import token_weights

PROMPT = Prompt("train:1", (5, 6, 7), "x")
MASKED = Response(PROMPT, (8, 9, 10, 11, 12, tiny.END), "fixed", trained=(1, 1, 0, 0, 1, 1))
WHOLE = Response(PROMPT, (8, 9, tiny.END), "fixed")


def test_rows_are_the_trained_tokens() -> None:
    batch = collate([MASKED, WHOLE], tiny.PAD)
    assert batch.row_counts == (4, 3)
    assert batch.num_rows == 7
    assert batch.row_labels().tolist() == [8, 9, 12, tiny.END, 8, 9, tiny.END]
    assert batch.row_sequences.tolist() == [0] * 4 + [1] * 3
    assert (batch.labels != IGNORED).equal(batch.response_mask)
    for part in (batch.select([0]), concatenated([batch, batch]).select([2]), batch.to("cpu").select([0])):
        assert part.row_labels().tolist() == [8, 9, 12, tiny.END]
    rows = batch.rows()
    assert rows.count == 7


def test_each_mean_is_over_the_trained_tokens() -> None:
    batch = collate([MASKED, WHOLE], tiny.PAD)
    groups = {"fixed": (0, 1.0)}
    [by_token] = token_weights([batch], groups, "token")
    assert torch.allclose(by_token[batch.response_mask], torch.tensor(1 / 7))
    [by_sequence] = token_weights([batch], groups, "sequence")
    assert torch.allclose(by_sequence[0].sum(), torch.tensor(0.5))
    assert by_sequence[~batch.response_mask].abs().max() == 0


def test_values_are_those_of_the_same_tokens_in_the_whole_sequence() -> None:
    model = tiny.model(3)
    batch = collate([MASKED], tiny.PAD)
    whole = collate([Response(PROMPT, MASKED.token_ids, "fixed")], tiny.PAD)
    with torch.no_grad():
        everything, kept = hidden_rows(model, whole), hidden_rows(model, batch)
        assert torch.equal(everything[[0, 1, 4, 5]], kept)
        logprobs = head_of(model).logits(kept).log_softmax(-1).gather(1, batch.row_labels()[:, None])
    mean = float(logprobs.double().mean())
    assert abs(mean_logprobs(model, [WHOLE, MASKED], tiny.PAD)[1] - mean) < 1e-5
    found = likelihood(model, [MASKED], pad_id=tiny.PAD)
    assert (found.tokens, round(found.loss, 4)) == (4, round(-mean, 4))


def test_what_is_kept_of_a_teacher_knows_which_tokens_were_asked_for() -> None:
    other = Response(PROMPT, MASKED.token_ids, "fixed")
    keys = [content_keys(collate([one], tiny.PAD))[0] for one in (MASKED, other)]
    assert keys[0] != keys[1]
    cache = TeacherHiddenCache()
    cache.retain(MASKED)
    assert cache.slot(MASKED) != NO_SLOT
    assert cache.slot(other) == NO_SLOT
    assert Sample.from_row(Sample(0, MASKED, "x", "fixed").to_row(), PROMPT).response == MASKED
