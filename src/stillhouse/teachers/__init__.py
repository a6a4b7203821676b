"""What the teacher gives to the loss. Each kind states what it provides, for the check before loading."""

from stillhouse.teachers.base import (
    REGISTRY,
    AnyTeacher,
    MetricSums,
    PrefetchingTeacher,
    RunningTeacher,
    SparseTeacher,
    StreamingTeacher,
    Teacher,
    TeacherConfig,
    TeacherField,
)
from stillhouse.teachers.cached import CacheTeacherConfig
from stillhouse.teachers.live import LiveTeacherConfig
from stillhouse.teachers.server import ServerTeacherConfig

__all__ = [
    "REGISTRY",
    "AnyTeacher",
    "CacheTeacherConfig",
    "LiveTeacherConfig",
    "MetricSums",
    "PrefetchingTeacher",
    "RunningTeacher",
    "ServerTeacherConfig",
    "SparseTeacher",
    "StreamingTeacher",
    "Teacher",
    "TeacherConfig",
    "TeacherField",
]
