"""The last hidden states at chosen positions, and the head over them: all that a loss needs.

Logits of a whole batch are never made here: [B, T, V] is the usual out-of-memory of distillation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.batch import PackedTokens, TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.core.host import carried
from stillhouse.errors import ModelError
from stillhouse.models.packing import arguments, packed_for, sequence_ids
from stillhouse.models.processors import copy_processor
from stillhouse.models.vision import ImageReader, check_no_images, image_arguments, reader_of

DEEPSPEED = "DeepSpeedEngine"
"""The class of DeepSpeed's wrapper, which is not imported to be known."""


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DistributedDataParallel, DeepSpeed, torch.compile and peft wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel) or type(inner).__name__ == DEEPSPEED:
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def image_reader(model: nn.Module) -> ImageReader | None:
    """What reads images for a loaded model, possibly wrapped; None: it reads text alone."""
    return reader_of(unwrap(model))


def copy_processor_of(model: nn.Module, folder: Path) -> None:
    """Copy the image processor of a loaded model, possibly wrapped, beside its weights, if it has one."""
    if (reader := image_reader(model)) is not None:
        copy_processor(reader.folder, folder)


def hidden_rows(model: nn.Module, batch: TokenBatch, **options: Any) -> Tensor:
    """Last hidden states at the rows of a batch, in row-major order.

    The call goes through the outermost wrapper, so that DDP and FSDP see an ordinary forward pass; the
    states are captured by a hook on the decoder, and the head runs for one position only. No attention mask
    is passed: causal attention never reaches the padding on the right, and attention without a mask is
    faster. A model that packs (`choose_packing`) reads the sequences one after the other without padding;
    batches with images are padded. Images come through the model's own processor (`models/vision.py`).
    Nothing here waits for the device, but transformers does once in each such pass, to count image tokens,
    and in the towers of Qwen-VL, Idefics and SmolVLM for the sizes of images.

    Args:
        model: a causal language model, possibly wrapped.
        batch: B sequences, padded on the right, on the model's device.
        **options: passed on to the model.

    Returns:
        [N, D]
    """
    inner = unwrap(model)
    decoder = decoder_of(inner)
    captured: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: captured.append(_states(output)))
    call: dict[str, Any] = {"use_cache": False, **options}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        call["logits_to_keep"] = 1
    packed = packed_for(inner, batch)
    if packed is not None:
        call |= arguments(inner, packed)
    if batch.images:
        call |= _image_arguments(inner, batch)
    elif (reader := reader_of(inner)) is not None:
        check_no_images(reader, batch.token_ids, batch.prompt_lengths)
    try:
        with _without_host_syncs(sequence_ids(inner, packed)):
            model(input_ids=batch.input_ids if packed is None else packed.input_ids, **call)
    finally:
        handle.remove()
    return _rows(captured[-1], batch if packed is None else packed)


def _image_arguments(inner: Any, batch: TokenBatch) -> dict[str, Tensor]:
    """What the model is called with for the images of a batch, on its device."""
    width = batch.input_ids.shape[1]
    found = image_arguments(inner, batch.token_ids, batch.images, width)
    return dict(zip(found, carried(list(found.values()), batch.input_ids.device), strict=True))


def _rows(states: Tensor, batch: TokenBatch | PackedTokens) -> Tensor:
    """[N, D] of [B, T, D], or of [1, S, D] of the same packed: the rows of a batch."""
    return states.flatten(0, 1).index_select(0, batch.row_positions)


