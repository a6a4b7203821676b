"""On-policy distillation from one number for each token: of a live teacher, of its cache, of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve
from tests.devices import same
from tests.small_runs import TEACHER, in_child, rows_of, tree, write_data
from tests.vllm_like import demo_server

RECIPE = "on_policy_distillation"
LIVE = {"kind": "live", "path": TEACHER, "batch_invariant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sampled")
    write_data(made)
    return made


def config_of(folder: Path, name: str, teacher: dict[str, Any], **changes: Any) -> dict[str, Any]:
    train = {"max_steps": 3, "log_every": 1, "validate_every": "never", "save_every": "never"}
    return tree(folder, name, recipe=RECIPE, teacher=teacher, train=train, **changes)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if row["phase"] == "train"]


@pytest.mark.parametrize("gives", [{}, {"prompt_logprobs": False, "echo": True}], ids=["vllm", "echo"])
def test_a_server_that_scores_the_text_teaches_as_the_model_itself(
    folder: Path, gives: dict[str, Any]
) -> None:
    if not (folder / "live").exists():
        assert in_child(config_of(folder, "live", LIVE)) == 0
    with demo_server(**gives) as service:
        name = f"server-{service.server_address[1]}"
        teacher = {"kind": "server", "url": service.url, "k": 0, "cache": str(folder / name / "store")}
        run = config_of(folder, name, teacher)
        run["output"]["folder"] = str(folder / name / "run")
        execute(resolve(run))
        asked = [b for b in service.bodies("/v1/completions") if len(b["prompt"]) > 8]
    assert losses(folder / name / "run") == pytest.approx(losses(folder / "live"), abs=2e-4)
    scored = [b for b in asked if b.get("prompt_logprobs") == 0 or b.get("echo")]
    assert 8 <= len(scored) <= 14, "12 texts of 3 steps, some of them alike, and probes"


def test_the_cache_keeps_four_bytes_for_each_token(folder: Path) -> None:
    store = {"kind": "cache", "of": LIVE, "store": "labels", "folder": str(folder / "labels")}
    assert in_child(config_of(folder, "stored", store)) == 0
    assert in_child(config_of(folder, "plain", LIVE)) == 0
    assert losses(folder / "stored") == pytest.approx(losses(folder / "plain"), abs=1e-6)
    assert in_child(config_of(folder, "again", {**store, "on_miss": "error"})) == 0
    assert losses(folder / "again") == same(losses(folder / "stored"))


def test_stale_text_needs_to_know_how_likely_it_was(folder: Path) -> None:
    stale = {"kind": "batched", "generate_batches": 2, "epochs": 2}
    with pytest.raises(ConfigError, match=r"responses.sampling.logprobs: true"):
        resolve(config_of(folder, "x", LIVE, responses={**stale, "sampling": {"logprobs": False}}))
    config = config_of(folder, "stale", LIVE, responses=stale, objective={"importance_cap": 2.0})
    assert in_child(config) == 0
    ages = [row["responses/student_age"] for row in rows_of(folder / "stale") if row["phase"] == "train"]
    assert ages[-1] > 0


def test_what_needs_more_than_that_is_refused_with_what_does_not(folder: Path) -> None:
    server = {"kind": "server", "url": "http://127.0.0.1:1/v1", "k": 0}
    with pytest.raises(
        ConfigError, match="cannot be computed from the log-probability of each token"
    ) as told:
        resolve({**config_of(folder, "x", server), "objective": {"kind": "reverse_kl"}})
    assert "policy_gradient" in str(told.value)
    with pytest.raises(ConfigError, match="set store: labels"):
        resolve(config_of(folder, "x", {"kind": "cache", "of": server, "store": "topk"}))


def test_a_server_that_scores_no_text_is_told_of(folder: Path) -> None:
    with demo_server(prompt_logprobs=False) as plain:
        run = config_of(folder, "x", {"kind": "server", "url": plain.url, "k": 0, "cache": None})
        with pytest.raises(TeacherError, match="gives no log-probabilities of given text"):
            execute(resolve(run))
