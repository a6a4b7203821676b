"""What goes into a record comes out of it, within what its dtype promises."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from stillhouse.core.sparse import SparseLogprobs, concat_sparse, sampled_of, topk_of
from stillhouse.errors import TeacherError
from stillhouse.teachers.store.codecs import HiddenCodec, SampledCodec, TopkCodec


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(7, 24, generator=torch.Generator().manual_seed(0))).to(dtype)


def logprobs(vocab: int) -> Tensor:
    return torch.log_softmax(3 * torch.randn(7, vocab, generator=torch.Generator().manual_seed(1)), -1)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def through(codec: HiddenCodec, states: Tensor) -> Tensor:
    tensors = codec.encode(states)
    assert num_bytes(tensors) == 7 * codec.row_bytes(24)
    return codec.decode(tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_in_their_own_dtype_are_stored_bit_for_bit(dtype: str) -> None:
    states = hidden(getattr(torch, dtype))
    kept = through(HiddenCodec(dtype), states)
    assert kept.dtype == states.dtype
    assert torch.equal(kept, states)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"float16 ends at 65504.* 7e\+04"):
        HiddenCodec("float16").encode(torch.tensor([[1.0, 7e4]]))


def test_int8_is_within_half_a_step_of_each_row() -> None:
    states = hidden()
    states[3] = 0
    step = states.abs().amax(-1, keepdim=True) / 127
    error = (through(HiddenCodec("int8"), states) - states).abs()
    assert (error <= step / 2 + 1e-7).all()
    assert error.max() > 0


LABELS = torch.arange(7)


@pytest.mark.parametrize("vocab", [50, 70_000])
@pytest.mark.parametrize(("number", "error"), [("float32", 0.0), ("float16", 5e-4), ("uint8", 0.02)])
def test_the_most_probable_tokens(number: str, error: float, vocab: int) -> None:
    codec = TopkCodec(5, number, vocab)  # type: ignore[arg-type]
    sparse = concat_sparse(
        [topk_of(logprobs(vocab)[:3], 5, LABELS[:3]), topk_of(logprobs(vocab)[3:], 3, LABELS[3:])]
    )
    tensors = codec.encode(sparse)
    assert num_bytes(tensors) == 7 * codec.row_bytes(24)
    back = codec.decode(tensors)
    assert torch.equal(back.ids, sparse.ids)
    there = sparse.ids >= 0
    relative = (back.logprobs - sparse.logprobs).abs()[there] / sparse.logprobs.abs()[there].clamp_min(1)
    assert relative.max() <= error
    assert_same(back.tail, sparse.tail)
    assert_same(back.labels, sparse.labels)


def test_log_probabilities_in_a_byte_are_within_half_a_step_of_each_row() -> None:
    sparse = topk_of(logprobs(50), 20, LABELS)
    codec = TopkCodec(20, "uint8", 50)
    error = (codec.decode(codec.encode(sparse)).logprobs - sparse.logprobs).abs()
    span = sparse.logprobs.amax(-1, keepdim=True) - sparse.logprobs.amin(-1, keepdim=True)
    assert (error <= span / 510 + 1e-6).all()


@pytest.mark.parametrize("vocab", [50, 70_000])
def test_samples_take_as_many_bytes_as_there_are_different_tokens(vocab: int) -> None:
    sparse = sampled_of(logprobs(vocab), 16, torch.Generator().manual_seed(0), 1.5, LABELS)
    codec = SampledCodec(16, 1.5, "float32", vocab)
    tensors = codec.encode(sparse)
    different = int((sparse.ids >= 0).sum())
    assert num_bytes(tensors) == 7 * 6 + different * ((2 if vocab < 2**16 else 4) + 8)
    back: SparseLogprobs = codec.decode(tensors)
    assert torch.equal(back.ids, sparse.ids)
    assert_same(back.weights, sparse.weights)
    assert_same(back.labels, sparse.labels)
    there = sparse.ids >= 0
    assert torch.equal(back.logprobs[there], sparse.logprobs[there])


def assert_same(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
