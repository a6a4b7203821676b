"""What the teacher gives to the loss. Each kind states what it provides, for the check before loading."""

from stillhouse.teachers.base import REGISTRY, Teacher, TeacherConfig, TeacherField
from stillhouse.teachers.live import LiveTeacherConfig

__all__ = ["REGISTRY", "LiveTeacherConfig", "Teacher", "TeacherConfig", "TeacherField"]
