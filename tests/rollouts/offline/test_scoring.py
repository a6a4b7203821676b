"""Likelihoods of whole responses, against a plain forward pass."""

from __future__ import annotations

import torch
from tests import tiny

from stillhouse.rollouts.offline.scoring import mean_logprobs


def test_mean_log_probabilities_are_those_of_a_forward_pass() -> None:
    model, given = tiny.model(3), tiny.responses(9)
    model.train()
    got = mean_logprobs(model, given, tiny.PAD, tiny.VOCAB, batch_size=4)
    assert model.training
    model.eval()
    for value, response in zip(got, given, strict=True):
        ids = torch.tensor([[*response.prompt.token_ids, *response.token_ids]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        tokens = log_probs.gather(1, ids[0, 1:, None])[-len(response.token_ids) :]
        assert abs(value - tokens.mean().item()) < 1e-5
    assert (
        mean_logprobs(model, given[:1], tiny.PAD, tiny.VOCAB)[0]
        == mean_logprobs(model, given[:1], tiny.PAD)[0]
    )
