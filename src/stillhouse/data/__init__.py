"""Data in: sources of rows, templates, length rules, and batches of tensors."""

from stillhouse.data.collate import IGNORED, Batch, collate, split
from stillhouse.data.load import Data, DataConfig, PromptSet, load, load_prompts, overlap
from stillhouse.data.prompts import SOURCES, Source, SourceConfig
from stillhouse.data.template import TEMPLATES, Encoder, Template

__all__ = [
    "IGNORED",
    "SOURCES",
    "TEMPLATES",
    "Batch",
    "Data",
    "DataConfig",
    "Encoder",
    "PromptSet",
    "Source",
    "SourceConfig",
    "Template",
    "collate",
    "load",
    "load_prompts",
    "overlap",
    "split",
]
