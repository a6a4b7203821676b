"""Every filter by small cases, each of which a filter that does nothing, or drops all, gets wrong."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sample_factory import sample, samples

from stillhouse.errors import DataError
from stillhouse.rollouts.offline.curation import apply_filters, count_reasons
from stillhouse.rollouts.offline.filters import REGISTRY, Drop, FilterContext
from stillhouse.rollouts.offline.samples import Sample, missing_sample


def kept(options: Any, given: list[Sample], context: FilterContext | None = None) -> list[bool]:
    verdicts = REGISTRY.parse(options).apply(given, context or FilterContext())
    assert len(verdicts) == len(given)
    return [verdict is None for verdict in verdicts]


def why(options: Any, given: Sample, context: FilterContext | None = None) -> Drop:
    (verdict,) = REGISTRY.parse(options).apply([given], context or FilterContext())
    assert verdict is not None
    return verdict


def test_empty() -> None:
    assert kept("empty", samples("A fig.", " \n", "", "?!")) == [True, False, False, True]
    assert kept({"kind": "empty", "min_words": 2}, samples("Fig", "A fig.")) == [False, True]


def test_truncated() -> None:
    assert kept("truncated", [sample("a"), sample("a", finished=False)]) == [True, False]
    assert why("truncated", sample("a", finished=False)) == Drop("cut at the length limit", "4 tokens")


def test_repetition() -> None:
    loop = "the cat sat on " * 6
    given = samples(loop, "the cat sat on the mat and the dog on the rug", "ja " * 9, "啊" * 20, "ab", "")
    assert kept("repetition", given) == [False, True, False, False, True, True]
    assert why("repetition", given[0]) == Drop("repeats itself", "0.81 of its 4-grams")
    assert kept({"kind": "repetition", "n": 1, "max_share": 0.1}, samples("a b c a")) == [False]


def test_language() -> None:
    english = "The Phoenix is a cheap pub by the river, and families are welcome there."
    german = "Das Phoenix ist ein günstiges Lokal am Fluss, in dem Familien willkommen sind."
    assert kept("language", samples(english, german, "Ja, gut.", "")) == [True, False, True, True]
    assert kept({"kind": "language", "allowed": ["de", "en"]}, samples(english, german)) == [True, True]
    assert why("language", sample(german)).reason == "wrong language"
    with pytest.raises(ValidationError, match="no code of two letters"):
        REGISTRY.parse({"kind": "language", "allowed": ["English"]})


def test_format() -> None:
    wanted = {"kind": "format", "match": r"####\s*-?\d+$", "forbid": "(?i)as an ai"}
    assert kept(wanted, samples("So #### 12", "So 12", "As an AI, #### 3")) == [True, False, False]
    assert why(wanted, sample("As an AI, #### 3")) == Drop("has a forbidden pattern", "'As an AI'")
    for wrong, message in (({}, "needs match or forbid"), ({"match": "("}, "no regular expression")):
        with pytest.raises(ValidationError, match=message):
            REGISTRY.parse({"kind": "format", **wrong})


def test_length_ratio_to_the_prompt() -> None:
    given = [sample("x", tokens=count) for count in (1, 3, 9)]
    assert kept(
        {"kind": "length_ratio", "relative_to": "prompt", "min_ratio": 0.5, "max_ratio": 2.0}, given
    ) == [
        False,
        True,
        False,
    ]


def test_length_ratio_to_the_other_side_judges_the_student() -> None:
    teacher = [sample("x", n, tokens=8) for n in range(3)]
    student = [sample("x", n, tokens=count, source="student") for n, count in enumerate((2, 8, 40))]
    options = {"kind": "length_ratio", "min_ratio": 0.5, "max_ratio": 4.0}
    assert kept(options, student, FilterContext(partners={one.key: one for one in teacher})) == [
        False,
        True,
        False,
    ]
    assert kept(options, teacher, FilterContext(partners={one.key: one for one in student})) == [
        True,
        True,
        True,
    ]
    assert kept(options, student) == [True, True, True]


class _Many(Sequence[Sample]):
    """Samples that are made when they are read, as those on disk are."""

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, place: Any) -> Any:
        return sample(f"the number {place}") if place < len(self) else [][place]


def test_duplicates() -> None:
    given = [
        sample("A fig.", 0, prompt="Fruit?"),
        sample("a  fig.", 1, prompt="Fruit?"),
        sample("A fig.", 2, prompt="Plant?"),
        sample("A pear.", 3, prompt="fruit?"),
    ]
    assert kept("duplicates", given) == [True, False, True, True]
    assert kept({"kind": "duplicates", "compare": "response"}, given) == [True, False, False, True]
    assert kept({"kind": "duplicates", "compare": "prompt"}, given) == [True, False, True, False]
    assert REGISTRY.parse("duplicates").apply(given, FilterContext())[1] == Drop("duplicate", "of train:1")
    signs = samples("x = 5 - 3", "x = 5 + 3", "#### -5", "#### 5", "कि", "की", "Über", "U\u0308ber")
    assert kept({"kind": "duplicates", "compare": "response"}, signs) == [True] * 7 + [False]


def test_duplicates_are_of_the_first_that_is_equal_and_take_few_bytes_each() -> None:
    numbers = [(7 * n * n + n) % 40 for n in range(300)]
    given = samples(*(f"the number {number}" for number in numbers))
    found = REGISTRY.parse("duplicates").apply(given, FilterContext())
    first = {number: numbers.index(number) for number in numbers}
    told = [f"of train:{place}" if one is None else one.detail for place, one in enumerate(found, start=1)]
    assert told == [f"of train:{first[number] + 1}" for number in numbers]
    assert REGISTRY.parse("duplicates").apply([], FilterContext()) == []
    tracemalloc.start()
    REGISTRY.parse("duplicates").apply(_Many(), FilterContext())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * len(_Many())


def test_near_duplicates() -> None:
    words = [f"word{number}" for number in range(60)]
    changed = [*words[:58], "other", "end"]
    given = samples(" ".join(words), " ".join(changed), " ".join(reversed(words)), "short", "short", "")
    options = {"kind": "near_duplicates", "compare": "response", "threshold": 0.7}
    assert kept(options, given) == [True, False, True, True, False, True]
    (verdict,) = (v for v in REGISTRY.parse(options).apply(given[:2], FilterContext()) if v)
    assert verdict.detail.endswith("like train:1")
    assert kept({**options, "threshold": 0.99}, given[:2]) == [True, True]


def test_overlap_with_evaluation_sets(tmp_path: Path) -> None:
    held_out = (
        "How many legs do three spiders have in all?",
        "Three spiders have 24 legs in all.",
        "Why?",
        "yes",
    )
    around = FilterContext(lambda: held_out)
    given = [
        sample("24", 0, prompt="Tell me: how many legs do three spiders have?"),
        sample("I think that three spiders have 24 legs in all", 1, prompt="Legs?"),
        sample("24", 2, prompt="How many legs do two spiders have?"),
        sample("Because.", 3, prompt="why?"),
        sample("Yes", 4, prompt="Is it?"),
    ]
    assert kept({"kind": "overlap", "n": 5}, given, around) == [False, False, True, False, True]
    assert kept({"kind": "overlap", "n": 5, "compare": "response"}, given, around) == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert kept({"kind": "overlap", "n": 5, "max_share": 0.9}, given[:3], around) == [True, True, True]
    told = why({"kind": "overlap", "n": 5}, given[0], around)
    assert told == Drop("prompt is in an evaluation set", "3 of 5 n-grams, first 'how many legs do three'")
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "How many legs do two spiders have?", "answer": "16"}\n')
    against = {"kind": "overlap", "n": 5, "against": [str(other)]}
    assert kept(against, given, around) == [True, True, False, True, True]


def test_logprob_floor() -> None:
    given = [sample("x", n, scores={"teacher": value}) for n, value in enumerate((-0.2, -3.0, -1.5, -0.9))]
    assert kept({"kind": "logprob_floor", "min_logprob": -1.5}, given) == [True, False, True, True]
    assert kept({"kind": "logprob_floor", "drop_share": 0.5}, given) == [True, False, False, True]
    with pytest.raises(DataError, match="has no log-probability"):
        kept({"kind": "logprob_floor", "min_logprob": -1.5}, [sample("x")])
    for wrong in ({}, {"min_logprob": -1.0, "drop_share": 0.1}):
        with pytest.raises(ValidationError, match="either min_logprob or drop_share"):
            REGISTRY.parse({"kind": "logprob_floor", **wrong})


def test_verified_mathematics() -> None:
    given = [
        sample("3 + 4 = 7\n#### 7", references=("So #### 7",)),
        sample("It is 8.", references=("So #### 7",)),
        sample("It is 7.", facts={"answer": 7}),
        sample("No idea", facts={"answer": 7}),
        sample("A fig."),
    ]
    assert kept("verified", given) == [True, False, True, False, False]
    assert kept({"kind": "verified", "unverifiable": "keep"}, given[3:]) == [False, True]
    assert why("verified", given[1]) == Drop("wrong answer", "8, right is 7")


def test_verified_programs_run_in_the_sandbox() -> None:
    facts = {"test_list": ["assert double(2) == 4", "assert double(0) == 0"], "code": "def double(x): ..."}
    texts = ("```python\ndef double(x):\n    return 2 * x\n```", "def double(x):\n    return x + 1", "2x")
    given = [sample(text, number, facts=facts) for number, text in enumerate(texts)]
    assert kept("verified", given) == [True, False, False]
    assert why("verified", given[1]).reason == "fails its tests"


def test_filters_see_what_those_before_them_have_left() -> None:
    given = [
        sample("a fig", 0, finished=False),
        sample("a fig", 1),
        sample("a fig", 2),
        missing_sample(3, sample("").response.prompt, "teacher"),
    ]
    filters = [REGISTRY.parse(kind) for kind in ("truncated", {"kind": "duplicates", "compare": "response"})]
    dropped = apply_filters({"teacher": given}, filters)["teacher"]
    assert {place: drop.filter for place, drop in dropped.items()} == {
        0: "truncated", 2: "duplicates", 3: "missing",
    }  # fmt: skip
    assert count_reasons(dropped.values()) == {
        "missing": {"no response": 1},
        "truncated": {"cut at the length limit": 1},
        "duplicates": {"duplicate": 1},
    }


def test_filters_for_the_other_side_are_left_out() -> None:
    filters = [REGISTRY.parse({"kind": "empty", "source": "student"})]
    both = {"teacher": samples(""), "student": samples("")}
    assert {source: len(dropped) for source, dropped in apply_filters(both, filters).items()} == {
        "teacher": 0, "student": 1,
    }  # fmt: skip
    assert apply_filters({"teacher": samples("")}, filters, any_source=True)["teacher"]


@pytest.mark.parametrize("kind", REGISTRY.kinds())
def test_every_filter_says_what_it_does(kind: str) -> None:
    part = REGISTRY[kind]
    assert (part.__doc__ or "").strip()
    for name, info in part.model_fields.items():
        assert info.description or name in ("kind",), f"{kind}.{name} has no docstring"
