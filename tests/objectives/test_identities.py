"""Identities and limits that tie objectives to each other and to enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.objectives.problems import drawn_rows, gradient, logits
from torch import Tensor

from stillhouse.core.rows import Rows, TeacherRows, with_gaps
from stillhouse.core.sparse import EXCLUDED, SparseLogprobs, topk_of
from stillhouse.core.types import SOURCES
from stillhouse.objectives import build
from stillhouse.objectives.logits import with_logprobs
from stillhouse.objectives.mixtures import head_mask

NONE = Rows()
TEACHER_CODE = SOURCES.index("teacher")


def pair(count: int = 6, vocab: int = 9) -> tuple[Tensor, Tensor]:
    return logits(count, vocab, 1), logits(count, vocab, 2)


def slope(kind: str, **options) -> Tensor:
    return gradient(build(kind, **options), *pair(), NONE)[1]


def value(kind: str, **options) -> Tensor:
    return build(kind, **options)(*pair())


def test_csd_of_the_student_has_the_gradient_of_reverse_kl() -> None:
    torch.testing.assert_close(slope("csd"), slope("reverse_kl"), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope("csd", factor="paper"), 2 * slope("reverse_kl"))
    assert not torch.allclose(slope("csd", temperature=1.5), slope("reverse_kl"), rtol=0.05)


@pytest.mark.parametrize("w1", ["student", "teacher", "uniform", "mix"])
@pytest.mark.parametrize("w2", ["student", "teacher", "uniform", "mix"])
def test_csd_in_linear_time_is_the_sum_over_all_pairs(w1: str, w2: str) -> None:
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    weights = {
        "student": q,
        "teacher": p,
        "uniform": torch.full_like(q, 1 / 9),
        "mix": 0.15 * p + 0.85 * q,
    }
    residual = student - teacher
    differences = (residual[:, :, None] - residual[:, None, :]).square()
    pairs = 0.25 * (weights[w1][:, :, None] * weights[w2][:, None, :] * differences).sum((1, 2))
    torch.testing.assert_close(value("csd", w1=w1, w2=w2), pairs)


def test_centred_uniform_dld_is_half_of_uniform_csd() -> None:
    both = slope("dld", weight="uniform", center=True), slope("csd", w1="uniform", w2="uniform")
    torch.testing.assert_close(both[0], both[1] / 2)


def test_jsd_is_a_mixture_of_the_skew_divergences() -> None:
    for share in (0.1, 0.5, 0.8):
        mixed = share * value("skew_kl", alpha=share) + (1 - share) * value("skew_rkl", alpha=1 - share)
        torch.testing.assert_close(value("jsd", teacher_weight=share), mixed)


def test_jeffreys_is_the_sum_of_both_kl() -> None:
    torch.testing.assert_close(value("jeffreys"), value("forward_kl") + value("reverse_kl"))
    torch.testing.assert_close(value("symmetric_kl", reverse_weight=0.5), value("jeffreys") / 2)


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (("skew_kl", {"alpha": 1e-7}), ("forward_kl", {})),
        (("skew_rkl", {"alpha": 1e-7}), ("reverse_kl", {})),
        (("skew_rkl", {"alpha": 1e-7, "detach_mixture": True}), ("reverse_kl", {})),
        (("ab", {"alpha": 1.0, "beta": 0.0}), ("forward_kl", {})),
        (("ab", {"alpha": 0.0, "beta": 1.0}), ("reverse_kl", {})),
        (("ab", {"alpha": 1.0, "beta": 1e-6}), ("forward_kl", {})),
        (("ab", {"alpha": 0.3, "beta": 1e-7}), ("ab", {"alpha": 0.3, "beta": 0.0})),
        (("ab", {"alpha": 0.3, "beta": -0.3 + 1e-7}), ("ab", {"alpha": 0.3, "beta": -0.3})),
        (("ab", {"alpha": 2e-6, "beta": 2e-6}), ("ab", {"alpha": 0.0, "beta": 0.0})),
        (("taid", {"t": 1.0}), ("forward_kl", {})),
        (("alpha_mixture", {"alpha": -1.0, "teacher_share": 0.2}), ("skew_kl", {"alpha": 0.2})),
        (("alpha_mixture", {"alpha": 1 - 1e-6}), ("alpha_mixture", {"alpha": 1.0})),
        (("symmetric_kl", {"reverse_weight": 0.0}), ("forward_kl", {})),
        (("symmetric_kl", {"reverse_weight": 1.0}), ("reverse_kl", {})),
    ],
)
def test_limits(near: tuple[str, dict], limit: tuple[str, dict]) -> None:
    torch.testing.assert_close(value(near[0], **near[1]), value(limit[0], **limit[1]), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(slope(near[0], **near[1]), slope(limit[0], **limit[1]), rtol=2e-4, atol=1e-4)


def test_ab_limits_are_those_of_the_textbook() -> None:
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    a = 0.4
    at_zero_beta = (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    torch.testing.assert_close(value("ab", alpha=a, beta=0.0), at_zero_beta)
    opposite = ((q**a / p**a).log() + p**a / q**a - 1).sum(-1) / a**2
    torch.testing.assert_close(value("ab", alpha=a, beta=-a), opposite)
    torch.testing.assert_close(value("ab", alpha=0.0, beta=0.0), 0.5 * (p.log() - q.log()).square().sum(-1))


def test_jsd_over_its_weight_tends_to_forward_kl() -> None:
    tiny = 1e-4
    torch.testing.assert_close(
        value("jsd", teacher_weight=tiny) / tiny, value("forward_kl"), rtol=0.02, atol=0
    )


def test_kl_temperature_is_neither_squared_nor_left_out() -> None:
    student, teacher = pair()
    expected = build("forward_kl")(student / 2, teacher / 2)
    torch.testing.assert_close(value("forward_kl", temperature=2.0), expected)


def test_detaching_the_mixture_changes_the_gradient_but_not_the_value() -> None:
    torch.testing.assert_close(
        value("skew_rkl", alpha=0.3), value("skew_rkl", alpha=0.3, detach_mixture=True)
    )
    assert not torch.allclose(
        slope("skew_rkl", alpha=0.3), slope("skew_rkl", alpha=0.3, detach_mixture=True), rtol=0.05
    )


def test_the_head_of_a_distribution_is_the_fewest_tokens_with_the_mass() -> None:
    probabilities = torch.tensor([[0.3, 0.05, 0.4, 0.25], [0.9, 0.02, 0.05, 0.03]])
    assert head_mask(probabilities, 0.5).tolist() == [[True, False, True, False], [True, False, False, False]]
    flat = torch.rand(2, 700, dtype=torch.float64)
    flat /= flat.sum(-1, keepdim=True)
    for row, mask in zip(flat, head_mask(flat, 0.9), strict=True):
        assert row[mask].sum() >= 0.9
        assert row[mask].sum() - row[mask].min() < 0.9
        assert row[mask].min() >= row[~mask].max()


def test_uld_is_blind_to_which_token_is_which_and_pads_the_smaller_vocabulary() -> None:
    student, teacher = pair()
    shuffled = teacher[:, torch.randperm(9, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(build("uld")(student, shuffled), value("uld"))
    assert build("uld")(student, student.flip(-1)).abs().max() < 1e-12
    padded = torch.cat([teacher, teacher.new_full((6, 4), -torch.inf)], -1)
    torch.testing.assert_close(build("uld")(student, padded), value("uld"))


def test_closed_form_of_uld_in_fp32() -> None:
    student, teacher = logits(5, 300, 1).float(), logits(5, 280, 2).float()
    leaf = student.clone().requires_grad_()
    expected = build("uld")(leaf, teacher)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    got, force = build("uld").value_and_gradient(student.clone(), teacher.clone(), NONE)
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(force, wanted)


def _chain(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a two-token process: the first token, then the second given the first; [1 + V, V]."""
    return logits(4, 3, seed, 1.0), logits(4, 3, seed + 1, 1.0)


