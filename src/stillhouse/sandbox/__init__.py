"""Runs programs that a model wrote, and decides whether they pass tests, without trusting them.

Two processes, both confined (`confine.py`): a worker that holds the program, and a checker that holds the
tests. Between them go plain values only (`values.py`), so the program never sees a test, an expected value or
the checker's memory, and an object that claims to equal everything arrives as the data that it is.

This package is imported inside those processes too, by a Python without site-packages: it uses the standard
library alone, and `errors` where it is asked by Stillhouse itself.
"""

from stillhouse.sandbox.check import Checks, Limits, Verdict, check_program, require

__all__ = ["Checks", "Limits", "Verdict", "check_program", "require"]
