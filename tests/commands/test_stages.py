"""stillhouse generate, curate and show, from the command line, with kills."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.datasets import base
from stillhouse.files import write_jsonl
from stillhouse.rollouts.offline.stage_files import read_rows
from tests.workshop import Workshop, sends

GENERATE = ("generate", "run.yaml", "-o", "teacher.jsonl", "--chunk", "8")
PAIRS = (
    "recipe=distillm2", "train.max_steps=8", "train.validate_every=never", "evaluate.before=false",
    "responses.filters=[{kind: format, forbid: '[Vv]'}]", "responses.scores=[teacher, student]",
)  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_is_idempotent_and_refuses_what_was_made_otherwise(workshop: Workshop) -> None:
    said = workshop.stillhouse(*GENERATE)
    assert said.code == 0, said.err
    assert "teacher.jsonl: 24 responses, 1" in said.out
    assert "Generating teacher.jsonl: 24/24" in said.err
    head, *lines = rows(workshop.folder / "teacher.jsonl")
    facts = head["stillhouse"]
    assert facts["stage"] == "responses"
    assert len(facts["model"]) == 32
    assert facts["sampling"]["max_tokens"] == 8
    assert {"stillhouse", "torch"} <= facts["versions"].keys()
    assert [row["number"] for row in lines] == list(range(24))
    assert lines[0]["prompt"].startswith("name[")
    assert lines[0]["references"]
    before = workshop.listing(), (workshop.folder / "teacher.jsonl").read_bytes()
    again = workshop.stillhouse(*GENERATE)
    assert (again.code, again.out.strip()) == (
        0, "teacher.jsonl: all 24 responses are there already; nothing to do.",
    )  # fmt: skip
    message = workshop.refused(*GENERATE, "engine.sampling.temperature=0.5")
    assert "sampling.temperature is 1.0, not 0.5" in message
    assert "model is" in workshop.refused(*GENERATE, "teacher.path=student")
    assert (workshop.listing(), (workshop.folder / "teacher.jsonl").read_bytes()) == before
    cut = b"".join(before[1].splitlines(keepends=True)[:-1])
    (workshop.folder / "teacher.jsonl").write_bytes(cut)
    assert "has 23 responses in place of 24" in workshop.refused(*GENERATE)
    (workshop.folder / "teacher.jsonl").write_bytes(cut[:-9])
    assert "is damaged" in workshop.refused("curate", "teacher.jsonl", "-o", "kept.jsonl", "-f", "empty")


def test_generate_goes_on_after_a_kill_to_the_same_bytes(workshop: Workshop) -> None:
    assert workshop.stillhouse(*GENERATE, "-o", "whole.jsonl").code == 0
    killed = workshop.in_child(*GENERATE, hook=sends(("shard-0-of-1", 3), sig=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    part = workshop.folder / "teacher.shard-0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    assert not (workshop.folder / "teacher.jsonl").exists()
    said = workshop.stillhouse(*GENERATE)
    assert said.code == 0, said.err
    assert "of them were there before" in said.out
    assert not part.exists()
    whole = (workshop.folder / "whole.jsonl").read_bytes()
    assert (workshop.folder / "teacher.jsonl").read_bytes() == whole


def test_generate_in_shards_joins_them(workshop: Workshop) -> None:
    chunks = ("generate", "run.yaml", "-n", "2", "--chunk", "16")  # three: the last shard has no rows
    assert workshop.stillhouse(*chunks, "-o", "whole.jsonl").code == 0
    shards = (*chunks, "-o", "teacher.jsonl", "--shard")
    first = workshop.stillhouse(*shards, "1/4")
    assert first.code == 0, first.err
    assert "shard 1/4 is finished, 16 responses; 16 of 48 are there" in first.out
    assert workshop.stillhouse(*shards, "0/4").code == 0
    cut = workshop.folder / "teacher.shard-0-of-4.jsonl"
    cut.write_bytes(cut.read_bytes()[:-20])
    assert "shard 3/4 is finished, 0 responses; 31 of 48" in workshop.stillhouse(*shards, "3/4").out
    message = workshop.refused("merge", "teacher.jsonl")
    assert "shard-0-of-4.jsonl is unfinished, 15 of 16 rows: run the command with --shard 0/4" in message
    assert "shard-2-of-4.jsonl is missing: run the command with --shard 2/4" in message
    assert "1-of-4" not in message
    assert "run_seed is 42, not 8" in workshop.refused(*shards, "2/4", "--seed", "8")
    assert workshop.stillhouse(*chunks, "--seed", "8", "-o", "other.jsonl", "--shard", "3/4").code == 0
    last = workshop.folder / "teacher.shard-3-of-4.jsonl"
    kept = last.read_bytes()
    (workshop.folder / "other.shard-3-of-4.jsonl").rename(last)
    assert "shard-3-of-4.jsonl is foreign, made in another way: " in workshop.refused(
        "merge", "teacher.jsonl"
    )
    last.write_bytes(kept)
    assert workshop.stillhouse(*shards, "2/4").code == 0
    killed = workshop.in_child(*shards, "0/4", hook=sends((".tmp", 1), sig=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL, "while it joined them"
    assert "teacher.jsonl: 48 rows of 4 shards" in workshop.stillhouse("merge", "teacher.jsonl").out
    whole = (workshop.folder / "whole.jsonl").read_bytes()
    assert (workshop.folder / "teacher.jsonl").read_bytes() == whole
    assert not list(workshop.folder.glob("*.shard-*"))
    assert "nothing to do" in workshop.stillhouse("merge", "teacher.jsonl").out
    assert "got 4/4; allowed: 0/4 to 3/4" in workshop.refused(*shards, "4/4")
    assert "allowed: i/n, such as 0/8" in workshop.refused(*shards, "1")
    assert "no shards" in workshop.refused("merge", "no.jsonl")


def test_generate_from_a_model_and_prompts(workshop: Workshop) -> None:
    model = (
        "generate",
        "--model",
        "student",
        "--data",
        "valid.jsonl",
        "--template",
        "plain",
        "--max-tokens=6",
    )
    options = ("--temperature", "0", "--score", "--label", "me")
    said = workshop.stillhouse(*model, *options, "-o", "out/mine.jsonl")
    assert said.code == 0, said.err
    lines = rows(workshop.folder / "out" / "mine.jsonl")[1:]
    assert len(lines) == 4
    assert {row["by"] for row in lines} == {"me"}
    assert all(row["scores"]["teacher"] < 0 for row in lines)
    assert "--data: is missing" in workshop.refused("generate", "--model", "student", "-o", "a.jsonl")
    assert "must end in .jsonl" in workshop.refused(*model, "-o", "a.txt")


def test_from_prompts_to_a_student_in_a_store(workshop: Workshop) -> None:
    workshop.stillhouse("generate", "run.yaml", "--limit", "9", "-o", "teacher.jsonl")
    made = ("generate", "run.yaml", "--limit", "9", "--chunk", "3", "-o", "memory://bucket/a.parquet")
    for shard in ("0/2", "1/2"):
        said = workshop.stillhouse(*made, "--shard", shard)
        assert said.code == 0, said.err
    assert "memory://bucket/a.parquet: 9 responses" in said.out
    said = workshop.stillhouse(
        "curate", "memory://bucket/a.parquet", "-o", "memory://bucket/b.parquet", "-f", "empty"
    )
    assert "memory://bucket/b.parquet: kept 9 of 9 prompts" in said.out, said.err
    shown = [
        workshop.stillhouse("show", "responses", name).out
        for name in ("teacher.jsonl", "memory://bucket/b.parquet")
    ]
    assert shown[0] == shown[1]
    run = ("run", "run.yaml", "train.max_steps=1", "name=stored", "data.train=memory://bucket/b.parquet")
    said = workshop.stillhouse(*run)
    assert said.code == 0, said.err


def test_a_run_on_prompts_that_stay_on_disk_is_the_same(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, reports = [], []
    for name in ("memory", "disk", "cache"):
        said = workshop.stillhouse(
            "run",
            "run.yaml",
            "train.max_steps=3",
            "data.token_cache=tokens",
            "data.workers=2",
            f"name={name}",
        )
        assert said.code == 0, said.err
        folder = workshop.folder / "runs" / name
        found.append([row["loss"] for row in rows(folder / "metrics.jsonl") if "loss" in row])
        reports.append((folder / "data.json").read_text())
        monkeypatch.setattr(base, "LARGE_BYTES", 0)
    assert len(found[0]) >= 3
    assert found[0] == found[1] == found[2]
    assert reports[0] == reports[1] == reports[2]
    entries = sorted(path.parent for path in (workshop.folder / "tokens").glob("*/tokens.json"))
    assert len(entries) == 2
    shutil.copytree(entries[0], entries[0].with_name("0" * 32))  # which no process has read
    cache = ("--tokens", "tokens")
    assert workshop.stillhouse("cache", "info", *cache).out.count(" yes ") == 2
    said = workshop.stillhouse("cache", "prune", *cache, "--limit", "0")
    assert said.code == 0
    assert "MB freed in tokens" in said.out
    assert "MB more are kept: running jobs use them" in said.err
    assert sorted(path.parent for path in (workshop.folder / "tokens").glob("*/tokens.json")) == entries
    assert "tokens of 2 sets are sound" in workshop.stillhouse("cache", "verify", *cache).out
    shutil.copytree(entries[0], entries[0].with_name("0" * 32))
    (entries[0].with_name("0" * 32) / "tokens.json").write_text("{}")
    assert "1 damaged" in workshop.refused("cache", "verify", *cache)
    assert "deleted" in workshop.stillhouse("cache", "verify", *cache, "--repair").out
    assert "needs --limit alone" in workshop.refused("cache", "prune", *cache, "--teacher", "ab")
    assert "Add --tokens" in workshop.refused("cache", "info", "tokens")


def test_curate_keeps_drops_counts_and_does_nothing_twice(workshop: Workshop) -> None:
    assert workshop.stillhouse(*GENERATE).code == 0
    curate = (
        "curate",
        "teacher.jsonl",
        "-o",
        "kept.jsonl",
        "-f",
        "empty",
        "-f",
        "{kind: format, forbid: '[Rr]'}",
    )
    said = workshop.stillhouse(*curate)
    assert said.code == 0, said.err
    texts = {row["id"]: row["response"] for row in rows(workshop.folder / "teacher.jsonl")[1:]}
    fine = [name for name, text in texts.items() if "r" not in text.lower()]
    assert 0 < len(fine) < 24
    assert [row["id"] for row in rows(workshop.folder / "kept.jsonl")[1:]] == fine
    dropped = rows(workshop.folder / "kept.dropped.jsonl")[1:]
    assert len(dropped) == 24 - len(fine)
    assert dropped[0]["dropped"][0]["reason"] == "has a forbidden pattern"
    assert f"kept {len(fine)} of 24 prompts" in said.out
    assert "has a forbidden pattern" in said.out
    again = workshop.stillhouse(*curate)
    assert "nothing to do" in again.out
    assert "filters" in workshop.refused("curate", "teacher.jsonl", "-o", "kept.jsonl", "-f", "empty")
    run = workshop.stillhouse(
        "run", "run.yaml", "data.train=kept.jsonl", "train.max_steps=1", "name=from_kept"
    )
    assert run.code == 0, run.err


FLOOR = (
    "curate", "teacher.jsonl", "student.jsonl", "--teacher", "teacher",
    "-f", "{kind: logprob_floor, drop_share: 0.5, source: all}", "-o",
)  # fmt: skip


def test_curate_goes_on_with_what_is_scored_after_a_kill(workshop: Workshop) -> None:
    for by in ("teacher", "student"):
        made = workshop.stillhouse("generate", "run.yaml", "--by", by, "-n", "3", "-o", f"{by}.jsonl")
        assert made.code == 0, made.err
    straight = workshop.stillhouse(*FLOOR, "whole.jsonl")
    assert straight.err.count("Scoring responses") == 1
    assert "144/144" in straight.err
    killed = workshop.in_child(*FLOOR, "kept.jsonl", hook=sends(("kept.shard-0", 2), sig=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    part = workshop.folder / "kept.shard-0-of-1.jsonl"
    assert len(rows(part)) == 1 + 2 * 64
    part.write_bytes(part.read_bytes()[:-20])
    lines = part.read_text("utf-8").splitlines()[:-1]
    first = json.loads(lines[1])
    first["row"]["scores"] = {"teacher": -0.125}  # a value that nobody would measure
    lines[1] = json.dumps(first)
    part.write_text("\n".join([*lines, ""]), "utf-8")
    again = workshop.stillhouse(*FLOOR, "kept.jsonl")
    assert again.code == 0, again.err
    assert not part.exists()
    assert not list(workshop.folder.glob("kept.shard*"))
    both = [
        {(r["source"], r["id"], r.get("sample", 0)): r["scores"]["teacher"]
         for end in ("", ".dropped") for r in rows(workshop.folder / f"{name}{end}.jsonl")[1:]}
        for name in ("whole", "kept")
    ]  # fmt: skip
    differing = [key for key in both[0] if both[0][key] != both[1][key]]
    assert len(both[0]) == 144
    assert differing == [("teacher", "train:1", 0)]
    assert both[1][differing[0]] == -0.125


def test_curate_in_shards_is_curate_in_one(workshop: Workshop) -> None:
    """Filters of one response, of pairs, and between them some that compare responses."""
    for by, seed in (("teacher", "1"), ("student", "2")):
        made = ("generate", "run.yaml", "--by", by, "-n", "9", "--seed", seed, "-o", f"{by}.jsonl")
        assert workshop.stillhouse(*made).code == 0
    student = rows(workshop.folder / "student.jsonl")
    write_jsonl(workshop.folder / "student.jsonl", [*student[:60], *student[61:], student[60]])
    short = rows(workshop.folder / "teacher.jsonl")
    write_jsonl(workshop.folder / "teacher.jsonl", [*short[:9], *short[10:]])
    curate = (
        "curate", "teacher.jsonl", "student.jsonl", "--teacher", "teacher", "-f", "{kind: format, forbid: X}",
        "-f", "{kind: duplicates, compare: prompt, source: teacher}",
        "-f", "{kind: logprob_floor, drop_share: 0.2, source: all}",
        "-f", "{kind: format, forbid: '[qz]'}", "-o",
    )  # fmt: skip
    whole = workshop.stillhouse(*curate, "whole.jsonl")
    assert whole.code == 0, whole.err
    shards = (*curate, "kept.jsonl", "--shard")
    told = workshop.stillhouse(*shards, "1/3")
    assert "shard 1/3 is finished, kept " in told.out
    assert " of 64 pairs before duplicates, logprob_floor. The last" in told.out
    killed = workshop.in_child(*shards, "0/3", hook=sends(("kept.shard-0", 2), sig=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    assert workshop.stillhouse(*shards, "2/3").code == 0
    message = workshop.refused("merge", "kept.jsonl")
    assert (
        "kept.shard-0-of-3.jsonl is unfinished, 128 of 175 rows: run the command with --shard 0/3" in message
    )
    killed = workshop.in_child(*shards, "0/3", hook=sends((".tmp", 1), sig=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL, "while it joined them"
    joined = workshop.stillhouse("merge", "kept.jsonl")
    assert joined.code == 0, joined.err
    table = whole.out[: whole.out.index("whole.jsonl")]
    assert table.count("duplicate") >= 1
    assert table in joined.out
    for end in ("", ".dropped"):
        same = [(workshop.folder / f"{name}{end}.jsonl").read_bytes() for name in ("whole", "kept")]
        assert same[0] == same[1]
    dropped = rows(workshop.folder / "whole.dropped.jsonl")[1:]
    kinds = {reason["filter"] for row in dropped for reason in row["dropped"]}
    assert kinds == {"missing", "format", "duplicates", "logprob_floor"}
    assert not list(workshop.folder.glob("kept.shard*"))
    assert "nothing to do" in workshop.stillhouse(*shards, "0/3").out
    assert "no effect with --best" in workshop.refused(
        "curate", "teacher.jsonl", "-o", "best.jsonl", "--best", "reference", "--shard", "0/2"
    )


def test_curate_knows_which_teacher_scored(workshop: Workshop) -> None:
    assert workshop.stillhouse("generate", "run.yaml", "--by", "student", "-o", "student.jsonl").code == 0
    floor = ("curate", "student.jsonl", "-f", "{kind: logprob_floor, min_logprob: -6.5}", "-o", "kept.jsonl")
    assert "--teacher" in workshop.refused(*floor)
    said = workshop.stillhouse(*floor, "--teacher", "teacher")
    assert said.code == 0, said.err
    assert "unlikely under the teacher" in said.out
    assert "nothing to do" in workshop.stillhouse(*floor, "--teacher", "teacher").out
    assert "teacher is" in workshop.refused(*floor, "--teacher", "student")
    lines = rows(workshop.folder / "student.jsonl")
    lines[1]["token_ids"][0] = 5000
    write_jsonl(workshop.folder / "other.jsonl", lines)
    other = ("curate", "other.jsonl", *floor[2:-1], "more.jsonl", "--teacher", "teacher")
    assert "has token ids that the tokenizer of teacher does not know" in workshop.refused(*other)


def test_curate_says_what_is_missing(workshop: Workshop) -> None:
    assert workshop.stillhouse(*GENERATE).code == 0
    curate = ("curate", "teacher.jsonl", "-o", "kept.jsonl")
    assert "allowed: " in workshop.refused(*curate)
    assert "did you mean 'empty'" in workshop.refused(*curate, "-f", "empti")
    assert "--held-out FILE" in workshop.refused(*curate, "-f", "overlap")
    assert "--teacher" in workshop.refused(*curate, "-f", "{kind: logprob_floor, min_logprob: -1.0}")
    assert "no such file" in workshop.refused("curate", "no.jsonl", "-o", "kept.jsonl", "-f", "empty")
    floor, overlap = "{kind: logprob_floor, drop_share: 0.5}", "{kind: overlap, n: 3, compare: response}"
    scored = workshop.stillhouse(*curate, "-f", floor, "-f", overlap, "--like", "run.yaml")
    assert scored.code == 0, scored.err
    assert "unlikely under the teacher" in scored.out


def test_drafts_become_prompts_that_ask_for_the_best_answer(workshop: Workshop) -> None:
    made = (
        "generate", "--model", "package:stillhouse/demo/teacher", "--template", "plain", "-o", "drafts.jsonl",
        "--data", "package:stillhouse/demo/data/dev.jsonl", "--limit", "6", "-n", "3", "--max-tokens", "44",
    )  # fmt: skip
    assert workshop.stillhouse(*made).code == 0
    said = workshop.stillhouse("curate", "drafts.jsonl", "-o", "asked.jsonl", "--drafts", "2")
    assert said.code == 0, said.err
    head, *asked = rows(workshop.folder / "asked.jsonl")
    assert head["stillhouse"]["stage"] == "drafts"
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows(workshop.folder / "drafts.jsonl")[1:]:
        by_prompt.setdefault(row["id"], []).append(row)
    enough = {
        id: [row["response"].strip() for row in found if row["finished"] and row["response"].strip()]
        for id, found in by_prompt.items()
    }
    enough = {id: texts for id, texts in enough.items() if len(texts) >= 2}
    assert asked
    assert [row["id"] for row in asked] == list(enough)
    for row in asked:
        first = by_prompt[row["id"]][0]
        assert row["drafts"] == enough[row["id"]][:2]
        assert row["prompt"].startswith(first["prompt"])
        assert all(text in row["prompt"] for text in row["drafts"])
        assert row["response"] == first["references"][0]
    assert f"{len(asked)} prompts with 2 drafts each" in said.out
    again = workshop.stillhouse("curate", "drafts.jsonl", "-o", "asked.jsonl", "--drafts", "2")
    assert "nothing to do" in again.out
    for done in ("2 drafts each", "nothing to do"):
        table = workshop.stillhouse("curate", "drafts.jsonl", "-o", "asked.parquet", "--drafts", "2")
        assert done in table.out
    assert list(read_rows(workshop.folder / "asked.parquet")) == asked
    assert "drafts is 2, not 3" in workshop.refused(
        "curate", "drafts.jsonl", "-o", "asked.jsonl", "--drafts", "3"
    )
    assert "no effect with --drafts" in workshop.refused(
        "curate", "drafts.jsonl", "-o", "other.jsonl", "--drafts", "2", "-f", "empty"
    )
    trained = workshop.stillhouse(
        "run", "run.yaml", "recipe=sft", "teacher=", "data.train=asked.jsonl", "data.max_prompt=512",
        "name=sft", "train.max_steps=1",
    )  # fmt: skip
    assert trained.code == 0, trained.err


def test_show_pairs_of_a_run_and_of_files(workshop: Workshop) -> None:
    said = workshop.stillhouse("run", "run.yaml", *PAIRS)
    assert said.code == 0, said.err
    shown = workshop.stillhouse("show", "pairs", "runs/kd", "-n", "3")
    assert shown.code == 0, shown.err
    assert shown.out.count("  teacher ") == shown.out.count("  student ") == 3
    assert "gap +" in shown.out or "gap -" in shown.out
    assert "3 of 24 pairs shown" in shown.err
    lost = workshop.stillhouse("show", "pairs", "runs/kd", "--dropped", "--json", "-n", "99")
    told = [json.loads(line) for line in lost.out.splitlines()]
    summary = json.loads((workshop.folder / "runs/kd/responses/curation.json").read_text())["rounds"]
    assert list(summary) == ["0", "1"]
    assert len(told) == 24 - summary["1"]["kept"]
    assert all(one["dropped"][0]["filter"] == "format" and not one["kept"] for one in told)
    data = json.loads((workshop.folder / "runs/kd/data.json").read_text())
    assert [one["kept"] for one in data["curation"]] == [one["kept"] for one in summary.values()]
    first = workshop.stillhouse("show", "pairs", "runs/kd", "--round", "0", "--id", "train:3", "--json")
    one = json.loads(first.out)
    assert one["id"] == "train:3"
    assert one["responses"]["student"]["student_version"] == 0
    assert one["responses"]["student"]["gap"] == (
        one["responses"]["student"]["scores"]["teacher"] - one["responses"]["student"]["scores"]["student"]
    )
    some = [workshop.stillhouse("show", "pairs", "runs/kd", "--seed", seed, "-n", "4").out for seed in "112"]
    assert some[0] == some[1] != some[2]
    files = [f"runs/kd/responses/{name}-0.jsonl" for name in ("teacher", "student")]
    assert workshop.stillhouse("show", "pairs", *files, "-n", "1").out.startswith("train:1\n")
    assert "has no round 7" in workshop.refused("show", "pairs", "runs/kd", "--round", "7")
    assert "no prompt 'x'" in workshop.refused("show", "responses", files[0], "--id", "x")
    kept = workshop.stillhouse(
        "curate", "runs/kd", "-o", "kept.jsonl", "-f", "{kind: length_ratio, max_ratio: 9.0}"
    )
    assert "kept 24 of 24" in kept.out
    assert workshop.stillhouse("show", "pairs", "kept.jsonl", "-n", "1").out.startswith("train:1\n")
