"""Data in: sources of rows, templates, length rules, and batches of tensors."""

from stillhouse.core.batch import IGNORED, Batch
from stillhouse.data.collate import collate, split
from stillhouse.data.load import Data, DataConfig, PromptSet, load, load_prompts, overlap
from stillhouse.data.sources import SOURCES, Source, SourceConfig
from stillhouse.data.templates import TEMPLATES, Encoder, Template

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
