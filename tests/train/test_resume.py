"""A run that is killed and resumed ends as one that was not: weights, optimiser, buffer, log, bit for bit."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_runs import differences, in_child, in_two, nth, outcome, tree, write_data

from stillhouse.train import checkpoints

SKEW = {"kind": "skew_rkl"}
METHODS: dict[str, dict[str, Any]] = {
    "fixed": {"objective": {"kind": "taid", "t": {"kind": "momentum", "rate": 0.05}}, "responses": "fixed"},
    "mixed": {"objective": "reverse_kl", "responses": {"kind": "mixed", "student_share": 0.5},
              "train": {"micro_batch_tokens": 90}},
    "pairs": {
        "objective": {"teacher": "skew_kl", "student": SKEW},
        "responses": {"kind": "pairs", "refresh": "epoch"},
    },
    "gaps": {
        "objective": {
            "kind": "contrastive", "alpha_rule": "gap", "teacher_gap": "previous_round",
            "student_gap": "batch", "alpha_least": 0.001, "alpha_most": 0.9, "alpha": 0.5,
            "student_share": {"kind": "gradual_beta"},
        },
        "responses": {"kind": "pairs", "refresh": "epoch"},
    },
    "curated": {
        "objective": {"teacher": "skew_kl", "student": SKEW},
        "responses": {
            "kind": "pairs", "refresh": "epoch", "chunk_size": 4, "resample": 2,
            "filters": [
                {"kind": "format", "forbid": "[Ff]", "source": "student"},
                {"kind": "logprob_floor", "drop_share": 0.1},
            ],
        },
        "train": {"max_steps": 7},
    },
    "batched": {  # PPO as MiniLLM's code runs it
        "objective": {
            "kind": "policy_gradient", "discount": 0.95, "include_current": True, "reward_scale": 0.5,
            "whiten": True, "ratio_clip": 0.2, "sampling_teacher_share": 0.2,
        },
        "responses": {
            "kind": "batched", "generate_batches": 2, "epochs": 2, "teacher_share": 0.2,
            "sampling": {"logprobs": True},
        },
    },
    "adaptive": {
        "objective": {"fixed": SKEW, "student": SKEW, "text": "cross_entropy"},
        "responses": {
            "kind": "adaptive", "capacity": 8, "cache_teacher_hidden": True,
            "student_share": {"kind": "dev_loss", "start": 0.6, "step": 0.2, "against": "last"},
        },
        "train": {"keep": "best", "best_by": "loss", "packing": "on"},
    },
}  # fmt: skip


def changes(folder: Path, method: str) -> dict[str, Any]:
    """A method, with plain text where it has a loss for it."""
    wants_text = "text" in METHODS[method]["objective"]
    return {
        **METHODS[method],
        **({"data": {"text": str(folder / "text.jsonl"), "text_block": 8}} if wants_text else {}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    write_data(made)
    return made


@pytest.fixture(scope="module")
def straight(folder: Path) -> Any:
    """The outcome of a method's run that nothing interrupts, made when it is first asked for."""

    @functools.cache
    def made(method: str) -> dict[str, Any]:
        assert in_child(tree(folder, f"{method}-straight", **changes(folder, method))) == 0
        return outcome(folder / f"{method}-straight")

    return made


KILLS = {
    "before the first checkpoint": nth(1, "open", "metrics.jsonl"),
    "while the log is written": nth(6, "open", "metrics.jsonl"),
    "while the trainer saves": nth(1, "open", "checkpoint-6/trainer_state.json"),
    "between the trainer's state and ours": nth(1, "os.rename", "checkpoint-6/stillhouse.pt"),
    "before a checkpoint is sealed": nth(1, "os.rename", "checkpoint-8/complete.json"),
    "while an old checkpoint is deleted": nth(1, "shutil.rmtree", "checkpoint-4"),
    "while the student is exported": nth(1, "open", "student.new/README.md"),
}


@pytest.mark.parametrize(
    ("method", "kill"),
    [
        *(("adaptive", kill) for kill in KILLS),
        ("fixed", "while the log is written"),
        ("fixed", "while the trainer saves"),
        ("mixed", "between the trainer's state and ours"),
        ("batched", "between the trainer's state and ours"),
        ("pairs", "while the trainer saves"),
        ("pairs", "before a checkpoint is sealed"),
        ("gaps", "before a checkpoint is sealed"),
    ],
)
def test_killed_and_resumed_is_as_never_killed(folder: Path, straight: Any, method: str, kill: str) -> None:
    wanted = straight(method)
    name = f"{method}-{list(KILLS).index(kill)}"
    run = tree(folder, name, **changes(folder, method))
    die = KILLS[kill]
    assert in_child(run, die=die) == -9, "the process was to be killed"
    assert in_child(run, resume=True) == 0
    assert differences(wanted, outcome(folder / name)) == []


IN_A_ROUND = {
    "while the student writes its second round": nth(4, "open", "student-1.shard-0-of-1.jsonl"),
    "while the student tries again": nth(1, "open", "student-1.resample-1.shard-0-of-1.jsonl"),
    "before a round is whole": nth(1, "os.rename", "/student-1.jsonl"),
}


