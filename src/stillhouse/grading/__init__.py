"""Grades responses by rule: mathematics by the value of the final answer, code by running its tests."""

from stillhouse.grading.code import require_sandbox, run_program
from stillhouse.grading.maths import Grade, grade
from stillhouse.grading.problems import CodeProblem, MathsProblem, problem_of

__all__ = ["CodeProblem", "Grade", "MathsProblem", "grade", "problem_of", "require_sandbox", "run_program"]
