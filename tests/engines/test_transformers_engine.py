"""The transformers engine writes what `generate` would, whatever shares a batch, also in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, TOKENIZER_INFO, VOCAB, some_prompts, tiny
from transformers import GenerationConfig

from stillhouse.engines import REGISTRY, Sampling, TokenizerInfo, TransformersConfig
from stillhouse.engines.prefill import MIN_PREFILL_TOKENS, group_by_length
from stillhouse.engines.sampling import Sampler, uniforms
from stillhouse.engines.transformers import bfloat16_copy
from stillhouse.errors import ConfigError, EngineError

GREEDY = Sampling(temperature=0.0, max_tokens=24)


def write(
    model: Any, prompts: list[list[int]], sampling: Sampling, batch_size: int = 64, seed: int = 0
) -> Any:
    return (
        TransformersConfig(batch_size=batch_size)
        .build(model, TOKENIZER_INFO)
        .generate(prompts, sampling, seed)
    )


def generated(model: Any, prompt: list[int], sampling: Sampling) -> tuple[int, ...]:
    """What transformers writes for one prompt, greedily."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=list(TOKENIZER_INFO.eos_ids),
        pad_token_id=0,
        min_new_tokens=sampling.min_tokens or None, repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
    )  # fmt: skip
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_is_that_of_generate_token_for_token(kind: str) -> None:
    model = tiny(kind)
    prompts = some_prompts(12)
    got = write(model, prompts, GREEDY, batch_size=5)
    assert [c.token_ids for c in got] == [generated(model, prompt, GREEDY) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.4},
        {"min_tokens": 15},
        {"no_repeat_ngram_size": 1},
    ],
)
def test_greedy_with_penalties_is_that_of_generate(options: dict[str, Any]) -> None:
    model = tiny()
    prompts = some_prompts(8)
    sampling = Sampling(temperature=0.0, max_tokens=24, **options)
    got = write(model, prompts, sampling, batch_size=3)
    assert [c.token_ids for c in got] == [generated(model, prompt, sampling) for prompt in prompts]
    assert [c.token_ids for c in got] != [c.token_ids for c in write(model, prompts, GREEDY)]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mamba"])
def test_text_depends_on_neither_batch_size_nor_company(kind: str) -> None:
    model = tiny(kind)
    prompts = some_prompts(30)
    sampling = Sampling(max_tokens=30)
    texts = [
        [c.token_ids for c in write(model, prompts, sampling, batch_size, seed=3)]
        for batch_size in (1, 4, 7, 64)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert texts[0][:9] == [c.token_ids for c in write(model, prompts[:9], sampling, 4, seed=3)]
    assert texts[0] != [c.token_ids for c in write(model, prompts, sampling, 4, seed=4)]


def test_completions_end_with_eos_exactly_if_finished_and_keep_the_limit() -> None:
    completions = write(tiny(), some_prompts(60), Sampling(max_tokens=30), batch_size=8)
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert c.finished == (c.token_ids[-1] == 2)
        assert 2 not in c.token_ids[:-1]
        assert len(c.token_ids) == 30 or c.finished


SETTINGS = [
    {}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"min_tokens": 6},
    {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}, {"temperature": 0.0},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "mamba"])
