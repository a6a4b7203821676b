"""Formats of dataset rows. A new format is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.data.formats.base import FORMATS, RowFormat, read_row, register

import_submodules(__name__)

__all__ = ["FORMATS", "RowFormat", "read_row", "register"]
