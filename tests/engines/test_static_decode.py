"""The decoding step of fixed shape: the text of the growing cache, and nothing read from the device."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from tests.no_sync import NoHostSync
from tiny_models import ARCHITECTURES, TOKENIZER_INFO, VOCAB, some_prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.engines import Sampling, TransformersConfig
from stillhouse.engines.kv_cache import PreallocatedCache
from stillhouse.engines.mixture import MixtureEngine, MixtureModel
from stillhouse.engines.prefill import NextTokenLogits, Prefilled
from stillhouse.engines.sampling import Sampler
from stillhouse.engines.slot_cache import SlotMasks
from stillhouse.engines.static_decode import StaticDecoder, StaticDecoding
from stillhouse.engines.static_step import DecodeBuffers, DecodeStep
from stillhouse.errors import EngineError

STATIC = [kind for kind in ARCHITECTURES if kind not in ("bloom", "mamba")]
EVERYTHING = {
    "temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "min_tokens": 6,
    "repetition_penalty": 0.8, "no_repeat_ngram_size": 4,
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 0.0, "no_repeat_ngram_size": 1},
    {"temperature": 0.0, "no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
]
CASES = [
    *(("llama", options) for options in SETTINGS),
    *((kind, options) for kind in STATIC for options in ({}, EVERYTHING)),
]


class FirstOfKey:
    """Runs, as a graph would, what the first step of a key did, whatever later steps ask for."""

    def __init__(self) -> None:
        self.steps: dict[Hashable, Callable[[], None]] = {}
        self.forgotten = 0

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        self.steps.setdefault(key, step)()

    def forget(self) -> None:
        self.steps.clear()
        self.forgotten += 1


def engine(model: Any, kv_cache: Any, batch_size: int = 64) -> Any:
    return TransformersConfig(batch_size=batch_size, kv_cache=kv_cache).build(model, TOKENIZER_INFO)


def texts(completions: Any) -> list[tuple[tuple[int, ...], bool]]:
    return [(one.token_ids, one.finished) for one in completions]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_text_is_that_of_the_growing_cache(kind: str, options: dict[str, Any]) -> None:
    model, prompts = tiny(kind), some_prompts(12)
    sampling = Sampling(max_tokens=24, logprobs=True, **options)
    grown = engine(model, "growing").generate(prompts, sampling, seed=3)
    for batch_size in (64, 5):
        fixed = engine(model, "static", batch_size).generate(prompts, sampling, seed=3)
        assert texts(fixed) == texts(grown)
        for one, other in zip(fixed, grown, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_step_kept_from_an_earlier_call_writes_the_text_of_the_weights_of_now() -> None:
    """Other prompts, seeds, batches and weights: what a graph has in it must not depend on them."""
    model: Any = tiny().requires_grad_(False)
    decoder = StaticDecoder(model, TOKENIZER_INFO, num_layers=2)
    decoder.replay = replay = FirstOfKey()
    for call, (count, longest, tokens) in enumerate([(90, 20, 60), (9, 8, 24), (12, 8, 24), (3, 60, 30)]):
        model.lm_head.weight.neg_()
        prompts = some_prompts(count, longest, seed=call)
        for sampling in (Sampling(max_tokens=tokens), Sampling(max_tokens=tokens, temperature=0.0)):
            got: dict[int, Any] = {}
            decoder.run(prompts, sampling, call, 80, got.__setitem__)
            wanted = engine(model, "growing").generate(prompts, sampling, call)
            assert texts(got[index] for index in range(count)) == texts(wanted)
    assert {key[0] for key in replay.steps} == {80, 40, 16, 4}  # type: ignore[index]
    assert replay.forgotten == 0
    decoder.run(some_prompts(2), Sampling(max_tokens=200), 0, 4, lambda *_: None)
    assert replay.forgotten == 1  # the buffers were too small


def test_fewer_slots_are_read_when_the_long_texts_are_done() -> None:
    """Rows that are finished may have texts that reach beyond the slots that the others still need."""
    torch.manual_seed(0)
    config: Any = {**ARCHITECTURES["llama"], "max_position_embeddings": 512, "vocab_size": VOCAB}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for length in [150] * 12 + [4] * 18]
    decoder = StaticDecoder(model, TOKENIZER_INFO, num_layers=2)
    decoder.replay = replay = FirstOfKey()
    sampling, slots = Sampling(max_tokens=40), []
    with torch.no_grad():
        for rows in (16, 7):
            got: dict[int, Any] = {}
            decoder.run(prompts, sampling, 3, rows, got.__setitem__)
            wanted = engine(model, "growing").generate(prompts, sampling, 3)
            assert texts(got[index] for index in range(30)) == texts(wanted)
            slots.append([key[1] for key in replay.steps])  # type: ignore[index]
            replay.forget()
    assert slots == [[256, 128], [256, 128]]


def test_weights_that_have_moved_are_found() -> None:
    model: Any = tiny()
    made, static = engine(model, "static"), StaticDecoding(TOKENIZER_INFO, "static")
    prompts, sampling = some_prompts(4), Sampling(max_tokens=12)
    before = static.decoder(model, 2, prompts, trained=True)
    assert before is not None
    assert static.decoder(model, 2, prompts, trained=True) is before
    for weight in (model.lm_head.weight.neg(), model.lm_head.weight.roll(1, 0)):
        model.lm_head.weight = torch.nn.Parameter(weight.detach())
        wanted = engine(model, "growing").generate(prompts, sampling, 0)
        assert texts(made.generate(prompts, sampling, 0)) == texts(wanted)
        assert static.decoder(model, 2, prompts, trained=True) is not before


def test_a_model_that_is_not_trained_has_no_buffers_between_its_calls() -> None:
    static = StaticDecoding(TOKENIZER_INFO, "static")
    once, again = (static.decoder(tiny(), 2, [[5, 6]], trained=False) for _ in range(2))
    assert once is not None
    assert again is not once


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_a_mixture_of_models_with_other_masks_writes_the_text_of_the_growing_cache(
    options: dict[str, Any],
) -> None:
    mixture = MixtureModel(tiny("llama"), tiny("gemma3_text", seed=1), 0.4, VOCAB)
    prompts, sampling = some_prompts(9), Sampling(max_tokens=24, **options)
    fixed, grown = (MixtureEngine(mixture, TOKENIZER_INFO, 5, kind) for kind in ("static", "growing"))
    assert fixed.static.decoder(mixture, sum(mixture.num_layers), prompts, trained=True) is not None
    wanted = grown.generate(prompts, sampling, 3)
    assert texts(fixed.generate(prompts, sampling, 3)) == texts(wanted)
    assert fixed.generate([], sampling, 3) == []
    beside = MixtureEngine.beside(engine(tiny(), "growing", 3), mixture, TOKENIZER_INFO)
    assert (beside.batch_size, beside.static.kv_cache) == (3, "growing")


@pytest.mark.parametrize("kind", STATIC)
def test_a_step_reads_nothing_from_the_device_and_brings_nothing_to_it(kind: str) -> None:
    """On a device without memory: a number that the step asks for, or copies there, is an error."""
    model: Any = tiny(kind).to("meta")
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = PreallocatedCache(2, capacity=8)
    empty = torch.empty(1, heads, 8, 8, device="meta")
    for layer in range(2):
        cache.update(empty, empty, layer)
    example = Prefilled(cache, torch.empty(1, 8, device="meta"), torch.empty(1), None, [8])
    buffers = DecodeBuffers.allocate(example, rows=4, capacity=32)
    eos = torch.tensor(TOKENIZER_INFO.eos_ids, device="meta")
    for options in (*SETTINGS, EVERYTHING):
        sampler = Sampler(Sampling(logprobs=True, **options), eos, static=True)
        masks = SlotMasks(model.config)
        step = DecodeStep(NextTokenLogits(model, VOCAB - 7), masks, sampler, eos, max_tokens=20)
        with torch.no_grad(), NoHostSync():
            step(buffers)


@pytest.mark.parametrize(("kind", "why"), [("bloom", "RuntimeError|ValueError|differ"), ("mamba", "not all")])
def test_an_architecture_without_such_a_step_says_so_once(
    kind: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompts, sampling = tiny(kind), some_prompts(5), Sampling(max_tokens=8)
    made = engine(model, "static")
    with caplog.at_level(logging.WARNING):
        got = [made.generate(prompts, sampling, 1) for _ in range(2)]
    assert texts(got[0]) == texts(engine(model, "growing").generate(prompts, sampling, 1))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stillhouse"]
    assert type(model).__name__ in line
    assert "without CUDA graphs" in line
    assert any(one in line for one in why.split("|"))


def test_a_model_whose_step_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = StaticDecoder(tiny(), TOKENIZER_INFO, num_layers=2)
    with torch.no_grad():
        assert decoder.why_not([5, 9, 12, 4, 20]) is None
        monkeypatch.setattr(decoder, "masks", lambda cache: torch.zeros(3, 1, 1, 16))
        assert "logits then differ" in str(decoder.why_not([5, 9, 12, 4, 20]))
        tiny_flash: Any = tiny()
        tiny_flash.config._attn_implementation = "flash_attention_2"
        flash = StaticDecoder(tiny_flash, TOKENIZER_INFO, num_layers=2)
        assert flash.why_not([5]) == "its attention implementation is flash_attention_2"


def test_logits_that_leave_nothing_to_draw_are_an_error_and_harm_no_later_text() -> None:
    model, prompts = tiny(), [[5, 6, 7], [8]]
    made = engine(model, "static")
    with pytest.raises(EngineError, match="no_repeat_ngram_size"):
        made.generate(prompts, Sampling(no_repeat_ngram_size=1, min_tokens=90, max_tokens=90), 0)
    sampling = Sampling(max_tokens=90)
    wanted = engine(model, "growing").generate(prompts, sampling, 0)
    assert texts(made.generate(prompts, sampling, 0)) == texts(wanted)


def test_eager_attention_takes_its_own_form_of_mask() -> None:
    for kind in ("llama", "gemma3_text"):
        model: Any = tiny(kind)
        model.set_attn_implementation("eager")
        decoder = StaticDecoder(model, TOKENIZER_INFO, num_layers=2)
        with torch.no_grad():
            assert decoder.why_not(some_prompts(1, seed=4)[0]) is None
