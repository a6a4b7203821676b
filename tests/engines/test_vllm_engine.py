"""The vLLM engine up to where a GPU is needed: what it asks of vLLM, and how it reads vLLM's outputs.

The stand-ins below have the fields of vLLM 0.33's classes of these names (`vllm.outputs`, `vllm.logprobs`,
`vllm.SamplingParams`, `vllm.LLM`), because vLLM itself cannot be installed without CUDA.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import tiny

from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig, VllmConfig
from stillhouse.engines.server import request_seed
from stillhouse.engines.vllm import VllmEngine, sampling_arguments, to_completion
from stillhouse.errors import ConfigError, EnvironmentFault

TOKENIZER_INFO = TokenizerInfo((tiny.END,), tiny.PAD)


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None


@dataclass
class LLM:
    """Writes with a transformers model that it loads from the folder or is given, and sleeps as vLLM does."""

    model: str
    options: dict[str, Any]
    calls: list[str] = field(default_factory=list)

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.calls = options, []
        self.asleep: set[str] = set()
        self.collective_rpc("reload_weights", kwargs={"weights_path": model})
        MADE.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        assert method == "reload_weights"
        assert "weights" not in self.asleep
        if "weights_path" in kwargs:
            assert (Path(kwargs["weights_path"]) / "model.safetensors").exists()
            self.weights = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"])
        else:
            assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
            self.weights.load_state_dict(dict(kwargs["weights_iterator"]))  # all of them, by their names
        self.calls.append(method)

    def sleep(self, level: int = 1) -> None:
        assert self.options["enable_sleep_mode"]
        assert level == 2
        with torch.no_grad():
            for weight in self.weights.parameters():
                weight.fill_(float("nan"))
        self.asleep = {"weights", "kv_cache"}
        self.calls.append("sleep")

    def wake_up(self, tags: list[str]) -> None:
        assert self.asleep.issuperset(tags)
        self.asleep.difference_update(tags)
        self.calls.append(f"wake_up {tags[0]}")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(
        self, prompts: list[dict[str, Any]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not self.asleep
        engine = TransformersConfig().build(self.weights, TOKENIZER_INFO)
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            assert one.seed is not None
            assert one.max_tokens is not None
            sampling = Sampling(max_tokens=one.max_tokens, temperature=one.temperature, logprobs=True)
            (done,) = engine.generate([ids], sampling, one.seed)
            scores = [{t: Logprob(v)} for t, v in zip(done.token_ids, done.logprobs or (), strict=True)]
            sample = CompletionOutput(
                0, "", list(done.token_ids), None, None if one.logprobs is None else scores,
                "stop" if done.finished else "length",
            )  # fmt: skip
            outputs.append(RequestOutput("0", ids, [sample]))
        return outputs


MADE: list[LLM] = []


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `vllm` with the names that the engine imports."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    MADE.clear()


def test_text_follows_the_weights_as_training_changes_them(vllm: None) -> None:
    model = tiny.model(0)
    engine = VllmEngine(
        model, TOKENIZER_INFO, VllmConfig(gpu_memory_utilization=0.3, options={"enforce_eager": True})
    )
    prompts, sampling = [[5, 9, 12], [7], [5, 9, 12]], Sampling(max_tokens=8, logprobs=True)

    def expected() -> list[tuple[int, ...]]:
        own = TransformersConfig().build(model, TOKENIZER_INFO)
        return [own.generate([p], sampling, request_seed(3, n))[0].token_ids for n, p in enumerate(prompts)]

    first = engine.generate(prompts, sampling, seed=3)
    assert [done.token_ids for done in first] == expected()
    assert first[0].token_ids != first[2].token_ids
    assert all(len(done.logprobs or ()) == len(done.token_ids) for done in first)
    engine.generate(prompts, sampling, seed=3)
    (llm,) = MADE
    assert llm.calls == ["reload_weights"]  # at its start; nothing has changed since
    optimiser = torch.optim.SGD(model.parameters(), lr=5.0)
    model(torch.tensor([[5, 9]])).logits.sum().backward()
    optimiser.step()
    second = engine.generate(prompts, sampling, seed=3)
    assert [done.token_ids for done in second] == expected()
    assert llm.calls == ["reload_weights", "reload_weights", "reset_prefix_cache"]
    assert llm.options["gpu_memory_utilization"] == 0.3
    assert llm.options["enforce_eager"] is True
    assert not list(Path(llm.options.get("model", "/nowhere")).glob("*"))


@pytest.mark.parametrize("sleep", [True, False])
def test_colocated_weights_are_handed_over_in_memory_and_vllm_sleeps_between(vllm: None, sleep: bool) -> None:
    model: Any = tiny.model(0)
    engine = VllmEngine(model, TOKENIZER_INFO, VllmConfig(mode="colocate", sleep=sleep))
    prompts, sampling = [[5, 9, 12], [7]], Sampling(max_tokens=8)
    for _ in range(3):
        own = TransformersConfig().build(model, TOKENIZER_INFO)
        wanted = [own.generate([p], sampling, request_seed(3, n))[0] for n, p in enumerate(prompts)]
        assert engine.generate(prompts, sampling, seed=3) == wanted
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
    (llm,) = MADE
    handed_over = ["reload_weights", "reset_prefix_cache"]
    woken = ["wake_up weights", *handed_over, "wake_up kv_cache", "sleep"]
    assert llm.calls[0] == "reload_weights"  # at its start, from a saved copy
    assert llm.calls[1:] == (["sleep", *woken, *woken] if sleep else [*handed_over, *handed_over])


@pytest.mark.parametrize("mode", ["saved", "colocate"])
def test_the_weights_handed_over_have_the_adapters_in_them(vllm: None, mode: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(tiny.model(0), adapters)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_A" not in name}
    engine = VllmEngine(model, TOKENIZER_INFO, VllmConfig(mode=mode))
    sampling, texts = Sampling(max_tokens=8, temperature=0.0), []
    for _ in range(2):
        wanted = TransformersConfig().build(model, TOKENIZER_INFO).generate([[5, 9, 12]], sampling, 0)
        texts.append(engine.generate([[5, 9, 12]], sampling, 0))
        assert texts[-1] == wanted
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.mul_(-5.0)
    assert texts[0] != texts[1]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in frozen.items())


def test_colocated_weights_stay_in_one_process() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1"):
        VllmConfig(mode="colocate", tensor_parallel_size=2)
    assert VllmConfig(mode="colocate").arguments(Path("folder"))["enable_sleep_mode"] is True
    assert "enable_sleep_mode" not in VllmConfig().arguments(Path("folder"))
    assert "distributed_executor_backend" not in VllmConfig().arguments(Path("folder"))
    wide = VllmConfig(tensor_parallel_size=4, options={"pipeline_parallel_size": 2})
    assert (wide.gpus, wide.arguments(Path("folder"))["distributed_executor_backend"]) == (8, "mp")
    assert list(VllmConfig(sleep=False).options_without_effect()) == ["sleep"]


def test_part_of_a_larger_set_is_written_as_in_the_whole(vllm: None) -> None:
    engine = VllmEngine(tiny.model(0), TOKENIZER_INFO, VllmConfig())
    prompts = [[5, 9], [7, 8], [3, 4]]
    whole = engine.generate(prompts, Sampling(max_tokens=6), seed=1)
    assert engine.generate(prompts[2:], Sampling(max_tokens=6), seed=1, sample_ids=[2]) == whole[2:]


def test_every_setting_has_its_name_in_vllm() -> None:
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, max_tokens=9, min_tokens=2, repetition_penalty=1.1
    )
    made = SamplingParams(seed=1, **sampling_arguments(sampling, TOKENIZER_INFO, tiny.VOCAB))
    assert made == SamplingParams(0.7, 0.9, 40, 0.05, 1.1, 1, [tiny.END], 9, 2, None, False)
    for refused in (Sampling(no_repeat_ngram_size=2), Sampling(logprobs=True, top_k=5)):
        with pytest.raises(ConfigError, match=r"engine\.sampling"):
            sampling_arguments(refused, TOKENIZER_INFO, tiny.VOCAB)


def test_padding_rows_of_the_head_are_not_drawn() -> None:
    tokenizer_info = TokenizerInfo((tiny.END,), tiny.PAD, tokenizer=range(tiny.VOCAB))
    assert sampling_arguments(Sampling(), tokenizer_info, tiny.VOCAB)["logit_bias"] is None
    biased = sampling_arguments(Sampling(), tokenizer_info, tiny.VOCAB + 2)["logit_bias"]
    assert biased == {tiny.VOCAB: -100.0, tiny.VOCAB + 1: -100.0}


def test_outputs_become_completions() -> None:
    scores = [{4: Logprob(-0.5), 9: Logprob(-0.1)}, {tiny.END: Logprob(-0.2)}]
    sample = CompletionOutput(0, "", [4, tiny.END], None, scores, "stop", tiny.END)
    done = to_completion(
        RequestOutput("0", [5], [sample]), Sampling(max_tokens=4, logprobs=True), TOKENIZER_INFO
    )
    assert (done.token_ids, done.finished, done.logprobs) == ((4, tiny.END), True, (-0.5, -0.2))


def test_without_vllm_the_message_says_how_to_get_it() -> None:
    if "vllm" in sys.modules:
        pytest.skip("vllm is installed here")
    with pytest.raises(EnvironmentFault, match=r"stillhouse\[vllm\]"):
        VllmConfig().build(tiny.model(0), TOKENIZER_INFO)


def test_its_settings_can_be_written_and_read_back() -> None:
    config = VllmConfig(tensor_parallel_size=2, max_model_len=4096, options={"enforce_eager": True})
    assert VllmConfig.model_validate(json.loads(config.model_dump_json())) == config
    arguments = config.arguments(Path("folder"))
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["max_model_len"] == 4096
    assert arguments["skip_tokenizer_init"] is True
