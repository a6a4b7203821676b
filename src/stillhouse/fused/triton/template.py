"""The kernel that all objectives with a kernel form share: two to four passes over a row of logits.

One program has one row of both models' logits, in loops over blocks of the vocabulary:

1. `log_normalisers`: log-sum-exp of both, kept in each lane while the loop runs, and the mean residuals;
2. `mixture_normaliser`: the same of a distribution made of both, where the objective has one;
3. `row_sums`: the objective's sums over the vocabulary, where its gradient needs such;
4. `last_pass`: its value, and the gradient for the bare product, which may be written over the logits.

Each pass makes the logits from the product anew (bias, scale, soft cap) and leaves out what is -inf in either
model. Passes run backwards and forwards in turn, so that each begins with what the one before left in the
cache; the last runs forwards. Rows are found with 64-bit offsets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from stillhouse.objectives.kernels.token import EXCLUDED, Means, Token


class LogitRows(NamedTuple):
    """Rows of logits of one model: softcap tanh(scale (product + bias) / softcap)."""

    product: Any
    stride: Any
    bias: Any
    scale: Any
    softcap: Any


class LabelRows(NamedTuple):
    """The label y of each row: `value_weight` times -log q(y) is added to the value, and `slope` times the
    gradient of log q(y) to the gradient."""

    ids: Any
    slope: Any
    value_weight: Any


class Scope(NamedTuple):
    """What is the same for all tokens of a row before anything is computed."""

    row: Any
    height: Any
    """How many ids are compared."""
    width: Any
    """How many entries of a row can be read and written: with a multiple of 16 these are wide transfers."""
    inverse: Any
    """1 / temperature."""
    numbers: Any
    """What the functions of the objective take."""


class Normalisers(NamedTuple):
    """Log-sum-exp of the logits of both models, divided by the temperature."""

    student: Any
    teacher: Any


@triton.jit
def column_at(index, blocks, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """The columns of a block, counted from the end where the loop runs backwards."""
    if BACKWARD:
        index = blocks - 1 - index
    return index * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def logits_at(model, scope, column, BIAS: tl.constexpr, CAP: tl.constexpr, E: tl.constexpr):
    """The logits of a model at some columns."""
    z = tl.load(model.product + scope.row * model.stride + column, mask=column < scope.width, other=0.0).to(E)
    if BIAS:
        z += tl.load(model.bias + column, mask=column < scope.height, other=0.0).to(E)
    z = z * model.scale
    if CAP:
        z = (2.0 * tl.sigmoid(2.0 * z / model.softcap) - 1.0) * model.softcap
    return z


@triton.jit
def pair_at(
    student, teacher, scope, column, HEADS: tl.constexpr, TARGET: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The logits of both models at some columns, and which of these take part."""
    inside = column < scope.height
    s = logits_at(student, scope, column, HEADS & 1, HEADS & 2, E)
    inside = inside & (s != float("-inf"))
    t = s
    if teacher is not None:
        t = logits_at(teacher, scope, column, HEADS & 4, HEADS & 8, E)
        inside = inside & (t != float("-inf"))
    s = tl.where(inside, s, EXCLUDED)
    t = tl.where(inside, t, EXCLUDED)
    if TARGET is not None:
        t = TARGET(s, t, scope.numbers)
    return s, t, inside


@triton.jit
def online(top, mass, moment, z, x, MOMENT: tl.constexpr):
    """One step of the log-sum-exp of each lane, and of the sum of e^z x beside it."""
    d = z - top
    e = tl.exp(-tl.abs(d))
    mass = tl.where(d > 0, mass * e + 1.0, mass + e)
    if MOMENT:
        moment = tl.where(d > 0, moment * e + x, moment + e * x)
    return tl.maximum(top, z), mass, moment


@triton.jit
def joined(top, mass, moment):
    """All lanes together: log-sum-exp, and the mean of x under the softmax."""
    highest = tl.max(top, 0)
    scale = tl.exp(top - highest)
    total = tl.sum(mass * scale, 0)
    return highest + tl.log(total), tl.sum(moment * scale, 0) / total


@triton.jit
def log_normalisers(
    student, teacher, scope, HEADS: tl.constexpr, TARGET: tl.constexpr, MEANS: tl.constexpr,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The normalisers at the temperature, and those means of the residual that `MEANS` asks for: 1 under the
    student, 2 under the teacher, 4 plain."""
    top_s = tl.full((BLOCK,), EXCLUDED, E)
    top_t = tl.full((BLOCK,), EXCLUDED, E)
    mass_s = tl.zeros((BLOCK,), E)
    mass_t = tl.zeros((BLOCK,), E)
    moment_s = tl.zeros((BLOCK,), E)
    moment_t = tl.zeros((BLOCK,), E)
    plain = tl.zeros((BLOCK,), E)
    count = tl.zeros((BLOCK,), E)
    blocks = tl.cdiv(scope.height, BLOCK)
    for index in range(0, blocks):
        column = column_at(index, blocks, BLOCK, BACKWARD)
        s, t, inside = pair_at(student, teacher, scope, column, HEADS, TARGET, E)
        residual = s - t
        top_s, mass_s, moment_s = online(top_s, mass_s, moment_s, s * scope.inverse, residual, MEANS & 1)
        if teacher is not None:
            top_t, mass_t, moment_t = online(top_t, mass_t, moment_t, t * scope.inverse, residual, MEANS & 2)
        if MEANS & 4:
            plain += residual
            count += inside.to(E)
    log_s, mean_s = joined(top_s, mass_s, moment_s)
    log_t, mean_t = log_s, mean_s
    if teacher is not None:
        log_t, mean_t = joined(top_t, mass_t, moment_t)
    mean, share = mean_s, mean_s
    if MEANS & 4:
        share = 1.0 / tl.sum(count, 0)
        mean = tl.sum(plain, 0) * share
    return Normalisers(log_s, log_t), Means(mean_s, mean_t, mean, share)


@triton.jit
def token_at(s, t, scope, norms, log_zm, MIXTURE: tl.constexpr):
    """What the functions of an objective see of the tokens of a block."""
    log_q = s * scope.inverse - norms.student
    log_p = t * scope.inverse - norms.teacher
    log_m = log_q
    if MIXTURE is not None:
        log_m = MIXTURE(log_q, log_p, scope.numbers) - log_zm
    return Token(log_q, tl.exp(log_q), log_p, tl.exp(log_p), s - t, log_m)


@triton.jit
def mixture_normaliser(
    student, teacher, scope, norms, HEADS: tl.constexpr, MIXTURE: tl.constexpr, BLOCK: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of what `MIXTURE` makes of both log-probabilities."""
    top = tl.full((BLOCK,), EXCLUDED, E)
    mass = tl.zeros((BLOCK,), E)
    blocks = tl.cdiv(scope.height, BLOCK)
    for index in range(0, blocks):
        column = column_at(index, blocks, BLOCK, False)
        s, t, inside = pair_at(student, teacher, scope, column, HEADS, None, E)
        mixed = MIXTURE(s * scope.inverse - norms.student, t * scope.inverse - norms.teacher, scope.numbers)
        top, mass, _ = online(top, mass, mass, tl.where(inside, mixed, EXCLUDED), mass, False)
    return joined(top, mass, mass)[0]


@triton.jit
def row_sums(
    student, teacher, scope, norms, log_zm, HEADS: tl.constexpr, TARGET: tl.constexpr, MIXTURE: tl.constexpr,
    SUMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The sums over the vocabulary of the `COUNT` numbers that `SUMS` gives for each token, at most four."""
    a = tl.zeros((BLOCK,), E)
    b = tl.zeros((BLOCK,), E)
    c = tl.zeros((BLOCK,), E)
    d = tl.zeros((BLOCK,), E)
    blocks = tl.cdiv(scope.height, BLOCK)
    for index in range(0, blocks):
        column = column_at(index, blocks, BLOCK, True)
        s, t, inside = pair_at(student, teacher, scope, column, HEADS, TARGET, E)
        parts = SUMS(token_at(s, t, scope, norms, log_zm, MIXTURE), scope.numbers)
        a += tl.where(inside, parts[0], 0.0)
        if COUNT > 1:
            b += tl.where(inside, parts[1], 0.0)
        if COUNT > 2:
            c += tl.where(inside, parts[2], 0.0)
        if COUNT > 3:
            d += tl.where(inside, parts[3], 0.0)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)


@triton.jit
def last_pass(
    student, teacher, scope, norms, log_zm, means, sums, out, out_stride, weight,
    loss_weight, labels, HEADS: tl.constexpr, TARGET: tl.constexpr, MIXTURE: tl.constexpr,
    TERMS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The value of the row; the gradient, times `weight` and the slope of the head, goes to `out`."""
    value = tl.zeros((BLOCK,), E)
    label = -1
    slope = 0.0
    if labels is not None:
        label = tl.load(labels.ids + scope.row)
        slope = tl.load(labels.slope + scope.row).to(E)
    blocks = tl.cdiv(scope.width, BLOCK)
    for index in range(0, blocks):
        column = column_at(index, blocks, BLOCK, False)
        s, t, inside = pair_at(student, teacher, scope, column, HEADS, TARGET, E)
        token = token_at(s, t, scope, norms, log_zm, MIXTURE)
        gradient = tl.zeros((BLOCK,), E)
        if TERMS is not None:
            term, force = TERMS(token, means, sums, scope.numbers)
            value += tl.where(inside, loss_weight * term, 0.0)
            gradient += weight * force
        if labels is not None:
            hit = column == label
            value -= tl.where(hit, labels.value_weight * token.log_q, 0.0)
            gradient += slope * (hit.to(E) - token.q)
        if out is not None:
            gradient = gradient * student.scale
            if HEADS & 2:
                gradient = gradient * (1.0 - (s / student.softcap) * (s / student.softcap))
            place = out + scope.row * out_stride + column
            if ADD:
                gradient += tl.load(place, mask=column < scope.width, other=0.0).to(E)
            tl.store(
                place, tl.where(inside, gradient, 0.0).to(out.dtype.element_ty), mask=column < scope.width
            )
    return tl.sum(value, 0)


@triton.jit
def template(
    student, teacher, out, out_stride, values, token_weight, loss_weight, labels, height, width, inverse,
    numbers, first_number, HEADS: tl.constexpr, TARGET: tl.constexpr, MIXTURE: tl.constexpr,
    SUMS: tl.constexpr, COUNT: tl.constexpr, TERMS: tl.constexpr, MEANS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One row; see the module.

    Args:
        student: `LogitRows` of the products [n, at least `width`].
        teacher: the same; None if the objective asks no teacher.
        out: where the gradient goes, [n, at least `width`]; zero from `height` on. None: no gradient.
        values: [n], in nats, without `token_weight`.
        token_weight: [n], for the gradient.
        loss_weight: of the objective in the one that holds it.
        labels: `LabelRows`, or None.
        height: how many ids are compared.
        width: how many columns are written.
        inverse: 1 / temperature.
        numbers: what the functions of the objective take.
        first_number: [n], in place of the first of them; or None.
        HEADS: 1 and 2 where the student's head has a bias and a soft cap, 4 and 8 the teacher's.
        ADD: values and gradients are added to what is there.
    """
    row = tl.program_id(0).to(tl.int64)
    if first_number is not None:
        numbers = (
            tl.load(first_number + row).to(E),
            numbers[1],
            numbers[2],
            numbers[3],
            numbers[4],
            numbers[5],
        )
    scope = Scope(row, height, width, inverse, numbers)
    TURNS: tl.constexpr = ((MIXTURE is None) and (SUMS is None)) or (
        (MIXTURE is not None) and (SUMS is not None)
    )
    norms, means = log_normalisers(student, teacher, scope, HEADS, TARGET, MEANS, BLOCK, TURNS, E)
    log_zm = 0.0
    if MIXTURE is not None:
        log_zm = mixture_normaliser(student, teacher, scope, norms, HEADS, MIXTURE, BLOCK, E)
    sums = (0.0, 0.0, 0.0, 0.0)
    if SUMS is not None:
        sums = row_sums(student, teacher, scope, norms, log_zm, HEADS, TARGET, MIXTURE, SUMS, COUNT, BLOCK, E)
    weight = tl.load(token_weight + row).to(E) * loss_weight
    value = last_pass(
        student, teacher, scope, norms, log_zm, means, sums, out, out_stride, weight,
        loss_weight, labels, HEADS, TARGET, MIXTURE, TERMS, ADD, BLOCK, E,
    )  # fmt: skip
    if ADD:
        value += tl.load(values + row)
    tl.store(values + row, value.to(values.dtype.element_ty))
