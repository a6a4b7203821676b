"""The hostile user: every refusal is one message that says what to do, and leaves nothing behind."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workshop import CONTEXT, Workshop, copied

FILES = {
    "": "is empty",
    "# only a comment\n": "is empty",
    "a: [1": "is not YAML",
    "- 1\n": "should be a mapping",
    "recipe: kdd": "did you mean 'kd'",
    "recipe: [kd]": "must be the name of a method",
    "student: {path: a}\nstudent: {path: b}": "given twice, first at bad.yaml:1",
    "\tstudent: 1": "is not YAML",
    "student: !!python/object:os.system x": "is not allowed",
    "recipe: kd\nstudent: {path: student}\nteacher: 3\ndata: {train: train.jsonl}": "such as {kind: live}",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text)[:30])
def test_a_file_that_is_no_configuration(workshop: Workshop, text: str) -> None:
    (workshop.folder / "bad.yaml").write_text(text, encoding="utf-8")
    for verb in ("check", "run"):
        assert FILES[text] in workshop.refused(verb, "bad.yaml")


def test_a_file_that_is_not_there(workshop: Workshop) -> None:
    assert "did you mean 'run.yaml'" in workshop.refused("run", "rn.yaml")
    assert "is a folder" in workshop.refused("run", ".")
    assert "is not YAML" in workshop.refused("run", "train.jsonl")


OVERRIDES = {
    ("train.lrr=1",): ["train.lrr", "did you mean 'lr'"],
    ("trein.lr=1",): ["trein", "did you mean 'train'"],
    ("train.lr=fast",): ["train.lr", "got 'fast'", "a number"],
    ("train.batch_size=2.5",): ["train.batch_size", "a whole number"],
    ("train.lr=-1",): ["train.lr", "must be greater than 0"],
    ("train.lr",): ["name.name=value"],
    ("train.batch_size=5",): ["must be a multiple of micro_batch_size"],
    ("train.keep=best", "data.valid=null"): ["train.keep", "best needs validation"],
    ("teacher=null",): ["teacher", "no teacher", "kind: live"],
    ("objective={teacher: {kind: skew_kl}}",): ["Add objective.fixed", "objective.teacher", "never applies"],
    ("responses.kind=pairs", "objective={teacher: skew_kl}"): ["Add objective.student"],
    (
        "objective=cross_entropy",
        "responses={kind: mixed, student_share: 0.5, base: {kind: generated, by: teacher}}",
        "teacher=null",
    ): ["needs generated text from teacher", "no teacher"],
    ("student.from_config={model_type: llama}",): ["exactly one of path, from_teacher", "others to null"],
    ("data.train=nope.jsonl",): ["data.train", "no such file"],
    ("data.train=trein.jsonl",): ["did you mean 'train.jsonl'"],
    ("data.train=~nobody-of-that-name/x.jsonl",): ["data.train", "no such file"],
    ("data.train={kind: hf, path: ./rows}",): ["data.train", "./rows: no such file or folder"],
    ("student.path=~nobody-of-that-name",): ["student.path", "does not exist"],
    ("teacher.adapter=teacher",): ["teacher.adapter", "no adapter_config.json"],
    ("data.train=train.xlsx",): ["does not end in one of .jsonl"],
    ("data.train.split=test",): ["data.train.split", "Only kind hf has it"],
    ("data.train.fields.prompt=question",): ["has no field 'question'", "its fields: prompt, outputs"],
    ("evaluate.data=nope.jsonl",): ["evaluate.data", "no such file"],
    ("student.path=studnet",): ["student.path", "did you mean 'student'"],
    ("student.path=train.jsonl",): ["is a file, not a folder"],
    ("teacher.path=runs/of/mine",): ["teacher.path", "does not exist"],
    (
        "teachers.reference={kind: live, path: runs/of/mine}",
        "objective={kind: advantage}",
    ): ["teachers.reference.path", "does not exist"],
    ("student.path=nobody/nothing",): ["nobody/nothing", "no tokenizer could be loaded"],
    ("train.hf.optimm=adamw",): ["train.hf.optimm", "did you mean 'optim'"],
    ("train.hf.optim=adamm",): ["train.hf", "adamm"],
    ("train.hf.learning_rate=1",): ["Set train.lr."],
    ("train.report_to=[tensorbord]",): ["train.report_to", "did you mean 'tensorboard'"],
    (f"data.max_response={CONTEXT}",): ["data.max_response", f"{CONTEXT}, the context of the student"],
    ("output.folder=train.jsonl",): ["output.folder", "not a folder"],
    ("output.folder=train.jsonl/run",): ["output.folder", "train.jsonl is not a folder"],
    ("data.token_cache=train.jsonl",): ["data.token_cache", "train.jsonl is a file, not a folder"],
    ("data.workers=100000",): ["data.workers", "must be at most 1024"],
    ("teacher={kind: cache, of: {kind: live, path: teacher}, folder: train.jsonl}",): [
        "teacher.folder",
        "train.jsonl is a file, not a folder",
    ],
    ("teacher={kind: remote, url: http://127.0.0.1:99999}",): ["teacher.url", "ort out of range"],
    ("teacher={kind: remote, url: http://127.0.0.1:1, key_env: sk-1}",): ["never the key itself (got 4 char"],
    ("teacher={kind: remote, url: [http://127.0.0.1:1, http://127.0.0.1:1/]}",): ["each once"],
    ("--resume",): ["there is no run in runs/kd"],
}


@pytest.mark.parametrize("given", OVERRIDES, ids=lambda given: " ".join(given)[:60])
def test_a_value_that_cannot_be(workshop: Workshop, given: tuple[str, ...]) -> None:
    message = workshop.refused("run", "run.yaml", *given)
    for words in OVERRIDES[given]:
        assert words in message


def test_everything_wrong_is_told_at_once(workshop: Workshop) -> None:
    text = """\
