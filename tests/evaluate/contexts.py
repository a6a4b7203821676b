"""Evaluation contexts: the demonstration's teacher, and a student with half of its layers."""

from __future__ import annotations

import functools
from typing import Any

from stillhouse.data import DataConfig
from stillhouse.data.templates import Plain
from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.evaluate.tasks import EvalContext
from stillhouse.models import StudentConfig, TeacherModel, load_student, load_teacher, load_tokenizer

TEACHER = "package:stillhouse/demo/teacher"


@functools.cache
def models() -> tuple[Any, Any, Any]:
    """Tokenizer, teacher, student."""
    where = TeacherModel(path=TEACHER)
    tokenizer, teacher = load_tokenizer(where), load_teacher(where)
    student = load_student(StudentConfig(from_teacher={"layers": [0, 3]}), tokenizer, teacher, 0).eval()
    return tokenizer, teacher, student


def context(system: str = "student after", **changes: Any) -> EvalContext:
    """The student with its teacher, or the teacher alone."""
    tokenizer, teacher, student = models()
    model = teacher if system == "teacher" else student
    values: dict[str, Any] = {
        "system": system,
        "model": model,
        "teacher": None if system == "teacher" else teacher,
        "tokenizer": tokenizer,
        "tokenizer_info": TokenizerInfo.from_tokenizer(tokenizer),
        "vocab_size": len(tokenizer),
        "engine": TransformersConfig(),
        "data": DataConfig(
            train={"kind": "jsonl", "path": f"{TEACHER.removesuffix('teacher')}data/dev.jsonl"},
            template=Plain(),
            max_prompt=128,
            max_response=48,
        ),
        "sampling": Sampling(temperature=0.0, max_tokens=48),
        "seeds": (10,),
        "held_out": None,
    }
    return EvalContext(**{**values, **changes})
