"""Stages that train a distilled student on preference pairs; a new one is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.train.preference.base import REGISTRY, PreferenceField, PreferenceStage, StageTraining

import_submodules(__name__)

__all__ = ["REGISTRY", "PreferenceField", "PreferenceStage", "StageTraining"]