@contextmanager
def _without_host_syncs(packed_ids: Tensor | None = None) -> Iterator[None]:
    """Patch out two host syncs of a transformers forward pass without an attention mask: the detection of
    packed sequences, which is answered from what is known, and the warning about padding."""
    from transformers import PreTrainedModel, masking_utils

    patches = (
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: packed_ids),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda model, ids, mask: None),
    )
    with ExitStack() as restore:
        for owner, name, replacement in patches:
            if not hasattr(owner, name):  # other versions of transformers have no such sync
                continue
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def layer_rows(
    model: nn.Module, batch: TokenBatch, depths: Sequence[float]
) -> tuple[Tensor, dict[float, Tensor]]:
    """As `hidden_rows`, with the hidden states of some layers at the same rows, by depth.

    Args:
        model: a causal language model, possibly wrapped.
        batch: as for `hidden_rows`.
        depths: shares of the depth: 0 is the embedding, 1 the last layer.
    """
    outputs: list[Any] = []
    handle = unwrap(model).register_forward_hook(lambda _model, _inputs, output: outputs.append(output))
    try:
        last = hidden_rows(model, batch, output_hidden_states=True)
    finally:
        handle.remove()
    states = outputs[-1].hidden_states
    read = packed_for(unwrap(model), batch) or batch
    return last, {depth: _rows(states[round(depth * (len(states) - 1))], read) for depth in depths}


def decoder_of(inner: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in the last hidden states."""
    find = getattr(inner, "get_decoder", None)  # for OPT another one than base_model, which its head bypasses
    decoder = getattr(inner, "base_model", None) if find is None else find()
    if isinstance(decoder, nn.Module) and decoder is not inner:
        return decoder
    raise ModelError(
        f"{type(inner).__name__} has no decoder apart from its head. Stillhouse needs a model that "
        "AutoModelForCausalLM loads."
    )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Make sure that hidden states and head give the model's own logits, on four tokens.

    An architecture that does more to its logits than `head_of` knows would be trained on a wrong loss.

    Raises:
        ModelError: the logits differ by more than rounding, or there is no head to use.
    """
    training = model.training
    model.eval()
    batch = TokenBatch.of([range(1, 6)], [1], pad_id=0).to(next(model.parameters()).device)
    recomputed = head_of(model).logits(hidden_rows(model, batch))
    expected = model(input_ids=batch.input_ids[:, :4], use_cache=False).logits[0].float()
    model.train(training)
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if exact else 0.02  # bfloat16 has 8 bits
    if (recomputed - expected).abs().max() > tolerance * expected.abs().max():
        raise ModelError(
            f"{type(unwrap(model)).__name__} changes its logits after the head in a way that Stillhouse "
            "does not know, so the loss over its hidden states would be wrong. Choose another architecture."
        )


def _states(output: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    found = output[0] if states is None else states
    assert isinstance(found, Tensor)
    return found


def head_of(model: nn.Module, vocab: int | None = None) -> ModelHead:
    """The output embedding with the architecture's logit transforms.

    Those are the softcap of Gemma 2 and the scales of Cohere, Granite, Falcon-H1 and HyperCLOVA X.

    Args:
        model: a causal language model, possibly wrapped.
        vocab: number of token ids that both tokenizers share; rows beyond are padding and take no part.
    """
    inner = unwrap(model)
    layer = inner.get_output_embeddings()
    if layer is None:
        raise ModelError(
            f"{type(inner).__name__} has no output embeddings, so it has no head to distil through."
        )
    if hasattr(layer, "lora_A"):
        raise ModelError(
            "student.lora.targets: the head (lm_head) has an adapter, which the fused loss would not see. "
            "Leave it out of the targets."
        )
    for weight in layer.parameters():
        if hasattr(weight, "ds_id") and weight.numel() == 0:  # ZeRO-3 has let go of it after the forward pass
            weight.all_gather()
    config: Any = getattr(inner.config, "get_text_config", lambda: inner.config)()
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return ModelHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        scale=_scale(config),
        softcap=float(cap) if cap else None,
        vocab=vocab,
    )


_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_MULTIPLYING = ("hyperclovax",)
"""Architectures that multiply by `logits_scaling`; the others divide by it."""


def _scale(config: Any) -> float:
    """What the architecture multiplies its logits by."""
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        return float(scaling) if config.model_type in _MULTIPLYING else 1.0 / float(scaling)
    return float(next((value for name in _MULTIPLIERS if (value := getattr(config, name, None))), 1.0))