def test_minillm_gradient_by_enumeration() -> None:
    student, teacher = _chain(5)
    leaf = student.clone().requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), teacher.log_softmax(-1)
    exact, estimated = 0.0, torch.zeros_like(student)
    objective = build("policy_gradient", single_step=True)
    for first, second in itertools.product(range(3), repeat=2):
        visited = torch.tensor([0, 1 + first])
        labels = torch.tensor([first, second])
        sequence_q = log_q[visited, labels].sum()
        exact = exact + sequence_q.exp() * (sequence_q - log_p[visited, labels].sum())
        rows = Rows(labels=labels, sequence_ids=torch.zeros(2, dtype=torch.long))
        part = gradient(objective, student[visited], teacher[visited], rows)[1]
        estimated[visited] += sequence_q.exp().detach() * part
    (wanted,) = torch.autograd.grad(exact, leaf)
    torch.testing.assert_close(estimated, wanted)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_policy_distillation_is_reverse_kl_in_expectation(estimator: str) -> None:
    student, teacher = _chain(8)
    objective = build("policy_gradient", discount=0.0, include_current=True, estimator=estimator)
    expected, wanted = gradient(build("reverse_kl"), student, teacher, NONE)
    mean, force = torch.zeros(4, dtype=torch.float64), torch.zeros_like(student)
    for token in range(3):
        rows = Rows(labels=torch.full((4,), token), sequence_ids=torch.arange(4))
        part, part_force = gradient(objective, student, teacher, rows)
        chance = student.softmax(-1)[:, token]
        mean += chance * part
        force += chance[:, None] * part_force
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(force, wanted)


