"""Every objective of the field behind one interface, plain and fused over the language-model head."""

from stillhouse.objectives import (
    combined,
    concrete,
    contrastive,
    crosstoken,
    divergences,
    mixtures,
    preference,
    sampled,
    span,
    supervised,
    transport,
)
from stillhouse.objectives.alignment import Alignment, Matching
from stillhouse.objectives.base import REGISTRY, Objective, ObjectiveField, build, kinds
from stillhouse.objectives.chunked import fused_label_facts, fused_loss, fused_rows
from stillhouse.objectives.compact import Compact
from stillhouse.objectives.head import Head
from stillhouse.objectives.rows import Rows, likelihood_gaps
from stillhouse.objectives.work import Chunking

__all__ = [
    "REGISTRY",
    "Alignment",
    "Chunking",
    "Compact",
    "Head",
    "Matching",
    "Objective",
    "ObjectiveField",
    "Rows",
    "build",
    "combined",
    "concrete",
    "contrastive",
    "crosstoken",
    "divergences",
    "fused_label_facts",
    "fused_loss",
    "fused_rows",
    "kinds",
    "likelihood_gaps",
    "mixtures",
    "preference",
    "sampled",
    "span",
    "supervised",
    "transport",
]
