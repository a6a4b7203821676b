"""What benchmarks/distillm2.py and benchmarks/distillm_speed.py share: their clock, models and runs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATA = "package:stillhouse/demo/data"


def measure_processor_time() -> None:
    """Let all clocks tell the processor time of one thread; before anything that measures is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    time.perf_counter = time.process_time


def parser(about: str | None, folder: str) -> argparse.ArgumentParser:
    """The options of both."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, default=Path(folder))
    made.add_argument("--small", action="store_true")
    made.add_argument("--seeds", type=int, help="fewer or more than the 3 of the full run")
    return made


def llama(tokenizer: str | Path, width: int, layers: int, heads: int) -> dict[str, Any]:
    """A Llama from random weights, as the `student` of a run."""
    return {
        "tokenizer": str(tokenizer),
        "from_config": {
            "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads,
            "intermediate_size": width * 8 // 3, "max_position_embeddings": 320,
            "tie_word_embeddings": True,
        },
    }  # fmt: skip


def done(folder: Path) -> bool:
    """Whether a run has come to its end."""
    state = folder / "state.json"
    return state.exists() and json.loads(state.read_text(encoding="utf-8"))["state"] == "done"


def run(config: dict[str, Any], kept: Collection[str] = ()) -> Path:
    """Run a configuration unless it has been; its folder.

    Args:
        config: the run.
        kept: what stays of the folder of a run that came to no end; all else goes.
    """
    import stillhouse

    folder = Path(config["output"]["folder"])
    if not done(folder):
        for path in (p for p in folder.glob("*") if p.name not in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if stillhouse.run(config).state != "done":
            raise SystemExit(f"{folder}: interrupted; run the same command again to go on")
    return folder
