"""Datasets to batches: row formats, prompt templates, tokenisation, length rules, collation."""

from stillhouse.core.batch import IGNORED, Batch
from stillhouse.data.collate import collate, split
from stillhouse.data.config import DataConfig
from stillhouse.data.datasets import DATASETS, DatasetConfig, DatasetField
from stillhouse.data.load import Data, PromptSet, load_data, load_prompts
from stillhouse.data.teacher_prompts import TeacherReads
from stillhouse.data.templates import TEMPLATES, Template
from stillhouse.data.tokenise import Encoder

__all__ = [
    "DATASETS",
    "IGNORED",
    "TEMPLATES",
    "Batch",
    "Data",
    "DataConfig",
    "DatasetConfig",
    "DatasetField",
    "Encoder",
    "PromptSet",
    "TeacherReads",
    "Template",
    "collate",
    "load_data",
    "load_prompts",
    "split",
]
