"""Runs programs that a model wrote, and tests against them, without trusting either.

Two processes, both confined (`confine.py`): a worker holds the program, a checker holds the tests. Only plain
values go between them (`protocol.py`), so the program never sees a test, an expected value or the checker's
memory, and an object that claims to equal everything arrives as the data that it is.

The package imports the standard library and nothing of Stillhouse: it is loaded inside the confined processes
too, by a Python without site-packages.
"""

from stillhouse.sandbox.supervisor import (
    ExecutionResult,
    Limits,
    ProgramTests,
    SandboxUnavailable,
    check_program,
    ensure_available,
    hides_files,
)

__all__ = [
    "ExecutionResult",
    "Limits",
    "ProgramTests",
    "SandboxUnavailable",
    "check_program",
    "ensure_available",
    "hides_files",
]
