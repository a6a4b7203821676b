"""A committed list of tricky answers: our verdicts beside those of lm-eval and of math-verify.

The verdicts in a row are ours (marked as final, flexible), those of lm-eval's gsm8k (strict, flexible) and
that of math-verify, which lm-eval's minerva_math uses. Each is computed here by its own code. An answer is
compared with that of its kind: one after `####` with lm-eval's strict rule, one in a box with math-verify,
any other with lm-eval's flexible rule; where ours differs from it, the row says why.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import math_verify
import pytest
import yaml
from tests.grading.test_completions import TaskFile, task_files

from stillhouse.grading import grade

ANSWERS = [
    ("#### 18", "18", "11 11 1", ""),
    ("#### 3 Steps to solve\nfoo\n\\boxed{18}", "18", "11 01 1", ""),
    ("#### 1. Steps\n...\n#### 18", "18", "11 01 1", "the first mark is a heading"),
    ("#### 2 thousand", "2000", "11 00 0", "two thousand are 2000"),
    ("#### 2 thousand", "2", "00 11 1", "two thousand are 2000"),
    (r"\boxed{0.333}", "1/3", "00 00 0", ""),
    (r"\boxed{0.333}", r"\frac{1}{3}", "00 00 0", ""),
    (r"\boxed{0.333333}", r"\frac{1}{3}", "11 00 1", ""),
    (r"\boxed{\frac{1}{3}}", "0.333333", "11 00 1", ""),
    (r"\boxed{0.3333}", r"\frac{1}{3}", "00 00 0", ""),
    ("#### 5.0004", "5", "00 00 0", ""),
    (r"\boxed{5.0004}", "5", "00 00 0", ""),
    ("#### $18.00", "18", "11 00 1", "compared as numbers, not letter by letter"),
    ("#### 1,800", "1800", "11 11 1", ""),
    ("#### 1800 dollars", "1800", "11 11 1", ""),
    ("#### 20%", "20", "11 11 1", ""),
    (r"\boxed{20\%}", "20", "11 01 1", ""),
    (r"\boxed{0.2}", r"20\%", "11 00 1", ""),
    (r"\boxed{20}", r"20\%", "11 00 1", ""),
    (r"\boxed{0.2}", "20", "00 00 0", ""),
    ("#### 18.", "18", "11 11 1", ""),
    ("The answer is 18.", "18", "01 01 1", ""),
    ("#### -5", "-5", "11 11 1", ""),
    ("#### −5", "-5", "11 00 0", "the typographic minus is a minus"),
    ("#### 3/4", "0.75", "11 00 1", "compared as numbers, not letter by letter"),
    (r"\boxed{3/4}", r"\frac34", "11 00 1", ""),
    (r"\boxed{1\frac{1}{2}}", "1.5", "11 00 1", ""),
    (r"\boxed{1 1/2}", "1.5", "11 00 0", "a mixed number"),
    ("#### 1 1/2", "1.5", "11 00 0", "a mixed number"),
    (r"\boxed{18\text{ dollars}}", "18", "11 01 1", ""),
    (r"\boxed{18\,\text{cm}^2}", "18", "11 00 1", ""),
    (r"\boxed{x=5}", "5", "11 01 1", ""),
    (r"\boxed{[2,5)}", "[2,5)", "11 00 1", ""),
    (r"\boxed{(2,5]}", "[2,5)", "00 00 0", ""),
    (r"\boxed{(2, 5)}", "(2,5)", "11 00 1", ""),
    (r"\boxed{2,5}", "2,5", "11 01 1", ""),
    (r"\boxed{5,2}", "2,5", "11 00 1", ""),
    (r"\boxed{\{2,5\}}", r"\{5,2\}", "11 00 1", ""),
    (r"\boxed{\text{(C)}}", r"\text{(C)}", "11 00 1", ""),
    (r"\boxed{C}", r"\text{(C)}", "11 00 1", ""),
    (r"\boxed{\text{even}}", r"\text{even}", "11 00 1", ""),
    (r"\boxed{even}", r"\text{even}", "11 00 1", ""),
    (r"\boxed{90^\circ}", "90", "11 01 1", ""),
    (r"\boxed{90}", r"90^\circ", "11 00 1", ""),
    (r"\boxed{10,080}", "10080", "11 01 1", ""),
    (r"\boxed{10080}", r"10,\!080", "11 00 1", ""),
    (r"\boxed{2^{10}}", "1024", "11 00 1", ""),
    (r"\boxed{1{,}024}", "1024", "11 00 1", ""),
    ("#### **18**", "18", "11 01 1", "bold type is no part of the answer"),
    ("#### 18 apples and 3 pears", "18", "00 10 0", "two numbers are no answer"),
    ("18 #### ", "18", "01 01 1", ""),
    ("**18**", "18", "01 01 1", ""),
    ("#### 18\n#### 20", "18", "11 10 0", ""),
    (r"\boxed{18} then \boxed{20}", "20", "11 01 0", "the last box counts, as in lm-eval's minerva_math"),
    ("#### 1.5 million", "1500000", "11 00 0", "a number with its scale in words"),
    ("#### $2.5 billion", "2500000000", "11 00 0", "a number with its scale in words"),
    ("#### 3 hundred", "300", "11 00 0", "a number with its scale in words"),
    ("#### 2 dozen", "2", "11 11 1", ""),
    (r"\boxed{2 \text{ thousand}}", "2000", "11 00 0", "a number with its scale in words"),
    ("#### 18:30", "18", "00 10 1", "a time is no number"),
    ("#### 10^3", "1000", "11 00 1", "compared as expressions"),
    ("#### 1e3", "1000", "00 00 0", ""),
    (r"\boxed{1\times 10^3}", "1000", "11 00 1", ""),
    ("#### 18 (eighteen)", "18", "11 11 1", ""),
    ("#### 07", "7", "11 00 1", "compared as numbers, not letter by letter"),
    ("#### .5", "0.5", "11 00 1", "compared as numbers, not letter by letter"),
    ("#### 0.50", "0.5", "11 00 1", "compared as numbers, not letter by letter"),
    (r"\boxed{\$0.50}", "0.5", "11 00 1", ""),
    ("#### 50 cents", "0.5", "00 00 0", ""),
    (r"\boxed{50\%}", r"\frac12", "11 00 1", ""),
    (r"\boxed{-\frac{2}{3}}", r"-\frac{2}{3}", "11 00 1", ""),
    (r"\boxed{\dfrac{2}{3}}", r"\frac{2}{3}", "11 00 1", ""),
    (r"\boxed{.6666}", r"\frac{2}{3}", "00 00 0", ""),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", "11 00 1", ""),
    (r"\boxed{3.14159}", r"\pi", "00 00 0", ""),
    (r"\boxed{5\text{ or }6}", "5,6", "11 00 1", ""),
    (r"\boxed{x^2+1}", "1+x^2", "11 00 1", ""),
    (r"$\boxed{18}$ apples #### 3 more", "18", "11 00 1", ""),
    ("So 5 + 13 = 18 apples", "18", "01 01 1", ""),
    ("#### 18 = 9*2", "18", "11 10 1", ""),
    ("#### 9*2 = 18", "18", "11 01 1", "the right side of an equation is its value"),
    ("#### x = 18", "18", "11 01 1", "the right side of an equation is its value"),
    (r"\boxed{18", "18", "01 01 0", ""),
    ("#### 1 800", "1800", "11 00 1", "spaces may group digits"),
    ("#### 18 km/h", "18", "11 11 1", ""),
    ("#### 18km", "18", "11 11 1", ""),
    (r"\boxed{18.0}", "18", "11 00 1", ""),
    ("#### 18 1", "18", "00 10 0", "two numbers are no answer"),
    ("Answer: 18", "18", "01 01 1", ""),
    ("#### A: 18", "18", "00 01 1", ""),
    ("#### The answer is 18", "18", "11 01 1", "words before the number"),
    ("#### 18/24", "0.75", "11 00 1", "compared as numbers, not letter by letter"),
    ("#### 3:4", "3:4", "11 00 0", "compared as expressions"),
    (r"\boxed{3:4}", "3:4", "11 00 1", ""),
    (r"\boxed{\frac{3}{4}}", "3:4", "11 00 1", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def gsm8k():
    """lm-eval's own filters and metric on a response, as its task file sets them: strict and flexible."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.load((task_files().parent / "gsm8k/gsm8k.yaml").read_text("utf-8"), TaskFile)
    (metric,) = task["metric_list"]
    options = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    filters = []
    for entry in task["filter_list"]:
        settings = {name: value for name, value in entry["filter"][0].items() if name != "function"}
        filters.append(RegexFilter(**settings))

    def verdicts(response: str, reference: str) -> str:
        found = [one.apply([[response]], [{}])[0][0] for one in filters]
        gold = [f"#### {reference}"]
        scores = [
            exact_match_hf_evaluate(predictions=[text], references=gold, **options)["exact_match"]
            for text in found
        ]
        return "".join(str(int(score)) for score in scores)

    return verdicts


