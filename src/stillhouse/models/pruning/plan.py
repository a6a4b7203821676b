"""From a configuration and a teacher to what of it stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import ModelError
from stillhouse.models.hidden import image_reader, unwrap
from stillhouse.models.pruning.choose import Kept, choose, evenly, facts
from stillhouse.models.pruning.config import Prune
from stillhouse.models.pruning.cut import check_layout, cut
from stillhouse.models.pruning.fit import student_sizes
from stillhouse.models.pruning.importance import measure
from stillhouse.models.pruning.layout import Layout, layout_of, without_weights
from stillhouse.models.pruning.sizes import FIELD, pruned_config
from stillhouse.models.quantise import is_quantised


@dataclass(frozen=True)
class PruningPlan:
    """What of a teacher stays, and what is told of it.

    Example: `plan_pruning(Prune(layers=(0, 3)), teacher).kept.layers  # (0, 3)`
    """

    kept: Kept
    facts: dict[str, Any]
    """For the run folder: sizes before and after, what is kept, block influence."""


def plan_pruning(
    prune: Prune,
    teacher: nn.Module,
    batches: Iterable[TokenBatch] | None = None,
) -> PruningPlan:
    """Which layers, channels and heads of a teacher stay.

    Args:
        prune: what is asked for.
        teacher: with its weights.
        batches: what importance is measured on, on the teacher's device; read only if it is.

    Raises:
        ModelError: the teacher has no such sizes, or its family cannot be cut like that.
    """
    model = unwrap(teacher)
    if is_quantised(model):
        raise ModelError(f"{FIELD}: the teacher is quantised. Name the model that it was made from.")
    with torch.random.fork_rng(devices=[]):
        layout = layout_of(model)
    sizes = student_sizes(prune, model, layout)
    importance = None
    if prune.measures:
        if batches is None:
            raise ModelError(
                f"{FIELD}: importance is measured on data, and there are none here. Name the layers, or set "
                f"{FIELD}.choose: even."
            )
        importance = measure(model, layout, batches)
    kept = choose(prune, layout, sizes, importance)
    return PruningPlan(kept, facts(kept, layout, prune, importance))


def pruned(teacher: nn.Module, kept: Kept) -> nn.Module:
    """A student of what is kept, in the teacher's dtype.

    Raises:
        ModelError: the teacher's family cannot be cut like that.
    """
    model = unwrap(teacher)
    with torch.random.fork_rng(devices=[]):  # adapters drawn behind it do not depend on a check
        layout: Layout = layout_of(model)
        check_layout(model, layout, kept)
    return cut(model, layout, kept)


def with_tokens(model: nn.Module, tokens: tuple[int, ...]) -> nn.Module:
    """A frozen model with the embeddings of some tokens alone, numbered in their order: its distribution is
    the model's own given that the next token is one of them.

    Raises:
        ModelError: it also sees, and images have tokens in it.
    """
    inner = unwrap(model)
    if image_reader(inner) is not None:
        raise ModelError(
            f"{FIELD}.vocabulary: a model that reads images keeps all tokens. Use vocabulary: all."
        )
    with torch.random.fork_rng(devices=[]):
        layout = layout_of(inner)
        sizes = replace(layout.sizes, vocabulary=len(tokens))
        kept = Kept(sizes, tuple(range(sizes.layers)), vocabulary=tokens)
        return cut(inner, layout, kept).requires_grad_(False).eval()


def pruned_without_weights(prune: Prune, teacher: nn.Module, vocabulary: int) -> nn.Module:
    """The student's architecture on the device meta: what its sizes are before anything is measured.

    Args:
        prune: what is asked for.
        teacher: without weights.
        vocabulary: how many tokens the student's tokenizer has.

    Raises:
        ModelError: as `plan_pruning`.
    """
    layout = layout_of(teacher)
    tokens = vocabulary if prune.vocabulary == "data" else None
    sizes = student_sizes(prune, teacher, layout, tokens)
    layers = prune.given_layers or evenly(layout.sizes.layers, sizes.layers)
    plain = sizes == replace(layout.sizes, layers=sizes.layers)
    return without_weights(teacher, pruned_config(teacher.config, layers, None if plain else sizes))
