"""The command line in two processes: one message for what is wrong, and none waits for one that has ended."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import stillhouse
from tests.children import end, ranks, start, write_to
from tests.small_runs import STUDENT, Event, announce, nth, outcome, tree, write_data


def command(
    folder: Path, words: dict[int, list[str]], dies: dict[int, Event], by: signal.Signals = signal.SIGKILL
) -> None:
    """One process of a command: its words and its end depend on its rank."""
    import os

    from stillhouse.commands import main

    rank = int(os.environ["RANK"])
    write_to(folder / f"{rank}.out", folder / f"{rank}.err")
    if rank in dies:
        announce(dies[rank], by)
    sys.argv = ["stillhouse", *words[min(rank, max(words))]]
    main()


def in_two(folder: Path, *words: str, **more: Any) -> list[int]:
    return ranks(2, command, folder, {0: list(words)}, more.pop("dies", {}), *more.values(), seconds=200)


def said(folder: Path) -> list[str]:
    return [(folder / f"{rank}.err").read_text() for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    write_data(made)
    file = made / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            tree(made, "together", objective="forward_kl", train={"max_steps": 6, "validate_every": "never"})
        )
    )
    return made


def test_what_is_wrong_for_all_is_said_once(folder: Path) -> None:
    codes = in_two(folder, "run", str(folder / "run.yaml"), "train.lrr=1")
    assert 2 in codes
    assert 0 not in codes
    together = "".join(said(folder))
    assert sum(line.startswith("error") for line in together.splitlines()) == 1
    assert together.count("train.lrr") == 1
    assert "Traceback" not in together


def test_what_is_wrong_for_one_ends_all_and_only_it_says_so(folder: Path) -> None:
    run = ["run", str(folder / "run.yaml"), "name=alone", f"output.folder={folder / 'alone'}"]
    words = {0: run, 1: [*run, f"data.train={folder / 'absent.jsonl'}"]}
    codes = ranks(2, command, folder, words, {}, seconds=200)
    assert codes[1] == 2
    assert codes[0] != 0
    first, second = said(folder)
    assert second.count("error in process 1:") == 1
    assert "absent.jsonl" in second
    assert "error:" not in first
    assert "Traceback" not in first + second


def test_other_values_in_one_process_are_refused_before_anything_is_trained(folder: Path) -> None:
    run = ["run", str(folder / "run.yaml"), "name=differs", f"output.folder={folder / 'differs'}"]
    words = {0: run, 1: [*run, "train.lr=0.25", "train.max_steps=7"]}
    assert ranks(2, command, folder, words, {}, seconds=200) == [2, 2]
    together = "".join(said(folder))
    assert sum(line.startswith("error") for line in together.splitlines()) == 1
    assert "train.max_steps: is not the same in all processes of the run; got 6 in process 0, 7" in together
    assert "train.lr: is not the same" in together

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    own = [f"data.train={elsewhere / 'train.jsonl'}", f"data.valid={elsewhere / 'valid.jsonl'}"]
    assert ranks(2, command, folder, {0: run, 1: [*run, *own]}, {}, seconds=200) == [0, 0]
    (elsewhere / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes().partition(b"\n")[2])
    words = {0: [*run, "name=rows", f"output.folder={folder / 'rows'}"]}
    words[1] = [*words[0], *own]
    assert ranks(2, command, folder, words, {}, seconds=200) == [2, 2]
    assert "data.train: is not the same" in "".join(said(folder))
    assert not (folder / "rows").exists()


def test_killed_and_stopped_it_is_said_which_and_goes_on(folder: Path) -> None:
    run = ["run", str(folder / "run.yaml")]
    assert in_two(folder, *run, dies={1: nth(1, "os.rename", "checkpoint-4/stillhouse-1.pt")})[1] == -9
    first, _ = said(folder)
    assert "process 1 of 2" in first
    assert "--resume" in first
    assert "Traceback" not in first
    state = json.loads((folder / "together" / "state.json").read_text(encoding="utf-8"))
    assert state["state"] == "failed"
    assert "process 1 of 2" in state["message"]

    terminated = {1: nth(1, "os.rename", "checkpoint-4/stillhouse-1.pt")}
    assert in_two(folder, *run, "--resume", dies=terminated, by=signal.SIGTERM) == [143, 143]
    first, second = said(folder)
    assert first.count("Continue with:") == 1
    assert not any(word in second for word in ("Continue with:", "Training together", "warning:", "error:"))
    state = json.loads((folder / "together" / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], "SIGTERM" in state["message"]) == ("interrupted", True)

    assert in_two(folder, *run, "--resume") == [0, 0]
    assert "missing keys" not in (folder / "0.err").read_text()  # the head is the embedding
    assert "Student:" in (folder / "0.out").read_text()
    assert (folder / "1.out").read_text() == ""
    assert outcome(folder / "together")["rows"][-1]["step"] == 6


def test_a_signal_that_follows_a_death_names_the_death(folder: Path) -> None:
    """As torchrun ends the processes that are left once one has died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    words = {0: ["run", str(folder / "run.yaml"), "name=ended", f"output.folder={folder / 'ended'}"]}
    dies = {1: nth(1, "open", "train.jsonl")}
    first, second = (
        start(command, folder, words, dies, signal.SIGKILL, env={**env, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    )
    assert end(second) == -9
    first.terminate()
    assert end(first) == 3
    heard, _ = said(folder)
    assert heard.count("process 1 of 2") == 1
    assert "has died" in heard
    assert "Interrupted by" not in heard
    assert "Traceback" not in heard


def test_how_long_silence_may_last_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_LOST_AFTER", "soon")
    assert 2 in in_two(folder, "run", str(folder / "run.yaml"))
    together = "".join(said(folder))
    assert "STILLHOUSE_LOST_AFTER" in together
    assert "at least 4" in together
    assert "Traceback" not in together


def test_eval_shares_the_prompts_and_says_the_same(folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(Path(stillhouse.__file__).parent / "demo" / "teacher")
    words.save_pretrained(folder / "model")
    torch.manual_seed(3)
    config = GPT2Config(**STUDENT, vocab_size=len(words), eos_token_id=words.eos_token_id)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    options = [
        "eval",
        str(folder / "model"),
        "--data",
        str(folder / "valid.jsonl"),
        "--temperature",
        "1",
        "--max-tokens",
        "8",
    ]
    files = [folder / "one.json", folder / "two.json"]
    assert ranks(1, command_alone, folder, [*options, "-o", str(files[0])]) == [0]
    assert in_two(folder, *options, "-o", str(files[1])) == [0, 0]
    answers = [
        [json.loads(line)["response"] for line in file.with_suffix(".jsonl").read_bytes().splitlines()]
        for file in files
    ]
    assert len(answers[0]) >= 4
    assert answers[0] == answers[1]
    assert (folder / "1.out").read_text() == ""


def command_alone(folder: Path, words: list[str]) -> None:
    from stillhouse.commands import main

    write_to(folder / "alone.out", folder / "alone.err")
    sys.argv = ["stillhouse", *words]
    main()


def test_commands_for_one_process_say_so_once(folder: Path) -> None:
    assert in_two(folder, "check", str(folder / "run.yaml"), "--measure") == [2, 2]
    first, second = said(folder)
    assert "runs in one process" in first
    assert "torchrun" in first
    assert second == ""
