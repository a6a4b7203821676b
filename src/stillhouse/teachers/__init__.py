"""What the teacher gives to the loss. Each kind states what it provides, for the check before loading."""

from stillhouse.teachers.base import (
    REGISTRY,
    Ahead,
    AnyTeacher,
    CompactTeacher,
    Counts,
    Teacher,
    TeacherConfig,
    TeacherField,
)
from stillhouse.teachers.cache import CacheTeacherConfig
from stillhouse.teachers.live import LiveTeacherConfig
from stillhouse.teachers.server import ServerTeacherConfig

__all__ = [
    "REGISTRY",
    "Ahead",
    "AnyTeacher",
    "CacheTeacherConfig",
    "CompactTeacher",
    "Counts",
    "LiveTeacherConfig",
    "ServerTeacherConfig",
    "Teacher",
    "TeacherConfig",
    "TeacherField",
]
