"""The recipes for one node, Slurm and Kubernetes: every file loads, and they name each other rightly."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT

from stillhouse.commands.init import launch_yaml
from stillhouse.runs.resolve import resolve
from stillhouse.runs.serve import ServeConfig
from stillhouse.runs.training_arguments import prompts_in_a_micro_batch

SCALE = ROOT / "examples" / "scale"


@pytest.mark.parametrize("name", ["run.yaml", "generate.yaml"])
def test_a_run_is_a_configuration(name: str) -> None:
    assert resolve(str(SCALE / name)).config.data.max_response == 1024


def test_the_batch_can_be_divided_among_all_processes() -> None:
    config = resolve(str(SCALE / "run.yaml")).config
    for processes in (8, 64):
        assert prompts_in_a_micro_batch(config, processes) == config.train.micro_batch_size


def test_the_teacher_is_what_the_run_asks_for() -> None:
    served = ServeConfig(**yaml.safe_load((SCALE / "teacher.yaml").read_text(encoding="utf-8")))
    remote = resolve(str(SCALE / "run.yaml")).config.teacher.of
    service, servers = documents("teacher.k8s.yaml")
    pods = [f"{servers['metadata']['name']}-{n}" for n in range(servers["spec"]["replicas"])]
    urls = [f"http://{pod}.{service['metadata']['name']}:{served.port}" for pod in pods]
    assert list(remote.url) == urls
    assert served.host == "0.0.0.0"
    assert service["spec"]["selector"] == servers["spec"]["template"]["metadata"]["labels"]
    (port,) = container(servers)["ports"]
    assert port["containerPort"] == service["spec"]["ports"][0]["port"] == served.port


def test_the_job_starts_as_many_processes_as_it_has_gpus() -> None:
    service, job = documents("train.k8s.yaml")
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (script,) = container(job)["args"]
    gpus = spec["completions"] * container(job)["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--num_machines {spec['completions']} --num_processes {gpus}" in script
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}" in script
    check_bash(script)


@pytest.mark.parametrize("name", sorted(path.name for path in SCALE.glob("*.s*")))
def test_a_script_is_bash_and_names_files_that_exist(name: str) -> None:
    text = (SCALE / name).read_text(encoding="utf-8")
    check_bash(text)
    for file in re.findall(r"(?<![\w/.])[\w-]+\.yaml", text):
        assert (SCALE / file).exists(), file


def test_the_configuration_of_accelerate_is_the_one_that_init_writes() -> None:
    assert (SCALE / "accelerate-fsdp2.yaml").read_text(encoding="utf-8") == launch_yaml("fsdp2")


def check_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(Path(SCALE / name).read_text(encoding="utf-8")))


def container(workload: Any) -> Any:
    (one,) = workload["spec"]["template"]["spec"]["containers"]
    return one