@pytest.mark.parametrize(("importance", "share"), [("token", 0.0), ("token", 0.3), ("sequence", 0.0)])
def test_text_of_an_earlier_student_gives_the_reverse_kl_of_this_one_in_expectation(
    importance: str, share: float
) -> None:
    """Over all texts of two tokens that another student (mixed with the teacher) may have written.

    Each token weighed alone: the KL after the prefixes that were written; the whole response: after those
    that the student of now would write.
    """
    student, teacher = _chain(5)
    earlier = (student + 0.7 * logits(4, 3, 11, 1.0)).softmax(-1)
    written = (1 - share) * earlier + share * teacher.softmax(-1)
    prefixes = written[0] if importance == "token" else student[0].softmax(-1)
    once, options = torch.cat([torch.ones(1).double(), prefixes]), {"discount": 0.0, "include_current": True}
    exact, slope = gradient(build("reverse_kl"), student, teacher, NONE)
    objective = build("policy_gradient", **options, importance=importance, sampling_teacher_share=share)
    value, estimate, stale = 0.0, torch.zeros_like(student), torch.zeros_like(student)
    for labels in map(torch.tensor, itertools.product(range(3), repeat=2)):
        visited = torch.tensor([0, 1 + int(labels[0])])
        chances = written[visited, labels]
        rows = Rows(labels=labels, sequence_ids=torch.zeros(2).long(), sampled_logprobs=chances.log())
        part = gradient(objective, student[visited], teacher[visited], rows)
        value += chances.prod() * part[0].sum()
        estimate[visited] += chances.prod() * part[1]
        plain = build("policy_gradient", **options)
        stale[visited] += chances.prod() * gradient(plain, student[visited], teacher[visited], rows)[1]
    torch.testing.assert_close(estimate, once[:, None] * slope)
    torch.testing.assert_close(torch.as_tensor(value), (once * exact).sum())
    assert (stale - once[:, None] * slope).abs().max() > 0.01, "without the weight it would be another one"


def test_importance_weights_are_cut_at_their_cap() -> None:
    student, teacher = _chain(3)
    labels = torch.tensor([0, 1, 2, 0])
    log_q = student.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    ratio = torch.tensor([0.5, 1.0, 2.0, 8.0]).double()
    rows = Rows(labels=labels, sequence_ids=torch.arange(4), sampled_logprobs=log_q - ratio.log())
    options = {"discount": 0.0, "include_current": True}
    plain = gradient(build("policy_gradient", **options), student, teacher, rows)[1]
    cut = build("policy_gradient", **options, importance="token", importance_cap=2.0)
    weights = ratio.clamp(max=2.0)[:, None]
    torch.testing.assert_close(gradient(cut, student, teacher, rows)[1], weights * plain)


