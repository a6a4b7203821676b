"""Responses as files: generated in stages that can be interrupted anywhere, filtered, counted, read back."""

from stillhouse.config import import_submodules

import_submodules(__name__)
