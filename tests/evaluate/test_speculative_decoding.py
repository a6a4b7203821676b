"""Speculative decoding leaves the teacher's distribution as it is, whatever the student proposes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests import tiny

from stillhouse.evaluate.speculative_decoding import DistributionTest, SpeculativeDecoder, accept

VOCAB, END = 5, 0
PROMPT = [3, 1, 4]


def models() -> tuple[Any, Any]:
    teacher, student = (tiny.model(seed, vocab_size=VOCAB, layers=1).eval() for seed in (1, 2))
    return teacher, student


def chi_square(counts: dict[Any, int], expected: dict[Any, float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare outcomes are put together."""
    total = sum(counts.values())
    common = [key for key, share in expected.items() if share * total >= 5]
    rest = 1 - sum(expected[key] for key in common)
    cells = [(counts.get(key, 0), expected[key] * total) for key in common]
    if rest * total >= 5:
        cells.append((total - sum(seen for seen, _ in cells), rest * total))
    return sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1


def texts_of_teacher(teacher: Any, length: int) -> dict[tuple[int, ...], float]:
    """The exact probability of every text of at most `length` tokens."""
    exact: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for text in itertools.product(range(VOCAB), repeat=length):
            logits = teacher(torch.tensor([[*PROMPT, *text]])).logits[0].double().log_softmax(-1)
            known, share = (), 0.0
            for place, token in enumerate(text):
                share += float(logits[len(PROMPT) - 1 + place, token])
                known = (*known, token)
                if token == END:
                    break
            if known not in exact:
                exact[known] = float(torch.tensor(share).exp())
    return exact


@pytest.mark.parametrize("gamma", [1, 3])
def test_texts_have_the_teachers_distribution(gamma: int) -> None:
    teacher, student = models()
    exact = texts_of_teacher(teacher, 2)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-6)
    decoder = SpeculativeDecoder(gamma, max_tokens=2, eos_ids=(END,), vocab_size=VOCAB, seed=gamma)
    result = decoder.generate(teacher, student, [PROMPT] * 500)
    seen: dict[Any, int] = {}
    for text in result.responses:
        seen[tuple(text)] = seen.get(tuple(text), 0) + 1
    statistic, freedom = chi_square(seen, exact)
    assert freedom > 5
    # Mean k and variance 2k: five standard deviations above the mean.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    assert 0.1 < result.acceptance_rate < 0.99
    within = 4 * (0.25 / result.tested) ** 0.5
    assert result.acceptance_rate == pytest.approx(result.expected_acceptance_rate, abs=within)
    assert abs(result.distribution.z) < 4
    # The student's own texts would not pass.
    others = texts_of_teacher(student, 2)
    assert chi_square(seen, others)[0] > 5 * freedom


def test_one_draw_by_the_rule_has_the_teachers_distribution() -> None:
    generator = torch.Generator().manual_seed(5)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    seen = torch.zeros(4)
    kept = 0
    for _ in range(2000):
        proposed = torch.multinomial(q[0], 1, generator=generator)
        count, weights = accept(p, q, proposed, torch.rand(1, generator=generator, dtype=torch.float64))
        kept += count
        seen[int(proposed) if count else int(torch.multinomial(weights, 1, generator=generator))] += 1
    assert seen[3] == 0
    statistic = float(((seen[:3] - 2000 * p[0, :3]) ** 2 / (2000 * p[0, :3])).sum())
    assert statistic < 2 + 5 * 2  # two degrees of freedom
    assert kept / 2000 == pytest.approx(0.1 + 0.2 + 0.2, abs=0.04)  # 1 - TVD


def test_a_student_that_is_the_teacher_is_never_refused() -> None:
    teacher, _ = models()
    decoder = SpeculativeDecoder(4, max_tokens=20, eos_ids=(VOCAB + 1,), vocab_size=VOCAB)
    result = decoder.generate(teacher, teacher, [PROMPT] * 5)
    assert result.acceptance_rate == 1.0
    assert result.block_efficiency == 5.0
    assert [len(text) for text in result.responses] == [20] * 5


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_greedy_text_is_the_teachers(gamma: int) -> None:
    teacher, student = models()
    decoder = SpeculativeDecoder(gamma, max_tokens=12, eos_ids=(END,), vocab_size=VOCAB, temperature=0.0)
    result = decoder.generate(teacher, student, [PROMPT, [2, 2]])
    for prompt, text in zip([PROMPT, [2, 2]], result.responses, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 12 and END not in ids[len(prompt) :]:
                ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == ids[len(prompt) :]


def test_the_distribution_test_tells_whose_tokens_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(4000, 6, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    p[:, 5] = 0
    p /= p.sum(-1, keepdim=True)
    for weights, right in ((p, True), ((p + q) / 2, False), (p**2, False)):
        test = DistributionTest()
        drawn = torch.multinomial(weights, 1, generator=generator)[:, 0]
        test.update(p[:1000], drawn[:1000])
        test.update(p[1000:], drawn[1000:])
        assert (abs(test.z) < 4) == right
    certain = torch.nn.functional.one_hot(torch.tensor([1, 2]), 4).double()
    test = DistributionTest()
    test.update(certain, torch.tensor([1, 2]))
    assert test.z == 0
    test.update(certain, torch.tensor([1, 3]))
    assert test.z == float("inf")