def _sampled(share: float, student: Tensor, teacher: Tensor, labels: Tensor) -> Rows:
    """Two texts of three tokens each, with what they were sampled with from (1 - share) q + share p."""
    log_q, log_p = (
        logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1) for logits in (student, teacher)
    )
    mixture = ((1 - share) * log_q.exp() + share * log_p.exp()).log()
    return Rows(labels=labels, sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1]), sampled_logprobs=mixture)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_ppo_begins_with_the_plain_gradient_and_stops_where_it_is_clipped(share: float) -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    rows = _sampled(share, student, teacher, torch.tensor([0, 1, 2, 2, 1, 0]))
    plain = build("policy_gradient", include_current=True, sampling_teacher_share=share)
    clipped = build("policy_gradient", include_current=True, sampling_teacher_share=share, ratio_clip=0.2)
    wanted = gradient(plain, student, teacher, rows)[1]
    torch.testing.assert_close(gradient(clipped, student, teacher, rows)[1], wanted)
    # After steps that made the sampled tokens much likelier, those that gain have nothing left to win.
    raised = student.scatter_add(1, rows.labels[:, None], torch.full((6, 1), 3.0).double())
    after = gradient(clipped, raised, teacher, rows)[1]
    gains = gradient(plain, raised, teacher, rows)[1].gather(1, rows.labels[:, None]).squeeze(1) < 0
    assert (after[gains] == 0).all()


def test_whitened_returns_do_not_depend_on_scale_and_offset_of_the_rewards() -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    rows = Rows(labels=torch.tensor([0, 1, 2, 2, 1, 0]), sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1]))
    options = {"include_current": True, "discount": 0.95}
    plain = build("policy_gradient", **options)
    white, scaled = (build("policy_gradient", **options, whiten=True, reward_scale=s) for s in (1.0, 0.5))

    def gains(objective: Any) -> Tensor:  # what multiplies grad -log q(y), from its column of the gradient
        force = gradient(objective, student, teacher, rows)[1].gather(1, rows.labels[:, None]).squeeze(1)
        return force / (student.softmax(-1).gather(1, rows.labels[:, None]).squeeze(1) - 1)

    found = gains(white)
    torch.testing.assert_close(gains(scaled), found, rtol=1e-6, atol=1e-6)
    raw = gains(plain)
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std(correction=0), rtol=1e-6, atol=1e-6)


def test_returns_are_discounted_by_distance_and_not_by_position() -> None:
    from stillhouse.objectives.policy_gradient import returns

    ids = np.array([0, 1, 0, 1, 0])
    gain, left = returns(torch.tensor([1.0, 10.0, 2.0, 20.0, 3.0]), ids, 0.5, include_current=True)
    assert gain.tolist() == [1 + 0.5 * 2 + 0.25 * 3, 10 + 0.5 * 20, 2 + 0.5 * 3, 20, 3]
    assert left.tolist() == [3, 2, 2, 1, 1]
    gain, left = returns(torch.tensor([1.0, 10.0, 2.0, 20.0, 3.0]), ids, 0.5, include_current=False)
    assert gain.tolist() == [0.5 * 2 + 0.25 * 3, 0.5 * 20, 0.5 * 3, 0, 0]
    assert left.tolist() == [2, 1, 1, 0, 0]


def test_dpkd_is_the_sigmoid_of_the_pairs_gap() -> None:
    student, teacher, rows = logits(8, 6, 1), logits(8, 6, 2), drawn_rows(8, 6)
    got = build("dpkd", scale=0.3, length_normalised=False)(student, teacher, rows)
    ratio = (student.log_softmax(-1) - teacher.log_softmax(-1)).gather(-1, rows.labels[:, None])[:, 0]
    for prompt in (0, 1):
        mine = torch.from_numpy(rows.pair_ids == prompt)
        signs = torch.where(torch.from_numpy(rows.sources) == SOURCES.index("teacher"), 1.0, -1.0)
        gap = (signs * ratio)[mine].sum()
        torch.testing.assert_close(got[mine], -torch.nn.functional.logsigmoid(0.3 * gap).expand(mine.sum()))
    with pytest.raises(ValueError, match="exactly one teacher-written"):
        build("dpkd")(student[:2], teacher[:2], rows[:2])
    torch.testing.assert_close(
        build("dpkd", scale=0.3, length_normalised=False)(student, teacher, of_pairs(rows)), got
    )


