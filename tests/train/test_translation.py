"""A step with a teacher that has another tokenizer: the laws of any step, and what cannot be translated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.data.toy_tokenizers import byte_tokenizer
from tests.train.steps import taken
from tests.train.test_step import NOW, Given
from torch import Tensor, nn
from transformers import AutoTokenizer

from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Completion, Prompt, Response
from stillhouse.data.token_bytes import TokenBytes
from stillhouse.data.translate import Translator
from stillhouse.engines import Sampling
from stillhouse.files import locate
from stillhouse.models import choose_packing
from stillhouse.objectives import Objective
from stillhouse.objectives.registry import parse_objective
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

OURS = AutoTokenizer.from_pretrained(str(locate("package:stillhouse/demo/teacher")))
THEIRS = byte_tokenizer()
ENDS = (OURS.eos_token_id, THEIRS.eos_token_id)
TEXTS = ("good food", "café near the river", "a", "The Eagle is a pub \N{GRINNING FACE}.", "")
MIXED = {
    "kind": "sum",
    "terms": [
        {"kind": "span"},
        {"kind": "uld"},
        {"kind": "transport", "layers": [0.5, 1.0]},
        {"kind": "cross_entropy"},
    ],
}


def translator(context: int | None = None, same: bool = False) -> Translator:
    teacher = OURS if same else THEIRS
    ends = (ENDS[0], ENDS[0]) if same else ENDS
    return Translator(TokenBytes(OURS), TokenBytes(teacher), ends, pad_id=0, context=context)


def prompt(number: int, text: str, same: bool = False) -> Prompt:
    theirs = OURS if same else THEIRS
    ids = [tuple(one(text)["input_ids"]) for one in (OURS, theirs)]
    return Prompt(f"train:{number}", ids[0], text, teacher_ids=ids[1])


def responses(same: bool = False, finished: bool = True) -> list[Response]:
    made = []
    for number, text in enumerate(TEXTS):
        ids = tuple(OURS(text)["input_ids"])
        ends = finished or not text
        whole = (*ids, ENDS[0]) if ends else ids
        made.append(Response(prompt(number, f"say {number}", same), whole, "fixed", ends))
    return made


def step_of(
    objective: Any,
    given: Sequence[Response],
    teacher_seed: int = 7,
    same: bool = False,
    normalise: str = "token",
    dtype: torch.dtype = torch.float32,
) -> Step:
    parsed: Objective = parse_objective(objective)
    vocab = len(OURS) if same else len(THEIRS)
    model = tiny.model(teacher_seed, width=24, vocab_size=vocab + 5, dtype=dtype)
    method = Method(FixedConfig(), parsed, normalise)  # type: ignore[arg-type]
    teacher = LiveTeacher(model, vocab)
    return Step(
        method,
        Given([[one] for one in given]),
        {"main": teacher},
        0,
        len(OURS),
        translator=translator(same=same),
    )


def student(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny.model(1, vocab_size=len(OURS) + 3, dtype=dtype)


def gradient(step: Step, model: nn.Module, num_micro: int, padding: int = 0) -> tuple[float, Tensor]:
    return taken(step, model, num_micro, NOW, padding)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_the_gradient_does_not_depend_on_micro_batches_padding_order_or_packing(normalise: str) -> None:
    model, given = student(torch.float64), responses()
    options: dict[str, Any] = {"normalise": normalise, "dtype": torch.float64}
    loss, slope = gradient(step_of(MIXED, given, **options), model, 1)
    shuffled = random.Random(0).sample(given, len(given))
    for one, micro, padding in ((given, 2, 0), (given, 5, 0), (given, 1, 7), (shuffled, 3, 2)):
        other, other_slope = gradient(step_of(MIXED, one, **options), model, micro, padding)
        assert other == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_slope, slope, rtol=1e-4, atol=1e-7)
    step = step_of(MIXED, given, **options)
    [teacher] = step.teachers.values()
    assert isinstance(teacher, LiveTeacher)
    for one_model in (model, teacher.model):
        assert choose_packing(one_model, "on") is None
    other, other_slope = gradient(step, model, 2)
    assert other == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_slope, slope, rtol=1e-4, atol=1e-7)


def test_with_the_same_tokenizer_span_is_the_token_level_step() -> None:
    model, given = student(), responses(same=True)
    span = step_of({"kind": "span", "compare": "forward_kl"}, given, same=True)
    plain = step_of("forward_kl", given, same=True)
    plain.translator = None
    found, wanted = gradient(span, model, 2), gradient(plain, model, 2)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["uld", "span", "transport"])
def test_another_teacher_gives_another_gradient(kind: str) -> None:
    model, given = student(), responses()
    one, other = (gradient(step_of(kind, given, seed), model, 1)[1] for seed in (7, 8))
    assert not torch.allclose(one, other)


def test_the_student_keeps_its_token_ids_and_the_teacher_reads_the_same_bytes() -> None:
    """Ids that the tokenizer would not choose itself stay; the teacher gets their text."""
    odd = [index for letter in "good" for index in OURS(letter)["input_ids"]]
    assert odd != OURS("good")["input_ids"]
    given = Response(prompt(0, "say"), (*odd, ENDS[0]), "student", True, 3)
    [micro] = step_of("span", [given]).prepare([], NOW, 1).micro_batches
    assert micro.batch.row_labels().tolist() == [*odd, ENDS[0]]
    read = micro.read_by(MAIN)
    assert read.row_labels().tolist() == [*THEIRS("good")["input_ids"], ENDS[1]]
    asked = THEIRS("say")["input_ids"]
    assert read.input_ids[0].tolist() == [*asked, *THEIRS("good")["input_ids"], ENDS[1]]
    assert micro.rows.alignment is not None
    assert micro.rows.alignment.student_groups.tolist() == [0, 1, 2, 3, 4]


def test_the_end_is_compared_with_the_end_and_a_cut_response_has_none() -> None:
    for finished in (True, False):
        one = translator().translate(responses(finished=finished)[0])
        assert not isinstance(one, str)
        assert (one.token_ids[-1] == ENDS[1]) == finished
        assert one.spans.count == len(one.spans.student)


def test_what_is_no_valid_utf8_is_compared_byte_by_byte() -> None:
    ids = tuple(OURS(TEXTS[3])["input_ids"])
    emoji = [n for n, piece in enumerate(TokenBytes(OURS).pieces(ids)) if piece == b"\x9f"]
    cut = Response(prompt(0, "say"), ids[: emoji[0] + 1], "student", False, 0)
    found = translator().translate(cut)
    assert not isinstance(found, str)
    assert b"".join(TokenBytes(THEIRS).pieces(found.token_ids)).endswith(b" \xf0\x9f")
    assert found.spans.count == len(set(found.spans.student))


def test_what_the_teacher_cannot_read_is_compared_with_nothing_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = responses()
    step = step_of({"kind": "sum", "terms": [{"kind": "span"}, {"kind": "cross_entropy"}]}, given)
    step.translator = translator(context=14)  # "say 0", 9 bytes and the end are too long by one
    with caplog.at_level("WARNING", logger="stillhouse"):
        loss, slope = gradient(step, student(), 2)
    assert torch.isfinite(slope).all()
    assert loss > 0
    row = step.metrics.row()
    assert row["alignment/dropped"] == pytest.approx(3 / 5)
    assert caplog.text.count("longer than the teacher's context of 14 tokens") == 1, (
        "told once, counted always"
    )
    alone = step_of("span", given)
    alone.translator = translator(context=5)
    total, slope = gradient(alone, student(), 1)
    assert total == 0.0
    assert not slope.any()


class Echo:
    """An engine that says what it was asked, and ends."""

    def generate(self, prompts: Sequence[Sequence[int]], *_: object, **__: object) -> list[Completion]:
        return [Completion((*ids, ENDS[1]), True) for ids in prompts]


def test_a_teacher_writes_in_its_own_tokens_and_the_student_learns_the_text() -> None:
    writer = ResponseGenerator(
        Echo(),  # type: ignore[arg-type]
        "teacher",
        Sampling(max_tokens=64),
        lambda: None,
        translator=translator(),
    )
    [written] = writer.generate([prompt(0, "a café")], seed=0)
    assert written.token_ids == (*OURS("a café")["input_ids"], ENDS[0])
    assert (written.finished, written.source) == (True, "teacher")
    short = replace(writer, sampling=Sampling(max_tokens=3))
    [cut] = short.generate([prompt(0, "a café near the river")], seed=0)
    assert len(cut.token_ids) == 3
    assert not cut.finished