@pytest.mark.parametrize(("response", "reference", "verdicts", "why"), ANSWERS)
def test_verdicts_are_ours_and_those_of_the_public_rules(response, reference, verdicts, why, gsm8k):
    ours = grade(response, reference)
    verified = math_verify.verify(math_verify.parse(f"${reference}$"), math_verify.parse(response))
    found = f"{ours.strict:d}{ours.flexible:d} {gsm8k(response, reference)} {verified:d}"
    assert found == verdicts


@pytest.mark.parametrize(("response", "reference", "verdicts", "why"), ANSWERS)
def test_a_difference_has_a_reason(response, reference, verdicts, why):
    (strict, flexible), (lm_strict, lm_flexible), verified = verdicts.split()
    marked = grade(response, reference).answer if strict == flexible else None
    if marked is None or strict != flexible:
        other, mine = lm_flexible, flexible
    elif "boxed" in response:
        other, mine = verified, strict
    else:
        other, mine = lm_strict, strict
    assert bool(why) == (mine != other)


def test_any_thread_may_grade():
    """math-verify alone raises outside the main thread, where there are no signals."""
    pairs = [(r"\boxed{\sqrt{12}}", r"2\sqrt{3}"), (r"\boxed{x}", "x + 1"), (r"\boxed{1 + x}", "x + 1")] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: grade(*pair).strict, pairs))
    assert found == [True, False, True] * 4


def test_an_answer_that_takes_the_comparison_down_costs_that_answer_only():
    hostile = r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}"
    assert not grade(hostile, "x + 1").strict
    assert grade(r"\boxed{1 + x}", "x + 1").strict