def of_pairs(rows: Rows) -> Rows:
    """The same with the chosen and the rejected response of pairs for those of teacher and student."""
    teacher_written = rows.sources == SOURCES.index("teacher")
    return replace(
        rows, sources=np.where(teacher_written, SOURCES.index("chosen"), SOURCES.index("rejected"))
    )


def test_simper_is_the_difference_of_inverse_perplexities() -> None:
    student, rows = logits(8, 6, 1).double().requires_grad_(), of_pairs(drawn_rows(8, 6))
    logprobs = student.log_softmax(-1).gather(-1, rows.labels[:, None])[:, 0]
    wanted, weights = torch.zeros((), dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for sequence in np.unique(rows.sequence_ids):
        mine = torch.from_numpy(rows.sequence_ids == sequence)
        chosen = rows.sources[rows.sequence_ids == sequence][0] == SOURCES.index("chosen")
        wanted = wanted + (-1 if chosen else 1) * logprobs[mine].mean().exp()
        weights[mine] = 1 / (len(np.unique(rows.sequence_ids)) * mine.sum())
    pairs = len(np.unique(rows.pair_ids))
    got = (build("simper")(student, rows=rows) * weights).sum()
    torch.testing.assert_close(got, wanted / pairs)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, student, retain_graph=True)[0] for one in (got, wanted / pairs))
    )
    with pytest.raises(ValueError, match="simper is for responses of chosen"):
        build("simper")(student, rows=replace(rows, sources=np.full(8, SOURCES.index("fixed"))))


def test_contrastive_alpha_follows_the_gap_and_stays_in_its_bounds() -> None:
    teacher_code, student_code = SOURCES.index("teacher"), SOURCES.index("student")
    objective = build("contrastive", alpha_rule="gap", teacher_gap=0.1, student_gap=0.1)
    gaps = torch.tensor([0.1, 0.095, 0.05, 0.5, -0.2], dtype=torch.float64)
    rows = Rows(teachers={"main": TeacherRows(sequence_gaps=gaps, mean_gaps=gaps)})
    inner = 1 - 0.9 * 0.1 / (0.095 + 1e-5)
    assert objective.alphas(rows, teacher_code)[:, 0].tolist() == pytest.approx(
        [0.1, inner, 0.01, 0.1, 0.1], abs=1e-3
    )
    mirrored = Rows(teachers={"main": TeacherRows(sequence_gaps=-gaps, mean_gaps=-gaps)})
    torch.testing.assert_close(objective.alphas(mirrored, student_code), objective.alphas(rows, teacher_code))


def test_contrastive_without_a_gap_to_hold_has_the_base_alpha() -> None:
    gaps = torch.tensor([0.1, 0.05, -0.2], dtype=torch.float64)
    objective = build("contrastive", alpha_rule="gap", alpha=0.05, teacher_gap=0.0)
    rows = Rows(teachers={"main": TeacherRows(sequence_gaps=gaps, mean_gaps=-gaps.abs())})
    assert objective.alphas(rows, TEACHER_CODE)[:, 0].tolist() == [0.05] * 3
    assert build("contrastive", alpha_rule="gap", alpha=0.05).alphas(rows, TEACHER_CODE)[:, 0].tolist() == (
        [0.05] * 3
    )


def test_no_gradient_flows_through_the_alpha_of_a_gap() -> None:
    """The gradient with the rule is that with the alphas it gave, held."""
    student, teacher, rows = logits(8, 6, 1), logits(8, 6, 2), drawn_rows(8, 6)
    objective = build("contrastive", alpha_rule="gap", teacher_gap=0.02, student_gap=0.02, alpha_least=0.0)
    _, slope = gradient(objective, student, teacher, rows)
    filled = with_logprobs(student, rows.with_signals({"main": teacher}))
    for row in range(8):
        code = int(rows.sources[row])
        alpha = objective.alphas(filled[row : row + 1], code).item()
        if code == TEACHER_CODE:
            alone = build("skew_kl", alpha=alpha)
        else:
            alone = build("skew_rkl", alpha=alpha, detach_mixture=True)
        expected = gradient(alone, student[row : row + 1], teacher[row : row + 1], NONE)[1][0]
        torch.testing.assert_close(slope[row], expected)


