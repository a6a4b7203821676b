"""Under mixed precision the engine writes the same text with each weight cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def casts_of_weights(model: Any, run: Callable[[], Any]) -> tuple[int, Any]:
    """How often a weight of the first projection is cast while something runs, and what comes of it."""
    weight = model.model.layers[0].mlp.up_proj.weight
    casts = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal casts
            casts += func is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr()
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

    many, wanted = casts_of_weights(model, step_by_step)
    once, got = casts_of_weights(model, lambda: engine(model).generate(prompts, GREEDY, 0))
    assert (many > 20, once) == (True, 1)
    assert [c.token_ids for c in got] == wanted


def test_text_written_within_autocast_leaves_no_weight_without_gradient(mixed: Accelerator) -> None:
    model: Any = mixed.prepare_model(tiny())
    batch = torch.tensor(some_prompts(1))
    with mixed.autocast():
        engine(model).generate(some_prompts(2), GREEDY, 0)
        model(input_ids=batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
