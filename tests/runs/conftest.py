"""The same workshop as the command line's tests have."""

from tests.commands.conftest import models, workshop

__all__ = ["models", "workshop"]