@pytest.mark.parametrize("released", [1.0, 1.25, 1.5])
def test_the_papers_share_and_the_released_weights_are_the_same_loss(released: float) -> None:
    student, teacher, rows = logits(8, 6, 1), logits(8, 6, 2), drawn_rows(8, 6)
    paper = build("contrastive", student_share=released / 2)
    code = build("contrastive", teacher_weight=2 - released, student_weight=released)
    torch.testing.assert_close(paper(student, teacher, rows), code(student, teacher, rows))
    assert paper.source_weights() == {"teacher": 2 - released, "student": released}


def test_likelihood_gaps_are_means_over_sequences_by_source() -> None:
    teacher_code, student_code = SOURCES.index("teacher"), SOURCES.index("student")
    rows = Rows(
        sequence_ids=torch.tensor([0, 0, 1, 2]),
        sources=torch.tensor([teacher_code, teacher_code, student_code, teacher_code]),
        student_logprobs=torch.tensor([-1.0, -3.0, -1.0, -4.0]),
        teachers={"main": TeacherRows(label_logprobs=torch.tensor([-0.5, -1.5, -2.0, -3.0]))},
    )
    found = with_gaps(rows).teachers["main"]
    likelihood = torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0]).exp()
    near, far = likelihood[1] - likelihood[2], likelihood[3] - likelihood[4]
    torch.testing.assert_close(found.sequence_gaps, torch.stack([near, near, -near, far]))
    mean = (near + far) / 2
    torch.testing.assert_close(found.mean_gaps, torch.stack([mean, mean, -near, mean]))


def test_advantage_pushes_towards_what_the_preference_raised() -> None:
    student = torch.zeros(1, 3)
    teacher, reference = torch.tensor([[2.0, 0.0, 0.0]]), torch.zeros(1, 3)
    force = gradient(
        build("advantage"), student, teacher, Rows(teachers={"reference": TeacherRows(reference)})
    )[1]
    assert force[0, 0] < 0 < force[0, 1]


def test_aligned_teacher_extrapolates_beyond_the_teacher() -> None:
    teacher, reference = logits(3, 5, 1), logits(3, 5, 2)
    rows = Rows(teachers={"reference": TeacherRows(reference)})
    objective = build("aligned_teacher", weight_rule="fixed", extrapolation=0.5, scale=1.0)
    assert objective(1.5 * teacher - 0.5 * reference, teacher, rows).abs().max() < 1e-12
    assert objective(teacher, teacher, rows).min() > 1e-4


def reference_rows(reference: Any, **more: Any) -> Rows:
    return Rows(teachers={"reference": TeacherRows(reference)}, **more)


def test_a_stored_advantage_is_over_the_teachers_tokens_with_the_papers_rules() -> None:
    """By hand: a token that the reference lacks has the teacher's least stored value; 1e-7 is the floor."""
    student = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))
    tail = torch.zeros(1, dtype=torch.float64)
    teacher = SparseLogprobs(
        torch.tensor([[2, 0, 3, -1]]), torch.tensor([[-0.5, -1.5, -40.0, EXCLUDED]]).double(), tail
    )
    reference = SparseLogprobs(torch.tensor([[1, 2, 3]]), torch.tensor([[-0.1, -2.0, -30.0]]).double(), tail)
    floor = np.log(1e-7)
    wanted = -(0.3 * (-0.5 - -2.0) + 0.1 * (-1.5 - floor) + 0.4 * 0.0)
    objective = build("advantage")
    assert objective(student, teacher, reference_rows(reference)).item() == pytest.approx(wanted)
    higher = SparseLogprobs(teacher.ids[:, :2], teacher.logprobs[:, :2], tail)
    wanted = -(0.3 * (-0.5 - -2.0) + 0.1 * (-1.5 - -1.5))
    assert objective(student, higher, reference_rows(reference)).item() == pytest.approx(wanted)


