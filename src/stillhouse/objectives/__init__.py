"""Every objective of the field behind one interface: its definition, its closed form, its needs."""

from stillhouse.objectives import (
    combined,
    concrete,
    contrastive,
    divergences,
    mixtures,
    policy_gradient,
    preference,
    span,
    supervised,
    transport,
    uld,
)
from stillhouse.objectives.base import REGISTRY, Objective, ObjectiveField, build, kinds

__all__ = [
    "REGISTRY",
    "Objective",
    "ObjectiveField",
    "build",
    "combined",
    "concrete",
    "contrastive",
    "divergences",
    "kinds",
    "mixtures",
    "policy_gradient",
    "preference",
    "span",
    "supervised",
    "transport",
    "uld",
]