name: a b
recipe: kd
studnet: {path: student}
teacher: {kind: life, path: teacher}
data: {train: train.jsonl, max_prompt: "12", template: {kind: plan}}
train: {lr: fast}
"""
    (workshop.folder / "bad.yaml").write_text(text, encoding="utf-8")
    message = workshop.refused("check", "bad.yaml")
    for place in (
        "name",
        "student",
        "studnet",
        "teacher.kind",
        "data.template.kind",
        "data.max_prompt",
        "train.lr",
    ):
        assert f"\n- {place}" in message
    assert "train.lr (bad.yaml:6)" in message
    missing = "data.train=a.jsonl", "data.valid=b.jsonl", "student.path=c", "teacher.path=d", "train.hf.e=1"
    assert workshop.refused("run", "run.yaml", *missing).count("\n- ") == 5


ROWS = {
    "": ["no row is left", "0 rows read"],
    '{"prompt": "a", "respon': [":1: is not JSON"],
    '{"prompt": "a", "response": "b"}\n[1]': [":2: is a JSON list"],
    '{"prompt": "a"}': [":1: no response", "data.no_response: drop"],
    '{"prompt": " ", "response": "b"}': ["1 x empty prompt"],
    '{"text": "only text"}': ["holds plain text"],
    '{"x": 1}': ["no prompt found in the fields x"],
    '{"prompt": "a \\ud83d b", "response": "c"}': [":1: holds half of a surrogate pair"],
}


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: repr(rows)[:30])
def test_rows_that_cannot_be_used(workshop: Workshop, rows: str) -> None:
    (workshop.folder / "bad.jsonl").write_text(rows, encoding="utf-8")
    for words in ROWS[rows]:
        assert words in workshop.refused("run", "run.yaml", "data.train=bad.jsonl")
        assert words in workshop.refused("check", "run.yaml", "data.train=bad.jsonl")
    assert "bad.jsonl" in workshop.refused("run", "run.yaml", "evaluate.data=bad.jsonl")


def test_tokenizers_that_differ(workshop: Workshop) -> None:
    folder = copied(workshop.folder, "student")
    facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = facts["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(facts), encoding="utf-8")
    message = workshop.refused("run", "run.yaml", f"student.path={folder}")
    assert "2 of the student's 1,024 tokens have another id" in message


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_a_vocabulary_that_has_a_few_tokens_more_is_compared_over_the_shared_ones(
    workshop: Workshop, larger: str
) -> None:
    folder = copied(workshop.folder, larger)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(1025, mean_resizing=False)
    model.save_pretrained(folder)
    said = workshop.stillhouse("run", "run.yaml", f"{larger}.path={folder}", "train.max_steps=1")
    assert said.code == 0, said.err
    checked = workshop.stillhouse("check", "run.yaml", f"{larger}.path={folder}")
    assert "1,024" in checked.out, checked.out


def test_a_folder_that_is_no_model(workshop: Workshop) -> None:
    (workshop.folder / "empty").mkdir()
    assert "no tokenizer could be loaded" in workshop.refused("run", "run.yaml", "student.path=empty")
    folder = copied(workshop.folder, "student")
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert "no causal language model" in workshop.refused("run", "run.yaml", f"student.path={folder}")
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    shutil.copy(workshop.folder / "student" / "model.safetensors", folder)
    message = workshop.refused("run", "run.yaml", f"student.path={folder}")
    assert "9 of the model's weights are not in its files" in message
    assert "model.layers.2." in message
    (folder / "config.json").unlink()
    assert "no config.json" in workshop.refused("run", "run.yaml", f"student.path={folder}")


def test_weights_that_hold_nan(workshop: Workshop) -> None:
    folder = copied(workshop.folder, "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    for name in ("student", "teacher"):
        message = workshop.refused("run", "run.yaml", f"{name}.path={folder}")
        assert f"{name}: 1 of its weights hold NaN" in message
        assert "layers.1.mlp.up_proj.weight" in message


def test_a_loss_that_becomes_nan_ends_the_run(workshop: Workshop) -> None:
    said = workshop.stillhouse("run", "run.yaml", "train.lr=1e30", "train.clip=0", "train.save_every=1")
    assert said.code == 2
    assert "the loss became nan" in said.err
    assert "a tenth of train.lr" in said.err
    assert said.err.count("error:") == 1
    assert workshop.state()["state"] == "failed"
    assert "the loss became nan" in workshop.state()["message"]
    assert not (workshop.folder / "runs/kd/student").exists()


@pytest.mark.parametrize("limit", [300_000, 30_000, 3_000])
def test_a_disk_that_gets_full(workshop: Workshop, limit: int) -> None:
    """The system refuses files larger than the limit: the weights, the optimiser's state, the log."""
    said = workshop.in_child("run", "run.yaml", "train.save_every=2", file_limit=limit)
    assert said.code == 3, said.err
    assert said.err.count("error:") == 1
    assert "the disk is full" in said.err
    assert "Traceback" not in said.err
    run = workshop.folder / "runs/kd"
    assert workshop.state()["state"] == "failed"
    assert not list(run.glob("checkpoints/*"))
    assert not [path for path in run.rglob("*") if path.suffix in (".tmp", ".new")]
    said = workshop.stillhouse("run", "run.yaml", "train.save_every=2", "--resume")
    assert said.code == 0, said.err
    assert workshop.state()["state"] == "done"