@pytest.mark.parametrize("few", [("main",), ("reference",), ("main", "reference")])
def test_a_stored_advantage_of_all_tokens_is_the_whole_one(few: tuple[str, ...]) -> None:
    student, whole = (
        logits(6, 9, 0),
        {name: logits(6, 9, seed) for name, seed in (("main", 1), ("reference", 2))},
    )
    stored = {name: topk_of(one.log_softmax(-1), 9) if name in few else one for name, one in whole.items()}
    objective = build("advantage")
    torch.testing.assert_close(objective(student, stored), objective(student, whole))
    kept = {**stored, few[0]: topk_of(whole[few[0]].log_softmax(-1), 4)}
    assert not torch.allclose(objective(student, kept), objective(student, whole), rtol=1e-3)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_an_advantage_is_weighted_by_how_much_likelier_the_text_has_become(importance: str) -> None:
    student, teacher, rows = logits(8, 6, 1), logits(8, 6, 2), drawn_rows(8, 6)
    assert rows.labels is not None
    ours = student.log_softmax(-1).gather(-1, rows.labels[:, None])[:, 0]
    difference = ours - rows.sampled_logprobs
    ratio = difference.clone()
    if importance == "sequence":
        for number in np.unique(rows.sequence_ids):
            mine = torch.from_numpy(rows.sequence_ids == number)
            ratio[mine] = difference[mine].sum()
    plain, force = gradient(build("advantage"), student, teacher, rows)
    weighed, weighed_force = gradient(build("advantage", importance=importance), student, teacher, rows)
    torch.testing.assert_close(weighed, ratio.exp() * plain)
    torch.testing.assert_close(weighed_force, ratio.exp()[:, None] * force)


def test_aligned_teacher_from_the_reference_is_the_optimum_of_rlhf() -> None:
    """Theorem 1: with the reward s log p / p_ref and the KL weight s / w it is p_ref (p / p_ref)^w."""
    teacher, reference, w = logits(3, 5, 1), logits(3, 5, 2), 0.3
    rows = reference_rows(reference)
    optimum = (1 - w) * reference.log_softmax(-1) + w * teacher.log_softmax(-1)
    options = {"weight_rule": "fixed", "extrapolation": w, "start": "reference"}
    assert build("aligned_teacher", **options)(optimum, teacher, rows).abs().max() < 1e-12
    student, scale = logits(3, 5, 4), 0.1
    q = student.log_softmax(-1)
    reward = scale * (teacher.log_softmax(-1) - reference.log_softmax(-1))
    rlhf = (q.exp() * (reward - scale / w * (q - reference.log_softmax(-1)))).sum(-1)
    best = scale / w * optimum.logsumexp(-1)
    torch.testing.assert_close(
        build("aligned_teacher", scale=scale, **options)(student, teacher, rows), best - rlhf
    )


def test_the_reward_of_a_response_reaches_each_token_before_its_end() -> None:
    """By hand: two sequences whose rows alternate; the force on a label is -(what follows) grad log q."""
    student, teacher = logits(5, 4, 1), logits(5, 4, 2)
    rows = Rows(
        labels=torch.tensor([0, 1, 2, 3, 1]),
        sequence_ids=torch.tensor([0, 1, 0, 1, 0]),
        rewards=torch.tensor([2.0, -1.0, 2.0, -1.0, 2.0], dtype=torch.float64),
    )
    alone = build("policy_gradient", ratio_weight=0.0, reward_weight=0.5, discount=0.9)
    value, force = gradient(alone, student, teacher, rows)
    torch.testing.assert_close(value, -0.5 * rows.rewards / torch.tensor([3.0, 2, 3, 2, 3]).double())
    left = torch.tensor([2, 1, 1, 0, 0])
    gain = 0.5 * rows.rewards * 0.9**left
    one = torch.nn.functional.one_hot(rows.labels, 4)
    torch.testing.assert_close(force, -gain[:, None] * (one - student.softmax(-1)))
    both = build("policy_gradient", ratio_weight=0.3, reward_weight=0.5, discount=0.9)
    of_teacher = gradient(build("policy_gradient", discount=0.9), student, teacher, rows)
    found = gradient(both, student, teacher, rows)
    for got, first, second in zip(found, (value, force), of_teacher, strict=True):
        torch.testing.assert_close(got, first + 0.3 * second)
