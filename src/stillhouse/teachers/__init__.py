"""What the teacher gives to the loss. Each kind states what it provides, for the check before loading."""

from stillhouse.teachers.base import (
    REGISTRY,
    AnyTeacher,
    CompactTeacher,
    Counts,
    Teacher,
    TeacherConfig,
    TeacherField,
)
from stillhouse.teachers.cache import CacheTeacherConfig
from stillhouse.teachers.live import LiveTeacherConfig

__all__ = [
    "REGISTRY",
    "AnyTeacher",
    "CacheTeacherConfig",
    "CompactTeacher",
    "Counts",
    "LiveTeacherConfig",
    "Teacher",
    "TeacherConfig",
    "TeacherField",
]
