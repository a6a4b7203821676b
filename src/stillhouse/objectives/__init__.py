"""Every objective of the field behind one interface; a new objective is one class in this folder."""

from stillhouse.config import import_submodules
from stillhouse.objectives.base import Objective
from stillhouse.objectives.registry import REGISTRY, ObjectiveField, build, kinds

import_submodules(__name__)

__all__ = ["REGISTRY", "Objective", "ObjectiveField", "build", "kinds"]
