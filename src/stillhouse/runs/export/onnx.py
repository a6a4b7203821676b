"""An exported student as ONNX Runtime loads it: one graph that takes a KV cache and returns it longer."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import ModelError
from stillhouse.models.vision import reads_images
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.description import write_description
from stillhouse.runs.export.packages import require_packages
from stillhouse.runs.export.safetensors import copy_kept, facts
from stillhouse.runs.export.smoke_test import SmokeTest, write_smoke_test
from stillhouse.runs.export.student import FinishedStudent

FILE = "model.onnx"
_IMPORTS = """\
import numpy
import onnxruntime
from transformers import AutoTokenizer"""
_CODE = """\
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
taken = {{value.name for value in session.get_inputs()}}
states = session.get_outputs()[1:]  # keys and values of each layer: batch, heads, tokens so far, width
cache = {{
    value.name.replace("output.", "input.", 1): numpy.zeros(
        (1, value.shape[1], 0, value.shape[3]), numpy.float32
    )
    for value in states
}}
tokens = list(tokenizer(PROMPT{options})["input_ids"])
read, start = 0, len(tokens)
while len(tokens) < start + MAX_TOKENS and (read == 0 or tokens[-1] not in {ends}):
    feeds = {{
        "input_ids": numpy.array([tokens[read:]], numpy.int64),
        "position_ids": numpy.arange(read, len(tokens), dtype=numpy.int64)[None],
        **cache,
    }}
    logits, *longer = session.run(None, {{name: feeds[name] for name in feeds if name in taken}})
    cache = dict(zip(cache, longer))
    read = len(tokens)
    tokens.append(int(logits[0, -1].argmax()))
answer = tokenizer.decode(tokens[start:], skip_special_tokens=True)"""
_USAGE = """\
`model.onnx` (weights in `model.onnx.data`) takes `input_ids`, `position_ids` and the keys and values of every
layer so far, of length 0 for a prompt, and returns logits and the longer keys and values. It has no attention
mask: prompts of one batch have one length. `smoke_test.py` is the whole loop of greedy decoding."""


def require_onnx(smoke_test: bool) -> None:
    """Make sure that ONNX files can be written, and asked.

    Raises:
        EnvironmentFault: a package is missing.
    """
    require_packages("onnx", ("onnx", "onnxscript"), "onnxruntime", smoke_test)


def write_onnx(student: FinishedStudent, config: ExportConfig, folder: Path) -> None:
    """Write graph, weights, tokenizer, template, generation config, card and smoke test.

    Raises:
        StillhouseError: a package is missing, or transformers cannot export the model.
    """
    require_onnx(config.smoke_test)
    exported = _exported(student.model)
    exported.generation_config = student.model.generation_config
    exported.save_pretrained(folder)
    copy_kept(student.folder, folder)
    options = "" if student.example.special_tokens else ", add_special_tokens=False"
    code = _CODE.format(options=options, ends=list(student.ends))
    write_smoke_test(
        folder, SmokeTest("onnxruntime and transformers' tokenizers", _IMPORTS, code), student.example
    )
    write_description(folder, student, _USAGE, facts(student, f"`{FILE}`, for ONNX Runtime"), library="onnx")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on standard output and its warnings about insides of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _exported(model: Any) -> Any:
    """The step of decoding that reads several tokens behind a cache, as an `ExportedModel` of transformers.

    Raises:
        ModelError: the model keeps another state than keys and values of all tokens, or cannot be traced.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.cache_utils import DynamicLayer
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    name = type(model).__name__
    if reads_images(model.config):
        raise ModelError(f"--to onnx writes language models; {name} reads images. Export safetensors instead")
    ids = torch.ones(2, 8, dtype=torch.long)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _quiet():
        try:
            step, inputs = decompose_for_generation(model, asked, multi_token_decode=True)["decode"]
            layers = getattr(inputs.get("past_key_values"), "layers", ())
            if layers and all(type(layer) is DynamicLayer for layer in layers):
                exported = OnnxExporter().export(step, inputs, OnnxConfig(dynamic=True))
                ClearMetadataAndDocStringPass()(exported.program)  # stack traces, with this machine's paths
                return exported
        except Exception as error:  # of torch.export, onnxscript or transformers: there is no common class
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"transformers cannot export {name} to ONNX: {words}") from error
    raise ModelError(
        "--to onnx writes models whose cache is the keys and values of all tokens; "
        f"that of {name} is another (a sliding window or a recurrent state). Export safetensors instead"
    )
