"""What the teacher gives to the loss. Each kind states what it provides; the run checks it before anything loads."""

from stillhouse.teachers.base import REGISTRY, Teacher, TeacherConfig, TeacherField
from stillhouse.teachers.live import LiveTeacherConfig

__all__ = ["REGISTRY", "LiveTeacherConfig", "Teacher", "TeacherConfig", "TeacherField"]
