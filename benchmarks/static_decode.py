"""Which causal architectures of transformers decode by a step of fixed shape, and which by a growing cache.

Each is built with random weights from a tiny configuration, as in heads.py, and writes eight texts both ways.
"static": the same tokens, and the step reads nothing from its device, so that a CUDA graph can replay it;
"static, may wait": the same tokens, but with an operation that may read from the device: where it does,
capturing is given up and the step runs without a graph; "growing": the trial before the first text refuses
it, with the reason, and it decodes as before; "other text" would be a fault; "not built": transformers could
not make one this small or needs a package.

    python benchmarks/static_decode.py            # all of them, minutes
    python benchmarks/static_decode.py --small    # a few; writes nothing

Writes benchmarks/results/static_decode.json.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from heads import SECONDS, TINY, build, give_up, try_all
from tests.no_sync import HostSync, NoHostSync

from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.engines.kv_cache import num_attention_layers
from stillhouse.engines.static_decode import StaticDecoder
from stillhouse.engines.static_step import DecodeBuffers, DecodeStep

RESULT = Path(__file__).parent / "results" / "static_decode.json"
SMALL = ("llama", "gpt2", "gemma3_text", "bloom", "mamba")
FACTS = TokenizerInfo((2,), 0)
SAMPLING = Sampling(max_tokens=20)


def main() -> None:
    """Try every architecture."""
    try_all(attempt, SMALL, RESULT, __doc__)


def attempt(name: str) -> dict[str, Any]:
    """The verdict on one architecture."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        model = build(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)  # distributions that are not flat
        return {"architecture": name, **verdict(model)}
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the finding
        return {"architecture": name, "verdict": "not built", "why": f"{type(error).__name__}: {error}"[:160]}
    finally:
        signal.alarm(0)


@torch.no_grad()
def verdict(model: Any) -> dict[str, Any]:
    """How it decodes, and why not by a step of fixed shape."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, TINY["vocab_size"]) for _ in range(draw.randint(1, 20))] for _ in range(8)]
    grown = TransformersConfig(kv_cache="growing").build(model, FACTS).generate(prompts, SAMPLING, 0)
    layers = num_attention_layers(model.config)
    if layers is None:
        return {"verdict": "growing", "why": "its layers are not all attention"}
    decoder = StaticDecoder(model, FACTS, layers)
    if (why := decoder.why_not(max(prompts, key=len))) is not None:
        return {"verdict": "growing", "why": why}
    fixed: dict[int, Any] = {}
    decoder.run(prompts, SAMPLING, 0, 8, fixed.__setitem__)
    if [fixed[place].token_ids for place in range(8)] != [one.token_ids for one in grown]:
        return {"verdict": "other text"}
    try:
        with NoHostSync():
            read_nothing(decoder.step, decoder.buffers)
    except HostSync as error:
        return {"verdict": "static, may wait", "why": str(error)[:160]}
    return {"verdict": "static"}


def read_nothing(step: DecodeStep, buffers: DecodeBuffers | None) -> None:
    """One more step."""
    assert buffers is not None
    step(buffers)


if __name__ == "__main__":
    main()