def test_a_disk_that_is_too_small(workshop: Workshop) -> None:
    said = workshop.stillhouse("run", "run.yaml", "output.folder=/proc/run")
    assert said.code == 3, said.err
    assert "output.folder" in said.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(workshop: Workshop) -> None:
    locked = workshop.folder / "locked"
    locked.mkdir(mode=0o500)
    said = workshop.stillhouse("run", "run.yaml", "output.folder=locked/run")
    assert said.code == 3
    assert "is not writable" in said.err


def test_eval_speaks_of_its_own_options(workshop: Workshop) -> None:
    wrong = "--temperature", "-1", "--limit", "0", "--template", "plane"
    message = workshop.refused("eval", "student", "--data", "valid.jsonl", *wrong)
    for option in ("--temperature", "--limit", "--template"):
        assert f"\n- {option}: " in message
    message = workshop.refused("eval", "nope", "--data", "nope.jsonl", "--teacher", "nada")
    for option in ("MODEL", "--data", "--teacher"):
        assert f"\n- {option}: " in message
    data = "--data", "valid.jsonl"
    assert "--seeds" in workshop.refused("eval", "student", *data, "--seeds", "1,b")
    assert "--seeds" in workshop.refused("eval", "student", *data, "--seeds", "-1")
    assert "--max-tokens" in workshop.refused("eval", "student", *data, "--max-tokens", str(CONTEXT))
    assert "--output" in workshop.refused("eval", "student", *data, "-o", "valid.jsonl/result.json")
    assert "--output: is a folder" in workshop.refused("eval", "student", *data, "-o", ".")
    rows_beside = workshop.refused("eval", "student", *data, "-o", "result.jsonl")
    assert "--output: must end in .json; got result.jsonl" in rows_beside


def test_generate_speaks_of_its_own_options(workshop: Workshop) -> None:
    message = workshop.refused("generate", "-o", "t.jsonl", "--model", "nope", "--data", "nada.jsonl")
    assert message.count("\n- ") == 2
    assert "\n- --model: nope: does not exist" in message
    assert "\n- --data: nada.jsonl: no such file" in message
    command = ("generate", "-o", "t.jsonl", "--model", "student", "--data", "train.jsonl")
    assert "--top-p: must be at most 1" in workshop.refused(*command, "--top-p", "3")
    assert "--template: no template" in workshop.refused(*command, "--template", "plane")
    assert "no row is left for --data" in workshop.refused(*command, "--max-prompt", "2")


