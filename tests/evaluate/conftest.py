"""The workshop of the command line's tests, for tasks that have a verb of their own."""

from tests.commands.conftest import models, workshop  # noqa: F401
