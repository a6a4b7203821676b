"""Under mixed precision the engine writes the same text with each weight cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import TOKENIZER_INFO, some_prompts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from stillhouse.engines import Sampling, TransformersConfig
from stillhouse.engines.base import Engine

GREEDY = Sampling(temperature=0.0, max_tokens=24)


def engine(model: Any) -> Engine:
    """The engine over a model."""
    return TransformersConfig().build(model, TOKENIZER_INFO)


@pytest.fixture
def mixed() -> Iterator[Accelerator]:
    """Accelerate with bfloat16 for mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's training may have set it
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def casts_of(weights: Iterable[torch.Tensor], run: Callable[[], Any]) -> tuple[int, Any]:
    """How often one of some weights is cast while something runs, and what comes of it."""
    addresses = {weight.data_ptr() for weight in weights}
    casts = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal casts
            casts += func is torch.ops.aten._to_copy.default and args[0].data_ptr() in addresses
            return func(*args, **(kwargs or {}))

    with Count():
        result = run()
    return casts, result


def test_mixed_precision_casts_weights_once_for_a_whole_text(mixed: Accelerator) -> None:
    model: Any = mixed.prepare_model(tiny())
    prompts = some_prompts(4)

    def step_by_step() -> list[tuple[int, ...]]:
        model.eval()
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=24, eos_token_id=list(TOKENIZER_INFO.eos_ids), pad_token_id=0
        )
        ids = [torch.tensor([prompt]) for prompt in prompts]
        texts = [
            model.generate(one, attention_mask=torch.ones_like(one), generation_config=settings)
            for one in ids
        ]
        return [tuple(text[0, one.shape[1] :].tolist()) for text, one in zip(texts, ids, strict=True)]

    weight = model.model.layers[0].mlp.up_proj.weight
    many, wanted = casts_of([weight], step_by_step)
    once, got = casts_of([weight], lambda: engine(model).generate(prompts, GREEDY, 0))
    assert (many > 20, once) == (True, 1)
    assert [c.token_ids for c in got] == wanted


def test_text_written_within_autocast_leaves_no_weight_without_gradient(mixed: Accelerator) -> None:
    model: Any = mixed.prepare_model(tiny())
    batch = torch.tensor(some_prompts(1))
    with mixed.autocast():
        engine(model).generate(some_prompts(2), GREEDY, 0)
        model(input_ids=batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_static_step_computes_with_lasting_casts_of_the_weights_of_now(
    mixed: Accelerator, kind: str
) -> None:
    """A graph may neither cast weights at each step nor read casts that autocast has dropped."""
    model: Any = mixed.prepare_model(tiny(kind))
    prompts = some_prompts(6)
    made = TransformersConfig(kv_cache="static").build(model, TOKENIZER_INFO)
    texts = []
    for _ in range(3):
        grown = TransformersConfig(kv_cache="growing").build(model, TOKENIZER_INFO)
        casts, got = casts_of(model.parameters(), lambda: made.generate(prompts, GREEDY, 0))
        assert got == grown.generate(prompts, GREEDY, 0)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        texts.append((got, casts))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert texts[0][0] != texts[1][0]
    assert [casts for _, casts in texts[1:]] == [0, 0]
    assert texts[0][1] > 0