def test_logprobs_equal_those_of_a_full_forward_pass(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind)
    prompts = some_prompts(14)
    sampling = Sampling(max_tokens=20, logprobs=True, **options)
    sampler = Sampler(sampling, torch.tensor(TOKENIZER_INFO.eos_ids))
    for prompt, completion in zip(prompts, write(model, prompts, sampling, batch_size=4), strict=True):
        text = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=text[None, :-1]).logits[0, len(prompt) - 1 :]
        for place, token in enumerate(completion.token_ids):
            history = text[None, : len(prompt) + place]
            scores = sampler.process_logits(logits[place, None].clone(), history, torch.tensor([place]))
            assert completion.logprobs is not None
            assert completion.logprobs[place] == pytest.approx(
                float(scores.log_softmax(-1)[0, token]), abs=1e-4
            )


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_tokens_follow_the_model_s_probabilities(kind: str) -> None:
    model = tiny(kind, vocab=12)
    prompt, count = [5, 7, 3], 4000
    completions = write(
        model, [prompt] * count, Sampling(temperature=1.5, max_tokens=2), batch_size=500, seed=11
    )
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
        branches = torch.tensor([[*prompt, token] for token in range(12)])
        second = (model(input_ids=branches).logits[:, -1] / 1.5).softmax(-1)
    joint = (first[:, None] * second).clone()
    joint[2] = 0.0
    joint[2, 0] = first[2]  # a text that ends at once has no second token
    seen = torch.zeros(12, 12)
    for c in completions:
        seen[c.token_ids[0], c.token_ids[1] if len(c.token_ids) == 2 else 0] += 1
    expected = (joint * count).flatten()
    usual = expected >= 5
    assert expected[usual].sum() > 0.9 * count
    observed, predicted = seen.flatten()[usual], expected[usual]
    if (rare := expected[~usual].sum()) > 0:
        observed = torch.cat([observed, seen.flatten()[~usual].sum()[None]])
        predicted = torch.cat([predicted, rare[None]])
    statistic = float(((observed - predicted) ** 2 / predicted).sum())
    freedom = len(observed) - 1
    assert freedom > 20
    spread = 2 / (9 * freedom)
    # Wilson-Hilferty: the cube root of a chi-square over its degrees of freedom is nearly normal.
    assert abs((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < 3.3


@given(st.lists(st.integers(1, 400), min_size=1, max_size=80))
def test_prompts_are_run_with_others_of_about_their_length(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    prompts = [[5] * length for length in lengths]
    groups = group_by_length(list(range(len(prompts))), prompts)
    assert [index for group in groups for index in group] == list(range(len(prompts)))
    for group in groups:
        padded = len(group) * lengths[group[0]]
        close = all(lengths[index] * 4 >= lengths[group[0]] * 3 for index in group)
        assert close or padded < MIN_PREFILL_TOKENS + lengths[group[0]]
    for group in groups[:-1]:
        assert len(group) * lengths[group[0]] >= MIN_PREFILL_TOKENS


def test_uniform_numbers_belong_to_seed_prompt_and_position() -> None:
    whole = uniforms(7, range(5), 9)
    assert torch.equal(uniforms(7, [3, 1], 4), whole[[3, 1], :4])
    assert len(set(whole.flatten().tolist())) == 45
    assert not torch.equal(uniforms(8, range(5), 9), whole)
    assert uniforms(-1, [0], 2).shape == (1, 2)


def test_a_model_in_training_goes_on_training_as_if_nothing_had_been_written() -> None:
    def steps(write_between: bool) -> list[torch.Tensor]:
        model: Any = tiny()
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.model.layers[0].eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        batch = torch.tensor(some_prompts(1, longest=1) * 8 + [[4]]).repeat(1, 12)
        torch.manual_seed(5)
        for _ in range(2):
            if write_between:
                write(model, some_prompts(6), Sampling(max_tokens=12), batch_size=2)
            modes = [module.training for module in model.modules()]
            assert True in modes
            assert model.model.layers[0].training is False
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.config.use_cache is False
        assert model.is_gradient_checkpointing
        return [parameter.detach().clone() for parameter in model.parameters()]

    for with_text, without in zip(steps(True), steps(False), strict=True):
        assert torch.equal(with_text, without)


def test_weights_are_read_as_they_are_at_each_call() -> None:
    model = tiny()
    engine = TransformersConfig().build(model, TOKENIZER_INFO)
    before = engine.generate(some_prompts(4), GREEDY, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1.0)
    after = engine.generate(some_prompts(4), GREEDY, 0)
    assert before != after
    assert after == write(model, some_prompts(4), GREEDY)


def test_rounded_weights_write_nearly_the_same_and_leave_the_model_alone() -> None:
    model: Any = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts, sampling = some_prompts(8), Sampling(max_tokens=12, logprobs=True)
    rounded = TransformersConfig(dtype="bfloat16").build(model, TOKENIZER_INFO).generate(prompts, sampling, 0)
    exact = write(model, prompts, sampling)
    first = torch.tensor([[a.logprobs[0], b.logprobs[0]] for a, b in zip(rounded, exact, strict=True)])
    assert 0 < (first[:, 0] - first[:, 1]).abs().median() < 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    copied = bfloat16_copy(model)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    tied = tiny("gpt2")
    assert len(list(bfloat16_copy(tied).parameters())) == len(list(tied.parameters()))


def test_wrapped_models_write_the_same_text_with_their_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    prompts = some_prompts(6)
    bare = [c.token_ids for c in write(tiny(), prompts, GREEDY)]
    adapted: Any = get_peft_model(
        tiny(), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    )
    merged = get_peft_model(tiny(), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    merged.load_state_dict(adapted.state_dict())
    texts = [c.token_ids for c in write(adapted, prompts, GREEDY)]
    assert texts != bare
    assert texts == [c.token_ids for c in write(merged.merge_and_unload(), prompts, GREEDY)]


def test_a_model_under_ddp_writes_the_same_text() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny().train())
        assert write(wrapped, some_prompts(4), GREEDY) == write(tiny(), some_prompts(4), GREEDY)
        wrapped(input_ids=torch.tensor([[4, 5]]), labels=torch.tensor([[4, 5]])).loss.backward()
    finally:
        dist.destroy_process_group()


def test_the_model_s_own_generation_settings_do_not_leak_in() -> None:
    prompts = some_prompts(4)
    for kind in ("llama", "mamba"):
        plain = write(tiny(kind), prompts, GREEDY)
        model: Any = tiny(kind)
        model.generation_config = GenerationConfig(
            repetition_penalty=1.9, top_k=2, do_sample=True, suppress_tokens=[5]
        )
        assert write(model, prompts, GREEDY) == plain
        assert model.generation_config.repetition_penalty == 1.9


def test_the_limit_on_cached_tokens_bounds_the_batch_and_not_the_text() -> None:
    model, prompts, sampling = tiny(), some_prompts(12), Sampling(max_tokens=10)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    text = TransformersConfig(batch_tokens=90).build(model, TOKENIZER_INFO).generate(prompts, sampling, 0)
    handle.remove()
    assert max(seen) == 90 // (max(map(len, prompts)) + 10)
    assert text == write(model, prompts, sampling)


def test_progress_counts_every_completion_once() -> None:
    told: list[tuple[int, int]] = []
    TransformersConfig(batch_size=3).build(tiny(), TOKENIZER_INFO).generate(
        some_prompts(10), Sampling(max_tokens=6), 0, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(done, 10) for done in range(1, 11)]


def test_several_end_of_sequence_tokens_all_end_a_text_and_none_ends_no_text() -> None:
    prompts = some_prompts(30)
    several = (
        TransformersConfig()
        .build(tiny(), TokenizerInfo((2, 9, 11), 0))
        .generate(prompts, Sampling(max_tokens=30), 0)
    )
    assert {c.token_ids[-1] for c in several if c.finished} == {2, 9, 11}
    none = (
        TransformersConfig().build(tiny(), TokenizerInfo((), 0)).generate(prompts, Sampling(max_tokens=30), 0)
    )
    assert {len(c.token_ids) for c in none} == {30}
    assert not any(c.finished for c in none)


def test_logits_that_leave_nothing_to_draw_are_an_error_not_a_token() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="not finite"):
            write(model, [[5]], Sampling(temperature=temperature, max_tokens=2))
    with pytest.raises(EngineError, match="no_repeat_ngram_size"):
        write(tiny(vocab=12), [[5]], Sampling(no_repeat_ngram_size=1, min_tokens=12, max_tokens=12))


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_padding_rows_of_the_head_are_never_drawn(kind: str) -> None:
    """A head of 67 rows, a tokenizer of 40 ids: the others have no text and may be unknown to the teacher."""
    model, tokenizer_info = (
        tiny(kind),
        TokenizerInfo(TOKENIZER_INFO.eos_ids, TOKENIZER_INFO.pad_id, tokenizer=range(40)),
    )
    prompts, sampling = some_prompts(12, vocab=40), Sampling(max_tokens=8, logprobs=True)
    free = TransformersConfig().build(model, TOKENIZER_INFO).generate(prompts, sampling, 0)
    assert max(token for done in free for token in done.token_ids) >= 40
    for prompt, done in zip(
        prompts, TransformersConfig().build(model, tokenizer_info).generate(prompts, sampling, 0), strict=True
    ):
        assert max(done.token_ids) < 40
        ids = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1, :40]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(done.logprobs), wanted, atol=1e-4, rtol=1e-4)


