"""Formats of dataset rows. A new format is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.data.formats.base import FORMATS, RowFormat, format_of, read_row, register
from stillhouse.data.formats.values import RawRow

import_submodules(__name__)

__all__ = ["FORMATS", "RawRow", "RowFormat", "format_of", "read_row", "register"]
