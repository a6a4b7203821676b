"""Which causal architectures of transformers give their logits as head(hidden states), and which are refused.

Each is built with random weights from a tiny configuration. "exact": the largest difference between the
model's own logits and those that Stillhouse recomputes is at most 1e-5 of the largest logit; "refused":
`check_head` says so by name; "wrong" would be a fault; "not built": transformers could not make one this
small or needs a package.

    python benchmarks/heads.py            # all of them, minutes
    python benchmarks/heads.py --small    # a few; writes nothing

Writes benchmarks/results/heads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from _result import result, save
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import ModelError
from stillhouse.models import head_of, hidden_rows
from stillhouse.models.hidden import check_head

RESULT = Path(__file__).parent / "results" / "heads.json"
SMALL = ("llama", "gemma2", "granite", "hyperclovax", "cohere")
TINY = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2,
    "num_layers": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48,
    "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "moe_intermediate_size": 16, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LARGEST = 20_000_000
SECONDS = 10
SCALES = {"logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 3.0, "output_multiplier": 3.0}


def main() -> None:
    """Try every architecture."""
    try_all(attempt, SMALL, RESULT, __doc__)


def try_all(
    attempt: Callable[[str], dict[str, Any]], some: Sequence[str], output: Path, description: str | None
) -> None:
    """Try every causal architecture of transformers, or `some` with --small, which writes nothing.

    Args:
        attempt: the name of an architecture to a row with its `verdict`.
        some: a few names.
        output: the JSON file, called as the script.
        description: of the script.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few; writes nothing")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in some if small else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(attempt(name))
        print(json.dumps(rows[-1]), flush=True)
    print(dict(Counter(row["verdict"] for row in rows)))
    if not small:
        save(output, result(rows))


def give_up(*_: Any) -> None:
    """What a timer calls."""
    raise TimeoutError(f"longer than {SECONDS} s")


def attempt(name: str) -> dict[str, Any]:
    """The verdict on one architecture."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        return verdict(name)
    except TimeoutError as error:
        return {"architecture": name, "verdict": "not built", "why": str(error)}
    finally:
        signal.alarm(0)


def verdict(name: str) -> dict[str, Any]:
    """As `attempt`, without a limit of time."""
    try:
        model = build(name)
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the finding
        return {"architecture": name, "verdict": "not built", "why": f"{type(error).__name__}: {error}"[:160]}
    try:
        check_head(model)
        difference = relative_difference(model)
    except ModelError as error:
        return {"architecture": name, "verdict": "refused", "why": str(error)[:160]}
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the finding
        return {"architecture": name, "verdict": "not built", "why": f"{type(error).__name__}: {error}"[:160]}
    return {"architecture": name, "verdict": "exact" if difference <= 1e-5 else "wrong", "error": difference}


def build(name: str) -> torch.nn.Module:
    """A tiny model with random weights, and with scales that are not 1 where it has some."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[name]
    known = config_class().to_dict()
    values = {field: value for field, value in {**TINY, **SCALES}.items() if field in known}
    if isinstance(known.get("layer_types"), list):
        values["layer_types"] = known["layer_types"][:2]
    config = config_class(**values)
    with init_empty_weights():
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: these options do not make it small")
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def relative_difference(model: torch.nn.Module) -> float:
    """Between own and recomputed logits, as a share of the largest logit."""
    batch = TokenBatch.of([range(3, 9)], [1], pad_id=0)
    found = head_of(model).logits(hidden_rows(model, batch))
    own = model(input_ids=batch.input_ids[:, :5], use_cache=False).logits[0].float()
    return float((found - own).abs().max() / own.abs().max())


if __name__ == "__main__":
    main()
