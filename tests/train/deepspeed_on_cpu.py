"""Turns on accelerate's DeepSpeed on a CPU, where accelerate itself leaves DeepSpeed out.

As a module it is the command line of Stillhouse with that switch turned, for `accelerate launch`:

    ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate-zero3.yaml --num_processes 2 \
        -m tests.train.deepspeed_on_cpu run run.yaml
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stillhouse.commands import main
from stillhouse.commands.init import launch_yaml


def switch_on() -> None:
    """Let accelerate give models of processes without a GPU to DeepSpeed, which needs none."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does without
    plain = AcceleratorState.__init__

    def with_deepspeed(self: Any, *args: Any, deepspeed_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, deepspeed_plugin=deepspeed_plugin, **options)
        if deepspeed_plugin is not None:
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
        if getattr(self, "deepspeed_plugins", None) is not None:  # later calls read the state that all share
            self.distributed_type = DistributedType.DEEPSPEED

    AcceleratorState.__init__ = with_deepspeed


def asked(kind: str, folder: Path) -> dict[str, str]:
    """The variables that `accelerate launch` sets for the configuration of `init --launch KIND`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    file = folder / f"accelerate-{kind}.yaml"
    file.write_text(launch_yaml(kind), encoding="utf-8")
    given = launch_command_parser().parse_args(["--config_file", str(file), "any.py"])
    arguments, written, _ = _validate_launch_command(given)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(written.deepspeed_config)
    _, env = prepare_deepspeed_cmd_env(arguments)
    return {name: value for name, value in env.items() if name.startswith("ACCELERATE_")}


if __name__ == "__main__":
    switch_on()
    main()
