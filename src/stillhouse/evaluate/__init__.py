"""How good a model is: likelihood and fidelity on given text, ROUGE-L and statistics of its own answers."""

from stillhouse.evaluate.answers import Answers, answer
from stillhouse.evaluate.config import EvaluateConfig
from stillhouse.evaluate.likelihood import Likelihood, likelihood

__all__ = ["Answers", "EvaluateConfig", "Likelihood", "answer", "likelihood"]
