"""Answers that a program can check: of mathematics by value, of code by running its tests in the sandbox."""

from stillhouse.grading.rows import problem_of, right

__all__ = ["problem_of", "right"]
