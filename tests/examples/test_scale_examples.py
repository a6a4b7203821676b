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


@pytest.mark.parametrize("name", ["run.yaml", "generate.yaml", "one-node.yaml"])
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
    (waits,) = spec["template"]["spec"]["initContainers"][0]["args"]
    check_bash(waits)
    servers = re.search(r"for server in (.*); do", waits)
    assert servers is not None
    urls = [f"http://{server}:8600" for server in servers[1].split()]
    assert urls == list(resolve(str(SCALE / "run.yaml")).config.teacher.of.url)
    assert all(f"/dev/tcp/$server/{url.rpartition(':')[2]}" in waits for url in urls)


def test_a_checkpoint_has_the_time_that_the_schedulers_give() -> None:
    """Launchers kill after TORCH_ELASTIC_SHUTDOWN_TIMEOUT, schedulers after their own, longer time."""
    _, job = documents("train.k8s.yaml")
    (launcher,) = [one for one in container(job)["env"] if one["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    grace = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    slurm = (SCALE / "train.sbatch").read_text(encoding="utf-8")
    warned, kills = (
        int(re.search(pattern, slurm)[1])  # type: ignore[index]
        for pattern in (r"--signal=B:TERM@(\d+)", r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)")
    )
    assert 30 < kills < warned
    assert 30 < int(launcher["value"]) < grace
    assert '"$launched"\' TERM' not in slurm, "srun answers SIGTERM by SIGKILL to its tasks"


def test_scripts_that_are_signalled_pass_it_on_and_are_queued_again(tmp_path: Path) -> None:
    """The scheduler's commands are stand-ins that write what they were called with."""
    text = (SCALE / "train.sbatch").read_text(encoding="utf-8").replace("/shared", str(tmp_path))
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "0").write_text("http://a:1\n", encoding="utf-8")
    (tmp_path / "teachers" / "1").write_text("http://b:1\n", encoding="utf-8")
    bodies = {
        "scontrol": 'if [[ $1 == show ]]; then echo node7; else echo "$@" >> calls; fi',
        "srun": 'trap "exit 1" USR1; echo $$ > step; echo "$@" >> calls; while :; do sleep 0.1; done',
        "scancel": 'echo "$@" >> calls; kill -USR1 "$(cat step)"',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "8",
        "SLURM_JOB_NODELIST": "node[7-14]",
        "SLURM_CPUS_PER_TASK": "64",
        "STILLHOUSE_TEACHER_KEY": "key",
    }
    running = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=job)
    while not (tmp_path / "calls").exists():
        assert running.poll() is None
    running.terminate()
    assert running.wait(60) == 0
    step, cancelled, requeued = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()[-3:]
    assert step.rstrip().endswith("-m stillhouse run run.yaml 'teacher.of.url=[http://a:1,http://b:1]'")
    assert (cancelled, requeued) == ("--signal=TERM 4711.0", "requeue 4711")


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
