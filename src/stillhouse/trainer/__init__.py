"""Distillation from Python, as users of transformers and TRL write it: models and rows in memory."""

from stillhouse.trainer.config import DistilConfig
from stillhouse.trainer.one_call import distil
from stillhouse.trainer.trainer import DistilTrainer

__all__ = ["DistilConfig", "DistilTrainer", "distil"]
