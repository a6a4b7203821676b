"""What `init --launch` writes is a configuration that the installed accelerate takes, beside the run's."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_extend_env_parallelism_config
from torch.distributed.run import get_args_parser

from stillhouse.commands import main
from stillhouse.core.distributed import GROUPS, group_sizes
from stillhouse.runs.resolve import resolve
from stillhouse.runs.training_arguments import training_arguments
from stillhouse.train.parallelism import check_launcher
from tests.children import ranks, write_to
from tests.conftest import ROOT
from tests.workshop import Workshop

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_loads_the_configuration(
    workshop: Workshop, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = workshop.stillhouse("init", "kd", "-o", f"of-{kind}.yaml", "--launch", kind)
    assert said.code == 0, said.err
    file = f"accelerate-{kind}.yaml"
    command = f"accelerate launch --config_file {file} -m stillhouse run of-{kind}.yaml"
    assert command in " ".join(said.err.split())
    found = load_config_from_file(str(workshop.folder / file))
    assert found.distributed_type.value == KINDS[kind]
    assert found.num_processes == 8 * found.num_machines
    given = ["--config_file", str(workshop.folder / file), *command.split()[4:]]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert (arguments.module, arguments.training_script) == (True, "stillhouse")
    assert arguments.training_script_args == ["run", f"of-{kind}.yaml"]
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (KINDS[kind] == "FSDP", kind.startswith("zero"))
    if arguments.use_fsdp:
        assert (arguments.fsdp_version, arguments.fsdp_cpu_ram_efficient_loading) == (2, False)
    assert arguments.use_parallelism_config == (kind == "hsdp")
    if kind == "hsdp":
        said = prepare_extend_env_parallelism_config(arguments, {"WORLD_SIZE": str(found.num_processes)})
        for name, value in {**said, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
            monkeypatch.setenv(name, value)
        check_launcher({})
        assert group_sizes() == {**dict.fromkeys(GROUPS, 1), "dp_replicate_size": 2, "dp_shard_size": 8}
    if kind.startswith("zero"):
        assert (arguments.zero_stage, arguments.zero3_init_flag) == (int(kind[-1]), False)


def test_the_configuration_alone(workshop: Workshop) -> None:
    assert workshop.stillhouse("init", "--launch", "fsdp2").code == 0
    assert (workshop.folder / "accelerate-fsdp2.yaml").is_file()
    assert "--force" in workshop.refused("init", "--launch", "fsdp2")


def test_what_it_refuses(workshop: Workshop) -> None:
    assert "ddp, fsdp2, hsdp, zero2, zero3" in workshop.refused(
        "init", "kd", "-o", "x.yaml", "--launch", "fsdp"
    )
    assert "--output" in workshop.refused("init", "kd", "--launch", "ddp")
    assert "Name a method" in workshop.refused("init")
    assert not (workshop.folder / "x.yaml").exists()


def as_launched(folder: Path, *words: str) -> None:
    """`python -m stillhouse`, as a launcher starts it with the variables of its rank."""
    os.chdir(folder)
    write_to(*(folder / f"{name}{os.environ['RANK']}" for name in ("out", "err")))
    sys.argv = ["stillhouse", *words]
    try:
        main()
    finally:
        sys.stdout.flush()


def test_of_several_processes_the_first_speaks(workshop: Workshop) -> None:
    command = ("run", "run.yaml", "name=both", "train.max_steps=1", "train.micro_batch_size=1")
    command = (*command, "train.batch_size=2", "evaluate.before=false", "evaluate.teacher=false")
    assert ranks(2, as_launched, workshop.folder, *command) == [0, 0]
    said = {name: (workshop.folder / name).read_text() for name in ("out0", "out1", "err0", "err1")}
    assert "both/student" in said["out0"]
    assert not said["out1"]
    assert "Training both" in said["err0"]
    assert "Training both" not in said["err1"]
    codes = ranks(2, as_launched, workshop.folder, "run", "run.yaml", "train.lrr=1")
    assert 2 in codes
    assert 0 not in codes
    errors = [(workshop.folder / name).read_text() for name in ("err0", "err1")]
    assert sum("train.lrr" in one for one in errors) == 1


def test_the_page_on_scale_launches_and_shards_as_it_says(workshop: Workshop) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    launching = page.split("## One node")[1].split("\n## ")[0]
    lines = [line for line in launching.splitlines() if line.startswith("$ ")]
    assert len(lines) == 3
    torch_line, init, accelerate = (shlex.split(line.removeprefix("$ ")) for line in lines)
    assert workshop.stillhouse(*init[1:], "--force").code == 0
    assert (workshop.folder / accelerate[accelerate.index("--config_file") + 1]).is_file()
    arguments = launch_command_parser().parse_args(accelerate[2:])
    assert (arguments.module, arguments.training_script) == (True, "stillhouse")
    options = get_args_parser().parse_args(torch_line[1:])
    assert (options.module, options.training_script, options.nproc_per_node) == (True, "stillhouse", "8")
    sharding = page.split("## What is sharded")[1].split("\n## ")[0]
    each, block = re.findall(r"```yaml\n(.*?)```", sharding, flags=re.DOTALL)
    given = yaml.safe_load(block)
    given["teacher"]["path"] = yaml.safe_load((workshop.folder / "run.yaml").read_text())["teacher"]["path"]
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text())
    tree["evaluate"] = {**tree.get("evaluate", {}), **given["evaluate"]}
    assert resolve({**tree, "teacher": given["teacher"]}).config.teacher.sharded
    tree["train"] = {**tree.get("train", {}), **yaml.safe_load(each)["train"]}
    arguments = training_arguments(resolve(tree).config, workshop.folder)
    assert arguments.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
