"""What a teacher gives to the loss; a new kind of teacher is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.teachers.base import (
    REGISTRY,
    AnyTeacher,
    FollowingTeacher,
    MetricSums,
    PrefetchingTeacher,
    RunningTeacher,
    SparseTeacher,
    StreamingTeacher,
    Teacher,
    TeacherConfig,
    TeacherField,
)

import_submodules(__name__)

__all__ = [
    "REGISTRY",
    "AnyTeacher",
    "FollowingTeacher",
    "MetricSums",
    "PrefetchingTeacher",
    "RunningTeacher",
    "SparseTeacher",
    "StreamingTeacher",
    "Teacher",
    "TeacherConfig",
    "TeacherField",
]