def test_packages_that_are_not_there(workshop: Workshop) -> None:
    for name in ("package:nowhere/x.jsonl", "package:no.where/x.jsonl", "package:/x.jsonl"):
        said = workshop.stillhouse("check", "run.yaml", f"data.train={name}")
        assert said.code == 3
        assert "is not installed" in said.err


def test_a_folder_in_the_place_of_a_file(workshop: Workshop) -> None:
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=1").code == 0
    for verb in ("report", "compare"):
        said = workshop.stillhouse(verb, "runs/kd", "-o", ".")
        assert said.code == 3
        assert ".: is a folder, and a file is to be written" in said.err


def test_files_of_rows_that_curate_show_and_judge_cannot_read(workshop: Workshop) -> None:
    curate = ("curate", "rows.xls", "-o", "kept.jsonl", "-f")
    assert "rows.xls: rows are read from" in workshop.refused("curate", "train.jsonl", *curate[2:], "overlap",
                                                              "--held-out", "rows.xls")  # fmt: skip
    (workshop.folder / "rows.xls").write_text("a,b", encoding="utf-8")
    assert "rows.xls: rows are read from" in workshop.refused(*curate, "empty")
    assert "--output: is a folder" in workshop.refused("curate", "train.jsonl", "-o", ".", "-f", "empty")
    (workshop.folder / "none.jsonl").write_text("", encoding="utf-8")
    assert "none.jsonl: is no stage file: it is empty" in workshop.refused("show", "responses", "none.jsonl")
    (workshop.folder / "header.jsonl").write_text(json.dumps({"stillhouse": {}}) + "\n", encoding="utf-8")
    assert "no responses are there" in workshop.refused("show", "responses", "header.jsonl")
    answer = {"id": 1, "question": "q", "response": "a"}
    (workshop.folder / "a.jsonl").write_text(json.dumps(answer), encoding="utf-8")
    (workshop.folder / "b.jsonl").write_bytes(b"\xff\xfe")
    judge = ("judge", "a.jsonl", "--url", "http://127.0.0.1:9/v1", "-o")
    assert "b.jsonl: is not UTF-8" in workshop.refused(*judge, "judged.json", "b.jsonl")
    assert "B: is the file of A" in workshop.refused(*judge, "judged.json", "a.jsonl")
    assert "--output: must end in .json" in workshop.refused(*judge, "judged.jsonl", "b.jsonl")


def test_a_cache_that_is_not_there(workshop: Workshop) -> None:
    for verb in (("info",), ("verify",), ("prune", "--limit", "1GB")):
        assert "there is no such folder; got nowhere" in workshop.refused("cache", *verb, "nowhere")


def test_report_on_what_is_no_run(workshop: Workshop) -> None:
    assert "is not a folder" in workshop.refused("report", "nowhere")
    assert "holds no run" in workshop.refused("report", "student")


def test_the_quickstart_deletes_only_its_own(workshop: Workshop) -> None:
    mine = workshop.folder / "runs" / "kd"
    mine.mkdir(parents=True)
    (mine / "state.json").write_text('{"name": "kd"}', encoding="utf-8")
    assert "files of no quickstart (kd)" in workshop.refused("quickstart", "--folder", "runs")
    assert "is not a folder" in workshop.refused("quickstart", "--folder", "train.jsonl")
    assert Path("runs/kd/state.json").exists()


def test_tasks_that_cannot_be_asked_are_told_of_before_the_training(workshop: Workshop) -> None:
    for verb in ("run", "check"):
        assert "gsm8k needs rows of question" in workshop.refused(verb, "run.yaml", "evaluate.tasks=[gsm8k]")
        nothing = "evaluate.tasks=[exact_match]", "data.valid=null", "train.validate_every=never"
        assert "needs rows" in workshop.refused(verb, "run.yaml", *nothing)


def test_the_quickstart_does_not_delete_one_that_is_going_on(workshop: Workshop) -> None:
    stage = workshop.folder / "quick" / "warm-start"
    stage.mkdir(parents=True)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    state = {"name": "warm-start", "state": "running", "process": os.getppid(), "started": now}
    (stage / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert f"process {os.getppid()} is still running" in workshop.refused("quickstart", "--folder", "quick")
