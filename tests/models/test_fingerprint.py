"""The digest of a model's content: what changes it, and what does not."""

from __future__ import annotations

from pathlib import Path

import torch
from tests import tiny
from transformers import AutoModelForCausalLM

from stillhouse.models import TeacherModel, fingerprint, fingerprint_of_files


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