def test_no_prompts_give_no_completions() -> None:
    assert write(tiny(), [], GREEDY) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_whole_context_can_be_used_but_no_more(kind: str) -> None:
    model = tiny(kind)
    assert len(write(model, [[5] * 90, [6]], Sampling(max_tokens=6, min_tokens=6), 1)[0].token_ids) == 6
    with pytest.raises(ConfigError, match=r"engine\.sampling\.max_tokens.*90 tokens.*96.*at most 6"):
        write(model, [[5] * 90], Sampling(max_tokens=7))
    with pytest.raises(EngineError, match="prompt 1: has 96 tokens"):
        write(model, [[5], [5] * 96], Sampling(max_tokens=1))


def test_prompts_that_no_model_can_take_are_refused() -> None:
    with pytest.raises(EngineError, match="prompt 1: is empty"):
        write(tiny(), [[5], []], GREEDY)
    with pytest.raises(EngineError, match=f"prompt 0: holds token ids 3 to {VOCAB}"):
        write(tiny(), [[3, VOCAB]], GREEDY)


def test_the_engine_is_made_from_its_configuration() -> None:
    config = REGISTRY.parse(
        {"kind": "transformers", "batch_size": 2, "sampling": {"temperature": 0.0, "max_tokens": 3}}
    )
    assert config.sampling == Sampling(temperature=0.0, max_tokens=3)
    assert len(config.build(tiny(), TOKENIZER_INFO).generate([[5]], config.sampling, 0)) == 1
    with pytest.raises(ValueError, match="top_p"):
        REGISTRY.parse({"kind": "transformers", "sampling": {"top_p": 1.5}})


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_some_prompts_under_their_numbers_get_the_text_of_the_whole_set(kind: str) -> None:
    engine = TransformersConfig(batch_size=3).build(tiny(kind), TOKENIZER_INFO)
    prompts, sampling = some_prompts(9), Sampling(max_tokens=12)
    whole = engine.generate(prompts, sampling, seed=5)
    places = [7, 2, 8]
    some = engine.generate([prompts[place] for place in places], sampling, 5, sample_ids=places)
    assert [one.token_ids for one in some] == [whole[place].token_ids for place in places]
    unnumbered = engine.generate([prompts[place] for place in places], sampling, 5)
    assert [one.token_ids for one in unnumbered] != [one.token_ids for one in some]