@pytest.mark.parametrize("kill", IN_A_ROUND)
def test_killed_in_the_middle_of_a_round(folder: Path, straight: Any, kill: str) -> None:
    wanted = straight("curated")
    run = tree(folder, f"curated-{list(IN_A_ROUND).index(kill)}", **METHODS["curated"])
    assert in_child(run, die=IN_A_ROUND[kill]) == -9, "the process was to be killed"
    place = Path(run["output"]["folder"]) / "responses"
    for part in place.glob("*.shard-*"):  # and the last line is not whole
        part.write_bytes(part.read_bytes()[:-9])
    assert in_child(run, resume=True) == 0
    assert differences(wanted, outcome(place.parent)) == []
    assert rounds_of(place.parent) == rounds_of(folder / "curated-straight")


def rounds_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "responses").iterdir())}


def test_it_may_be_killed_again_and_again(folder: Path, straight: Any) -> None:
    run = tree(folder, "often", **changes(folder, "adaptive"))
    assert in_child(run, die=nth(1, "open", "checkpoint-4/trainer_state.json")) == -9
    assert in_child(run, resume=True, die=nth(1, "open", "checkpoint-4/trainer_state.json")) == -9
    assert in_child(run, resume=True, die=nth(1, "os.rename", "checkpoint-6/complete.json")) == -9
    assert in_child(run, resume=True) == 0
    assert differences(straight("adaptive"), outcome(folder / "often")) == []


def test_ctrl_c_ends_with_the_step_and_a_checkpoint(folder: Path, straight: Any) -> None:
    run = tree(folder, "ctrl-c", **changes(folder, "adaptive"))
    assert in_child(run, die=nth(5, "open", "metrics.jsonl"), by=signal.SIGINT) == 0
    state = json.loads((folder / "ctrl-c" / "state.json").read_text(encoding="utf-8"))
    assert state["state"] == "interrupted"
    assert not (folder / "ctrl-c" / "student").exists()
    assert in_child(run, resume=True) == 0
    assert differences(straight("adaptive"), outcome(folder / "ctrl-c")) == []


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    folder: Path, straight: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = tree(folder, "damaged", **changes(folder, "adaptive"))
    assert in_child(run, die=nth(1, "open", "checkpoint-8/trainer_state.json")) == -9
    damaged = folder / "damaged" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    found = checkpoints.newest_whole(folder / "damaged" / "checkpoints")
    assert found is not None
    assert found.name == "checkpoint-4"
    assert "checkpoint-6 has a damaged optimizer.pt; going back to the checkpoint before it" in caplog.text
    assert in_child(run, resume=True) == 0
    assert differences(straight("adaptive"), outcome(folder / "damaged")) == []


def test_two_processes_resume_with_a_buffer_each(folder: Path) -> None:
    both = {**changes(folder, "adaptive"), "train": {"hf": {"ddp_backend": "gloo"}, "batch_size": 4}}
    straight, killed = (tree(folder, name, **both) for name in ("two", "two-killed"))
    assert in_two(straight) == [0, 0]
    assert -9 in in_two(killed, die=nth(1, "os.rename", "checkpoint-6/complete.json"))
    assert in_two(killed, resume=True) == [0, 0]
    assert differences(outcome(folder / "two"), outcome(folder / "two-killed")) == []
    buffers = [
        torch.load(
            folder / name / "checkpoints" / "checkpoint-9" / f"stillhouse{rank}.pt", weights_only=True
        )["step"]["policy"]["buffer"]
        for name in ("two", "two-killed")
        for rank in ("", "-1")
    ]
    assert differences(buffers[0], buffers[2]) == []
    assert differences(buffers[1], buffers[3]) == []
    assert differences(buffers[0], buffers[1]) != []


def test_two_processes_share_a_round_and_resume_within_it(folder: Path) -> None:
    options = {
        **METHODS["curated"],
        "train": {"hf": {"ddp_backend": "gloo"}, "batch_size": 4, "max_steps": 6},
    }
    straight, killed = (tree(folder, name, **options) for name in ("shared", "shared-killed"))
    assert in_two(straight) == [0, 0]
    assert -9 in in_two(killed, die=nth(2, "open", "student-1.shard-1-of-2.jsonl"))
    assert list((folder / "shared-killed" / "responses").glob("student-1.shard-0-of-2.jsonl"))
    assert in_two(killed, resume=True) == [0, 0]
    assert differences(outcome(folder / "shared"), outcome(folder / "shared-killed")) == []
    assert rounds_of(folder / "shared") == rounds_of(folder / "shared-killed")


def test_saves_are_bounded(folder: Path, straight: Any) -> None:
    straight("adaptive")
    left = sorted(path.name for path in (folder / "adaptive-straight" / "checkpoints").iterdir())
    assert left == ["checkpoint-8", "checkpoint-9"]


def test_another_seed_gives_another_outcome(folder: Path, straight: Any) -> None:
    """The comparison can fail."""
    mixed = METHODS["mixed"]
    assert in_child(tree(folder, "other", **{**mixed, "train": {**mixed.get("train", {}), "seed": 43}})) == 0
    assert len(differences(straight("mixed"), outcome(folder / "other"))) > 10
