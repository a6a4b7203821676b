"""The digest of a model's content: what changes it, and what does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from tests import tiny
from transformers import AutoModelForCausalLM

from stillhouse.models import TeacherModel, fingerprint, fingerprint_of_files
from stillhouse.models.fingerprint import verify_remembered


def test_any_weight_changes_it_and_saving_or_training_mode_do_not(tmp_path: Path) -> None:
    model = tiny.model(1)
    before = fingerprint(model)
    assert len(before) == 32
    assert fingerprint(tiny.model(1)) == before
    assert fingerprint(tiny.model(2)) != before
    model.train().save_pretrained(tmp_path)  # type: ignore[operator]
    assert fingerprint(model) == before
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == before
    with torch.no_grad():
        list(model.parameters())[3].view(-1)[5] += 1e-6
    assert fingerprint(model) != before


def test_another_number_format_or_reading_of_the_same_weights_changes_it() -> None:
    model = tiny.model(1)
    before = fingerprint(model)
    assert fingerprint(tiny.model(1).to(torch.bfloat16)) != before
    model.config.rms_norm_eps = 0.1  # type: ignore[union-attr]
    assert fingerprint(model) != before


def test_files_keep_the_digest_under_which_caches_were_filled() -> None:
    """Another digest of the same files would leave every teacher cache on disk unused."""
    demo = TeacherModel(path="package:stillhouse/demo/teacher")
    assert fingerprint_of_files(demo) == "c69acc1869e01411"
    assert fingerprint_of_files(demo, batch_invariant=True) != "c69acc1869e01411"


def test_a_file_changed_in_place_is_hashed_anew_whatever_its_times_say(tmp_path: Path) -> None:
    tiny.model(1).save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    weights, teacher = (
        tmp_path / "teacher" / "model.safetensors",
        TeacherModel(path=str(tmp_path / "teacher")),
    )
    before, stat = fingerprint_of_files(teacher, tmp_path), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    with open(weights, "r+b") as file:
        file.write(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprint_of_files(teacher, tmp_path) not in (before, "")
    other = tmp_path / "other"
    content[-1] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(weights)
    assert fingerprint_of_files(teacher, tmp_path) == before, "the first weights are there again"


def test_what_is_remembered_can_be_verified(tmp_path: Path) -> None:
    tiny.model(1).save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    teacher = TeacherModel(path=str(tmp_path / "teacher"))
    before = fingerprint_of_files(teacher, tmp_path)
    count, faults = verify_remembered(tmp_path)
    assert (count, faults) == (2, [])
    memory = tmp_path / "fingerprints.json"
    known = json.loads(memory.read_text())
    name = next(name for name in known if name.endswith(".safetensors"))
    known[name][-1] = "0" * 64  # as if a file system had shown no change
    memory.write_text(json.dumps(known))
    assert fingerprint_of_files(teacher, tmp_path) != before
    count, faults = verify_remembered(tmp_path)
    assert count == 1
    assert "model.safetensors: is not what it was" in faults[0]
    assert fingerprint_of_files(teacher, tmp_path) == before
    for damage in ("[]", "5", "{", json.dumps({name: 5})):
        memory.write_text(damage)
        assert fingerprint_of_files(teacher, tmp_path) == before
        assert verify_remembered(tmp_path)[1] == []
