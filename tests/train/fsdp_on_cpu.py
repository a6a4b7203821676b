"""Turns on accelerate's FSDP2 on a CPU, where accelerate itself leaves FSDP out.

As a module it is the command line of Stillhouse with that switch turned, for `accelerate launch`:

    ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate-fsdp2.yaml --num_processes 2 \
        -m tests.train.fsdp_on_cpu run run.yaml
"""

from __future__ import annotations

from typing import Any

from stillhouse.commands import main

ASKED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch` sets for the configuration of `init --launch fsdp2`."""
GROUPS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
"""What it adds for that of `init --launch hsdp`, with four processes."""


def switch_on() -> None:
    """Let accelerate shard models of processes that have no GPU."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if getattr(self, "fsdp_plugin", None) is not None:  # later calls read the state that all share
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    switch_on()
    main()
