"""Every step from logits to tokens against the processor of that name in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stillhouse.engines.base import Sampling
from stillhouse.engines.sampling import PAD, Sampler, inverse_cdf

EOS = torch.tensor([2, 5])


def reference(sampling: Sampling, generated: int, prompt_length: int) -> LogitsProcessorList:
    chain: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.min_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_length, sampling.min_tokens, EOS))
    if sampling.temperature > 0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chain.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            chain.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(chain)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 20, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4]),
    min_tokens=st.integers(0, 9),
    no_repeat_ngram_size=st.integers(0, 5),
    repetition_penalty=st.sampled_from([0.6, 1.0, 1.3]),
    vocab=st.sampled_from([7, 60, 1300]),
    length=st.integers(1, 14),
    seed=st.integers(0, 10**6),
)
def test_scores_equal_those_of_transformers(vocab: int, length: int, seed: int, **options: Any) -> None:
    sampling = Sampling(**options)
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocab, generator=rng) * 3
    history = torch.randint(0, min(vocab, 8), (4, length), generator=rng)
    generated = min(4, length - 1)
    expected = reference(sampling, generated, length - generated)(history, logits.clone())
    assume(bool((expected > -torch.inf).any(1).all()))
    padded = torch.cat([torch.full((4, 3), PAD), history], 1)
    got = Sampler(sampling, EOS).process_logits(logits.clone(), padded, torch.full((4,), generated))
    # Rounding may put a token of tiny probability on either side of top_p, so probabilities are compared too.
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), atol=2e-6, rtol=1e-5)
    both = (got > -torch.inf) & (expected > -torch.inf)
    torch.testing.assert_close(
        got.log_softmax(-1)[both], expected.log_softmax(-1)[both], atol=1e-5, rtol=1e-5
    )


def test_top_p_looks_past_its_first_prefix() -> None:
    # A flat distribution over 5,000 tokens: the nucleus of 0.9 is 4,500 tokens, whichever they are.
    scores = Sampler(Sampling(top_p=0.9), EOS).process_logits(
        torch.zeros(2, 5000), torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    )
    assert (scores > -torch.inf).sum(-1).tolist() == pytest.approx([4500, 4500], abs=2)


@pytest.mark.parametrize("vocab", [3, 255, 256, 257, 1000, 50_257])
def test_inverse_cdf_is_the_inverse_of_the_cumulative_sum(vocab: int) -> None:
    rng = torch.Generator().manual_seed(vocab)
    weights = torch.rand(64, vocab, generator=rng).pow(8)
    weights[:, ::3] = 0.0
    weights[0] = 0.0
    weights[0, vocab - 1] = 1e-30
    uniform = torch.rand(64, generator=rng, dtype=torch.float64)
    uniform[1], uniform[2] = 0.0, 1 - 2**-53
    tokens = inverse_cdf(weights, uniform)
    assert (weights.gather(1, tokens[:, None]) > 0).all()
    cumulative = weights.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    above = cumulative.gather(1, tokens[:, None]).squeeze(1)
    below = above - weights.double().gather(1, tokens[:, None]).squeeze(1) / weights.double().sum(1)
    assert (below <= uniform + 1e-6).all()
    assert (uniform < above + 1e-6).all()


def test_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2
    history = torch.zeros(50, 1, dtype=torch.long)
    sampler = Sampler(Sampling(temperature=0.6, top_k=7, top_p=0.8, logprobs=True), EOS)
    generated = torch.zeros(50, dtype=torch.long)
    expected = sampler.process_logits(logits.clone(), history, generated).log_softmax(-1)
    tokens, logprobs = sampler.sample(logits, history, generated, torch.rand(50))
    assert logprobs is not None
    torch.testing.assert_close(logprobs, expected.gather(1, tokens[:, None]).squeeze(1))
