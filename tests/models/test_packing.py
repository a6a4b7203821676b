"""Packed sequences: the hidden states of padded ones, or padded batches and a line that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.core.batch import TokenBatch
from stillhouse.core.types import Response
from stillhouse.evaluate.likelihood import likelihood
from stillhouse.models import choose_packing, compile_layers, hidden_rows, layer_rows
from stillhouse.models.packing import packs
from stillhouse.rollouts.offline.scoring import mean_logprobs

SIZE = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": tiny.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
WINDOW = {**SIZE, "sliding_window": 4}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FALCON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
}


def built(kind: str, options: dict[str, Any], attention: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def batch(length: int | None = None) -> TokenBatch:
    """Sequences longer and shorter than the window, one with a masked token, one of two tokens."""
    ids = [tuple(range(3, 24)), (9, 8, 7, 6, 5, 4, 3), (5, 1)]
    return TokenBatch.of(ids, [4, 1, 1], 0, length, [None, (1, 1, 0, 1, 1, 1), None])


def states_and_gradient(model: nn.Module, given: TokenBatch) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    hidden, layers = layer_rows(model, given, [0.0, 0.5])
    found = torch.cat([hidden, *layers.values()])
    found.pow(3).sum().backward()
    slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach(), torch.cat(slopes)


@pytest.mark.parametrize(
    ("kind", "options", "attention"),
    [
        ("llama", SIZE, "sdpa"), ("llama", SIZE, "eager"), ("gpt2", GPT2, "sdpa"), ("gpt2", GPT2, "eager"),
        ("opt", {**SIZE, "word_embed_proj_dim": 16}, "sdpa"), ("mistral", WINDOW, "sdpa"),
        ("mistral", WINDOW, "eager"), ("gemma3_text", ALTERNATING, "sdpa"), ("gemma2", ALTERNATING, "eager"),
    ],
)  # fmt: skip
def test_states_and_gradient_are_those_of_the_padded_batch(
    kind: str, options: dict[str, Any], attention: str
) -> None:
    model = built(kind, options, attention)
    expected = states_and_gradient(model, batch())
    assert choose_packing(model, "on") is None
    assert packs(model)
    for given in (batch(), batch(40)):
        found = states_and_gradient(model, given)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_gradient_checkpointing_computes_the_same_attention_again() -> None:
    model = tiny.model(3)
    expected = states_and_gradient(model, batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert choose_packing(model, "on") is None
    for ours, theirs in zip(states_and_gradient(model, batch()), expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("qwen3_next", {**SIZE, "num_experts": 2, "num_experts_per_tok": 1,
                        "layer_types": ["linear_attention", "full_attention"],
                        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
                        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 8}, "it cannot pack"),
        ("bloom", {"vocab_size": tiny.VOCAB, "hidden_size": 16, "n_layer": 1, "n_head": 2},
         "takes no positions"),
        ("falcon", FALCON, "differ by"),
        ("falcon", {**FALCON, "alibi": True}, "ALiBi"),
    ],
)  # fmt: skip
def test_what_would_leak_from_one_sequence_to_the_next_stays_padded(
    kind: str, options: dict[str, Any], reason: str
) -> None:
    model = built(kind, options)
    with torch.no_grad():
        expected = hidden_rows(model, batch())
        note = choose_packing(model, "on")
        assert note is not None
        assert reason in note
        assert "reads padded batches" in note
        assert not packs(model)
        assert torch.equal(hidden_rows(model, batch()), expected)


def test_in_half_precision_other_layers_than_attention_are_refused_by_name() -> None:
    """A short convolution leaks as little as rounding in bfloat16 does."""
    sizes = {**SIZE, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    model = built("lfm2", sizes)
    assert "not attention" in (choose_packing(model, "on", torch.bfloat16) or "")
    assert choose_packing(tiny.model(1, dtype=torch.bfloat16), "on") is None


def test_auto_leaves_everything_on_a_cpu_as_it_is() -> None:
    model = tiny.model(1)
    expected = hidden_rows(model, batch())
    assert choose_packing(model, "auto") is None
    assert not packs(model)
    assert torch.equal(hidden_rows(model, batch()), expected)


def test_off_undoes_on_and_a_batch_without_padding_is_read_as_it_is() -> None:
    model = tiny.model(1)
    even = TokenBatch.of([(3, 4, 5), (6, 7, 8)], [1, 1], 0)
    expected = hidden_rows(model, even), hidden_rows(model, batch())
    choose_packing(model, "on")
    assert torch.equal(hidden_rows(model, even), expected[0])
    choose_packing(model, "off")
    assert torch.equal(hidden_rows(model, batch()), expected[1])


def test_the_attention_without_packed_sequences_is_the_one_of_transformers() -> None:
    """Text is written with the same model, by calls that say nothing of sequences."""
    model = tiny.model(1)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]])).logits
        choose_packing(model, "on")
        assert torch.equal(model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]])).logits, expected)


def test_likelihoods_of_given_text_are_the_same() -> None:
    student, teacher = tiny.model(1), tiny.model(2, width=24)
    given: list[Response] = tiny.responses(6)
    before = likelihood(student, given, tiny.PAD, teacher=teacher)
    scored = mean_logprobs(teacher, given, tiny.PAD)
    for model in (student, teacher):
        assert choose_packing(model, "on") is None
    after = likelihood(student, given, tiny.PAD, teacher=teacher)
    assert after.loss == pytest.approx(before.loss, rel=1e-5)
    assert after.fidelity is not None
    assert before.fidelity is not None
    assert after.fidelity.as_metrics() == pytest.approx(before.fidelity.as_metrics(), rel=1e-4)
    assert mean_logprobs(teacher, given, tiny.PAD) == pytest.approx(scored, rel=1e-5)


def test_compiled_layers_are_not_compiled_anew_for_other_numbers_of_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # of what other tests have compiled of the same code
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: compiled(run, backend=counter, **options))
    plain, model = tiny.model(1), tiny.model(1)
    choose_packing(model, "on")
    compile_layers(model)
    counts = []
    for number in (2, 3, 5):
        given = TokenBatch.of([tuple(range(2, 6 + 2 * place)) for place in range(number)], [1] * number, 0)
        torch.testing.assert_close(hidden_rows(model, given), hidden_rows(plain, given))
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts
