"""The sizes of the student: those that are given, and those that a number of parameters asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd, log
from typing import Any

from torch import nn

from stillhouse.errors import Fault, ModelError
from stillhouse.models.pruning.choose import evenly
from stillhouse.models.pruning.config import Prune
from stillhouse.models.pruning.layout import Layout
from stillhouse.models.pruning.sizes import FIELD, Sizes, pruned_config

STEPS = 12
"""Into so many equal steps at least the width of a model is divided where a target is looked for."""
LARGEST_STEP = 64


def student_sizes(prune: Prune, model: nn.Module, layout: Layout, vocabulary: int | None = None) -> Sizes:
    """The sizes that a student gets.

    Args:
        prune: what is asked for.
        model: the teacher, which may have no weights.
        layout: of it.
        vocabulary: how many tokens stay; None: all.

    Raises:
        ModelError: a size is larger than the teacher's, or sizes do not divide each other as they must.
    """
    whole = layout.sizes
    if vocabulary is not None:
        whole = replace(whole, vocabulary=vocabulary)
    given = _given(prune, whole, layout)
    _check(given, layout)
    if given != whole:
        pruned_config(model.config, evenly(_depth(model), given.layers), given)
    if prune.parameters is None:
        return given
    names = frozenset(name for name, _ in model.named_parameters())
    return _fitted(prune, model, layout, given, names)


def _given(prune: Prune, whole: Sizes, layout: Layout) -> Sizes:
    """What is asked for by name; the rest as in the teacher."""
    layers = len(prune.given_layers) if prune.given_layers is not None else prune.layers
    heads, key_values = prune.num_attention_heads, prune.num_key_value_heads
    hidden = prune.hidden_size
    if layout.tied_heads and (hidden is None) != (heads is None and key_values is None):
        # one follows from the other
        if hidden is None:
            hidden = layout.head * (heads or (key_values or 1) * whole.group)
        else:
            heads = _whole(
                "hidden_size",
                hidden,
                layout.head,
                f"{layout.family} has heads of {layout.head}, together as wide as the hidden size",
            )
    if heads is not None and key_values is None:
        key_values = _whole(
            "num_attention_heads", heads, whole.group, f"{whole.group} heads read one key-value head"
        )
    elif heads is None and key_values is not None:
        heads = key_values * whole.group
    return Sizes(
        whole.layers if not isinstance(layers, int) else layers,
        hidden or whole.hidden_size,
        prune.intermediate_size or whole.intermediate_size,
        heads or whole.num_attention_heads,
        key_values or whole.num_key_value_heads,
        whole.vocabulary,
    )


def _whole(name: str, size: int, unit: int, reason: str) -> int:
    if size % unit:
        raise ModelError(str(Fault(f"{FIELD}.{name}", reason, got=str(size), allowed=f"multiples of {unit}")))
    return size // unit


def _check(sizes: Sizes, layout: Layout) -> None:
    """Refuse sizes that are no part of the teacher's."""
    whole = layout.sizes
    for name in ("layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        size, most = getattr(sizes, name), getattr(whole, name)
        if size > most:
            raise ModelError(
                str(Fault(f"{FIELD}.{name}", "the teacher has fewer", got=str(size), allowed=f"1 to {most}"))
            )
    if sizes.num_attention_heads % sizes.num_key_value_heads or sizes.group > whole.group:
        raise ModelError(
            str(
                Fault(
                    f"{FIELD}.num_attention_heads",
                    f"each of {sizes.num_key_value_heads} key-value heads is read by as many heads, at most "
                    f"{whole.group}",
                    got=str(sizes.num_attention_heads),
                )
            )
        )
    if layout.tied_heads and sizes.hidden_size != sizes.num_attention_heads * layout.head:
        raise ModelError(
            f"{FIELD}.hidden_size: in {layout.family} it is num_attention_heads x {layout.head}; got "
            f"{sizes.hidden_size} and {sizes.num_attention_heads} heads. Give one of the two."
        )
    for name, block in (("intermediate_size", "mlp"), ("num_attention_heads", "attention")):
        if getattr(sizes, name) != getattr(whole, name) and block not in layout.back:
            raise ModelError(
                f"{FIELD}.{name}: {layout.family} has no {block} whose projections Stillhouse knows. Its "
                f"layers can be cut: {FIELD}.layers."
            )


def _fitted(prune: Prune, model: Any, layout: Layout, given: Sizes, names: frozenset[str]) -> Sizes:
    """The sizes with at most so many parameters that keep about the same share of everything.

    Of all layers x hidden sizes x groups of heads on a grid, each with the widest MLP that holds the target,
    the one whose shares of the teacher's sizes differ least: the smallest variance of their logarithms; of
    equal ones the one with the most parameters, then the deepest. What is given is no part of the search.
    """
    assert prune.parameters is not None
    target = prune.parameters
    most = layout.parameters(given, names)
    if most <= target:
        raise ModelError(
            f"{FIELD}.parameters: the sizes that are given have {most:,} parameters already, no more than "
            f"{target:,}. Leave parameters out, or lower it."
        )
    best: tuple[tuple[float, ...], Sizes] | None = None
    for sizes in _candidates(prune, layout, given):
        fitting = _widest_mlp(prune, layout, sizes, names, target)
        if fitting is None:
            continue
        rank = (_imbalance(prune, layout, fitting), -layout.parameters(fitting, names), -fitting.layers)
        if (best is None or rank < best[0]) and _takes(model, fitting):
            best = rank, fitting
    if best is None:
        raise ModelError(
            f"{FIELD}.parameters: {target:,} cannot be reached with what is given; {given.vocabulary:,} "
            f"tokens x {given.hidden_size} alone are {given.vocabulary * given.hidden_size:,}. Give less of "
            "that, or trim the embeddings: vocabulary: data."
        )
    return best[1]


def _candidates(prune: Prune, layout: Layout, given: Sizes) -> Iterator[Sizes]:
    """Every depth, hidden size and number of groups on the grid, as far as they are free."""
    whole = layout.sizes
    depths: Sequence[int] = range(1, whole.layers + 1) if prune.layers is None else (given.layers,)
    free_heads = prune.num_attention_heads is None and prune.num_key_value_heads is None
    groups: Sequence[int] = (
        range(1, whole.num_key_value_heads + 1) if free_heads else (given.num_key_value_heads,)
    )
    if "attention" not in layout.back:
        groups = (whole.num_key_value_heads,)
    step = _step(whole.hidden_size)
    widths: Sequence[int] = range(step, whole.hidden_size + 1, step)
    if prune.hidden_size is not None:
        widths = (given.hidden_size,)
    for depth in depths:
        for group in groups:
            heads = group * given.group
            for width in (heads * layout.head,) if layout.tied_heads else widths:
                yield replace(
                    given,
                    layers=depth,
                    hidden_size=width,
                    num_attention_heads=heads,
                    num_key_value_heads=group,
                )


def _widest_mlp(
    prune: Prune, layout: Layout, sizes: Sizes, names: frozenset[str], target: int
) -> Sizes | None:
    """The same with the widest MLP that holds the target; None if there is none."""
    if prune.intermediate_size is not None or "mlp" not in layout.back:
        return sizes if layout.parameters(sizes, names) <= target else None
    step = _step(layout.sizes.intermediate_size)
    least = layout.parameters(replace(sizes, intermediate_size=step), names)
    if least > target:
        return None
    each = layout.parameters(replace(sizes, intermediate_size=2 * step), names) - least
    wide = min((target - least) // each + 1, layout.sizes.intermediate_size // step)
    return replace(sizes, intermediate_size=wide * step)


def _imbalance(prune: Prune, layout: Layout, sizes: Sizes) -> float:
    """Variance of the logarithms of what is kept of each free size."""
    free = [
        name
        for name in ("layers", "hidden_size", "intermediate_size", "num_key_value_heads")
        if getattr(prune, name) is None
    ]
    shares = [log(getattr(sizes, name) / getattr(layout.sizes, name)) for name in free]
    mean = sum(shares) / max(1, len(shares))
    return round(sum((share - mean) ** 2 for share in shares), 9)


def _step(size: int) -> int:
    """A divisor of the size that is a power of two, at most 64 and at most a twelfth of it."""
    step = gcd(size, LARGEST_STEP)
    while step > 1 and size // step < STEPS:
        step //= 2
    return step


def _takes(model: Any, sizes: Sizes) -> bool:
    """Whether the family's configuration takes such sizes."""
    try:
        pruned_config(model.config, evenly(_depth(model), sizes.layers), sizes)
    except ModelError:
        return False
    return True


def _depth(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)
