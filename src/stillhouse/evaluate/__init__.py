"""Evaluation: tasks, likelihood and fidelity on given text, scored generations, and an LLM judge."""

from stillhouse.evaluate.config import EvaluateConfig
from stillhouse.evaluate.generation import ScoredResponses, generate_and_score
from stillhouse.evaluate.likelihood import Likelihood, likelihood

__all__ = ["EvaluateConfig", "Likelihood", "ScoredResponses", "generate_and_score", "likelihood"]
