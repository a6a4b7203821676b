"""Where rows are: files of JSON, tables and text, datasets of the `datasets` library, mixtures of these."""

from stillhouse.config import import_submodules
from stillhouse.data.datasets.base import DATASETS, DatasetConfig, LocatedRow
from stillhouse.data.datasets.parse import ENDINGS, DatasetField, dataset_at, kind_of, parse_dataset

import_submodules(__name__)

__all__ = [
    "DATASETS",
    "ENDINGS",
    "DatasetConfig",
    "DatasetField",
    "LocatedRow",
    "dataset_at",
    "kind_of",
    "parse_dataset",
]
