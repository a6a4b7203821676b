"""A base student and a teacher of the same vocabulary that chats: two ends, two formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillhouse
from stillhouse.core.types import Prompt, Response
from stillhouse.core.versions import installed_version
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.engines import Sampling, TransformersConfig
from stillhouse.errors import ConfigError
from stillhouse.files import locate
from stillhouse.models import (
    StudentConfig,
    TeacherModel,
    fingerprint_of_files,
    generation_ends,
    load_teacher,
    load_tokenizer,
)
from stillhouse.runs.build import assemble
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import estimate
from stillhouse.runs.evaluation import evaluate_prompts, held_out_prompts
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_context
from stillhouse.runs.resolve import resolve
from tests.devices import same
from tests.small_runs import TEACHER, tree, write_data

CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` ends with <end>; `chat` is the same model, but writes <|im_end|> instead."""
    folder = tmp_path_factory.mktemp("ends")
    write_data(folder, rows=6, valid=3)
    tokenizer = AutoTokenizer.from_pretrained(str(locate(TEACHER)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(str(locate(TEACHER)), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    end, turn = tokenizer.convert_tokens_to_ids(["<end>", "<|im_end|>"])
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
        weight.data[[end, turn]] = weight.data[[turn, end]]
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "chat")
    model.save_pretrained(folder / "chat")
    return folder


def configuration(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    made = tree(place, name, train={"max_steps": 2, "batch_size": 2, "micro_batch_size": 2})
    made |= {
        "student": {"path": str(place / "base")},
        "teacher": {"kind": "live", "path": str(place / "chat")},
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(made.get(key), dict) else value
    return made


def read(values: dict[str, Any]) -> RunConfig:
    return resolve(values).config


def test_check_says_how_both_end_and_what_the_teacher_reads(place: Path) -> None:
    found = estimate(read(configuration(place, "told", recipe="kd")))
    assert "'<end>'" in found["ends of responses"]
    assert "'<|im_end|>'" in found["ends of responses"]
    plain = estimate(read(configuration(place, "plain", recipe="kd", data={"template": {"kind": "plain"}})))
    assert "teacher's prompts" not in plain  # it reads the student's
    data = {"template": {"kind": "auto"}, "max_prompt": 200}
    auto = estimate(read(configuration(place, "auto", recipe="kd", data=data)))
    assert "chat" in auto["teacher's prompts"]


@pytest.mark.parametrize("template", ["plain", "auto"])
def test_text_of_the_teacher_stops_at_its_end_and_gets_the_students(place: Path, template: str) -> None:
    config = configuration(
        place, f"seqkd-{template}", recipe="seqkd", data={"template": {"kind": template}, "max_prompt": 200}
    )
    parts = assemble(read(config))
    context = make_context(parts, RunFolder(place / "seqkd"))
    assert context.teacher is not None
    asked = list(parts.data.train)
    written = context.teacher.generate(asked, 3, Sampling(temperature=0.5, max_tokens=60))
    end, turn = parts.tokenizer.convert_tokens_to_ids(["<end>", "<|im_end|>"])
    if template == "plain":  # a format that the model knows
        assert sum(one.finished for one in written) >= len(written) // 2
    for one in written:
        assert turn not in one.token_ids
        assert (one.token_ids[-1] == end) == one.finished
        assert end not in one.token_ids[:-1]


def test_one_tokenizer_and_a_template_of_the_teachers_own(place: Path) -> None:
    """The loss is that of the same response ids after each model's own prompt; a cache has the same."""
    changes = {"template": {"kind": "plain"}, "teacher_template": {"kind": "chat", "system": "Be brief."}}
    config = configuration(place, "own", recipe="kd", data=changes)
    parts = assemble(read(config))
    prompt = parts.data.train[0]
    assert prompt.teacher_ids is not None
    assert prompt.response_ids is not None
    text = parts.tokenizer.decode(prompt.teacher_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    responses = [
        Response(one, one.response_ids, "fixed") for one in parts.data.train if one.response_ids is not None
    ][:2]
    batch = collate(responses, parts.facts.pad_id)
    seen = read_by_teacher(batch, parts.facts.pad_id)
    assert torch.equal(seen.row_labels(), batch.row_labels())
    assert seen.prompt_lengths != batch.prompt_lengths
    total, count = 0.0, 0
    with torch.no_grad():
        for one in responses:
            size = len(one.token_ids)
            asked = one.prompt.token_ids, one.prompt.teacher_ids or ()
            ids = [torch.tensor([[*ids, *one.token_ids]], device=parts.student.device) for ids in asked]
            q, p = parts.student(ids[0]).logits[0], parts.teacher(ids[1]).logits[0]
            log_p, log_q = (x[-size - 1 : -1].log_softmax(-1) for x in (p, q))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += size
    by_hand = total / count
    held = evaluate_prompts(parts, parts.student, tuple(one.prompt for one in responses), None)[0]
    assert held["kl_to_teacher"] == pytest.approx(by_hand, rel=1e-4)

    from stillhouse.core.types import Progress
    from stillhouse.runs.make_step import make_step

    losses = {}
    cached = {"kind": "cache", "of": str(place / "chat"), "folder": str(place / "cache")}
    for name, teacher in {"live": config["teacher"], "cached": cached, "again": cached}.items():
        parts = assemble(read({**config, "teacher": teacher, "objective": {"kind": "forward_kl"}}))
        step = make_step(parts, RunFolder(place / name))
        parts.student.eval()
        prepared = step.prepare(list(parts.data.train[:2]), Progress(0, 1, 0.0, 1.0), 1)
        losses[name] = float(step.loss(parts.student, prepared.micro_batches[0]).value)
        for teacher_ in step.teachers.values():
            teacher_.close()
    assert losses["live"] == pytest.approx(by_hand, rel=1e-4)
    assert losses["cached"] == same(losses["again"])
    assert losses["again"] == pytest.approx(losses["live"], rel=1e-6)


def test_a_prompt_too_long_for_the_teacher_is_dropped_and_counted(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "chat", tmp_path / "short")
    facts = json.loads((tmp_path / "short" / "config.json").read_text())
    facts["max_position_embeddings"] = 96
    (tmp_path / "short" / "config.json").write_text(json.dumps(facts))
    changes = {
        "template": {"kind": "plain"},
        "teacher_template": {"kind": "chat", "system": "Be brief. " * 20},
    }
    config = configuration(place, "short", recipe="kd", data={**changes, "max_response": 24})
    config["teacher"]["path"] = str(tmp_path / "short")
    with pytest.raises(stillhouse.errors.DataError, match="prompt too long for the teacher"):
        estimate(read(config))


def test_a_teachers_template_without_effect_is_refused(place: Path) -> None:
    config = configuration(place, "none", recipe="sft", data={"teacher_template": {"kind": "plain"}})
    del config["teacher"]
    with pytest.raises(ConfigError, match="teacher_template"):
        estimate(read(config))


def test_the_exported_student_stops_where_the_run_did(place: Path, tmp_path: Path) -> None:
    """A base model with a chat template whose turns end with another token than its texts."""
    shutil.copytree(place / "chat", tmp_path / "start")
    sampling = {"repetition_penalty": 1.3, "top_k": 5, "top_p": 0.5, "eos_token_id": 1}
    (tmp_path / "start" / "generation_config.json").write_text(json.dumps({**sampling, "do_sample": True}))
    config = configuration(place, "stops", recipe="sft", data={"template": {"kind": "chat"}})
    config["student"] = {"path": str(tmp_path / "start")}
    del config["teacher"]
    run = stillhouse.run(config)
    student = run.folder / "student"
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    tokenizer = load_tokenizer(StudentConfig(path=str(student)))
    end, turn = tokenizer.convert_tokens_to_ids(["<end>", "<|im_end|>"])
    assert tokenizer.eos_token_id == end
    assert model.generation_config.eos_token_id == [turn, end]
    assert set(generation_ends(StudentConfig(path=str(student)), tokenizer)) == {turn, end}
    parts = assemble(read({**config, "student": {"path": str(student)}, "name": "again"}))
    asked = held_out_prompts(parts.config, parts.data, parts.tokenizer)
    ours = parts.engine(parts.student).generate(
        [one.token_ids for one in asked], Sampling(temperature=0.0, max_tokens=40), 0
    )
    for one, found in zip(asked, ours, strict=True):
        ids = torch.tensor([one.token_ids])
        options = {"do_sample": False, "repetition_penalty": 1.0, "top_k": None, "top_p": None}
        theirs = model.generate(ids, max_new_tokens=40, pad_token_id=0, **options)[0, ids.shape[1] :]
        assert tuple(theirs.tolist()) == found.token_ids


def test_sampling_defaults_of_a_checkpoint_change_nothing(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "penalised")
    defaults = {"repetition_penalty": 1.3, "top_k": 5, "top_p": 0.5, "do_sample": True}
    (tmp_path / "penalised" / "generation_config.json").write_text(json.dumps(defaults))
    written = []
    for path in (place / "base", tmp_path / "penalised"):
        config = TeacherModel(path=str(path))
        tokenizer = load_tokenizer(config)
        facts = stillhouse.engines.TokenizerInfo.from_tokenizer(tokenizer)
        for engine in (TransformersConfig(), TransformersConfig.model_validate({"batch_size": 1})):
            made = engine.build(load_teacher(config), facts)
            written.append(made.generate([[5, 9, 11], [7]], Sampling(max_tokens=50), seed=4))
    assert written[0] == written[2]
    assert written[1] == written[3]


def test_a_teachers_prompt_is_only_its_own_where_there_is_one() -> None:
    prompt = Prompt("a", (5, 6), "")
    batch = collate([Response(prompt, (7, 1), "fixed")], 0)
    assert read_by_teacher(batch, 0) is batch


def test_attention_changes_a_teachers_digest(place: Path) -> None:
    found = {
        fingerprint_of_files(TeacherModel(path=str(place / "chat"), attention=attention))
        for attention in ("auto", "eager", "sdpa")
    }
    assert len(found) == 3


def test_a_package_without_metadata_has_an_unknown_version() -> None:
    assert installed_version("stillhouse") == stillhouse.__version__
    assert installed_version("no-such-package-here") == "unknown"
