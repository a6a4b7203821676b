"""Exports a finished student to a folder of its own, whole and tested or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from stillhouse.errors import ConfigError, Fault
from stillhouse.files import check_writable, follow_umask, os_errors_as_faults
from stillhouse.runs.export.config import ExportConfig, Target
from stillhouse.runs.export.hub import push_to_hub
from stillhouse.runs.export.smoke_test import run_smoke_test
from stillhouse.runs.export.student import FinishedStudent, read_student


def export_student(source: Path, config: ExportConfig, destination: Path) -> Path:
    """Export the student of a run, or the model of a folder.

    Args:
        source: a run folder, its student's folder, or any model folder.
        config: the format.
        destination: a folder that does not exist yet.

    Returns:
        The destination.

    Raises:
        StillhouseError: the student cannot be exported so, or its smoke test fails; nothing is left.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(
            Fault("--output", f"{destination} is there already", hint="Choose a new folder, or delete it.")
        )
    check_writable("--output", destination)
    student = read_student(source, config)
    fresh = destination.with_name(f".{destination.name}.new")
    with os_errors_as_faults(destination):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    try:
        with os_errors_as_faults(destination):
            _writer(config.to)(student, config, fresh)
        if config.smoke_test:
            run_smoke_test(fresh)
        with os_errors_as_faults(destination):
            follow_umask(fresh)
            if destination.exists():
                destination.rmdir()
            fresh.rename(destination)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if config.to == "hub":
        push_to_hub(destination, config)
    return destination


def _writer(target: Target) -> Callable[[FinishedStudent, ExportConfig, Path], None]:
    """What writes a format; imported when it is asked for, with the packages that it needs."""
    if target == "gguf":
        from stillhouse.runs.export.llama_cpp.folder import write_gguf

        return write_gguf
    if target == "onnx":
        from stillhouse.runs.export.onnx import write_onnx

        return write_onnx
    from stillhouse.runs.export.safetensors import write_safetensors

    return write_safetensors
