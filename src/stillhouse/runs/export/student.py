"""A finished student, read back from its folder for an export: merged weights, tokenizer, template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.rows import Row
from stillhouse.data.templates import TEMPLATES
from stillhouse.data.tokenise import Encoder
from stillhouse.engines import TokenizerInfo
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import locate
from stillhouse.models import TeacherModel, generation_ends, load_teacher, load_tokenizer
from stillhouse.models.load import cast_parameters
from stillhouse.models.paths import is_run, resolve_path
from stillhouse.models.quantise import dequantise_layers, is_quantised
from stillhouse.models.vision import reads_images
from stillhouse.runs.export.config import PRECISIONS, ExportConfig
from stillhouse.runs.export.licences import of_model
from stillhouse.runs.own_settings import own_settings

QUESTION = "What is the capital of France?"
"""The smoke test's where there is neither a run with held-out prompts nor a given one."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the student's greedy answer.

    Example: `Example("A fruit?\\n", (21, 33), False, "Fig", 64)`
    """

    prompt: str
    """As the model reads it."""
    token_ids: tuple[int, ...]
    special_tokens: bool
    """Whether the tokenizer adds its special tokens to the prompt's text."""
    answer: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class FinishedStudent:
    """A student as it is exported.

    Example: `read_student(Path("runs/kd"), ExportConfig())`
    """

    name: str
    """The name of its run, else of its folder."""
    folder: Path
    """Where its files are."""
    model: Any
    tokenizer: Any
    encoder: Encoder
    """Its template with its tokenizer."""
    ends: tuple[int, ...]
    """The tokens that end a response."""
    dtype: str
    """Of the weights that are exported, such as "float32"; those of `model` may be wider."""
    licence: str | None
    example: Example

    @property
    def parameters(self) -> int:
        """How many there are; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def read_student(source: Path, config: ExportConfig) -> FinishedStudent:
    """The student of a run, or the model of a folder, in the dtype that is exported.

    Its generation config names every token that ends a response.

    Raises:
        StillhouseError: there is no such folder, the run is not finished, or nothing loads from there.
    """
    folder = Path(resolve_path(str(source)))
    if not folder.is_dir():
        raise ConfigError(Fault("RUN", "is not a folder", got=str(source)))
    where = TeacherModel(path=str(folder))
    tokenizer = load_tokenizer(where)
    template = TEMPLATES.parse(own_settings(str(folder)).data.get("template", "auto"))
    encoder = Encoder(template, tokenizer)
    model: Any = load_teacher(where)
    if is_quantised(model):  # whoever writes the export reads ordinary weights, or rounds them its own way
        dequantise_layers(model)
    dtype = _in_dtype(model, config)
    model.config.use_cache = True  # a training turns it off
    facts = TokenizerInfo(generation_ends(where, tokenizer), tokenizer.pad_token_id, tokenizer)
    ends = facts.ended_by(encoder.ends).eos_ids
    model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    run = locate(source) if is_run(locate(source)) else folder.parent if is_run(folder.parent) else None
    asked_of = None if reads_images(model.config) else run  # whose held-out prompts have images
    prompt, ids = _asked(config, encoder, asked_of)
    special = encoder.template.special_tokens
    example = Example(
        prompt, ids, special, _answer(model, tokenizer, ids, config.max_tokens), config.max_tokens
    )
    return FinishedStudent(
        name=(run or folder).absolute().name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        encoder=encoder,
        ends=tuple(ends),
        dtype=dtype,
        licence=of_model(str(folder)),
        example=example,
    )


def _in_dtype(model: Any, config: ExportConfig) -> str:
    """Round the weights to the dtype that is exported, and name it.

    llama.cpp has its own arithmetic: for it the rounded weights answer in float32. ONNX Runtime computes in
    float32 on a CPU, whatever the weights were stored in.
    """
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    own = "float32" if config.to == "onnx" else stored
    dtype = own if config.dtype == "auto" else config.dtype
    if dtype in PRECISIONS:
        cast_parameters(model, getattr(torch, dtype))
    if config.to == "gguf":
        cast_parameters(model, torch.float32)
    model.config.dtype = next(model.parameters()).dtype
    return dtype


def _asked(config: ExportConfig, encoder: Encoder, run: Path | None) -> tuple[str, tuple[int, ...]]:
    """The smoke test's prompt as text and as ids, the same ids that tokenising the text gives."""
    texts = [text for _, text in zip(range(1), _held_out(run), strict=False)] if config.prompt is None else []
    if not texts:
        texts = [encoder.prompt(Row("--prompt", instruction=config.prompt or QUESTION))[0]]
    [prompt] = texts
    found = encoder.tokenizer(prompt, add_special_tokens=encoder.template.special_tokens)
    return prompt, tuple(found["input_ids"])


def _held_out(run: Path | None) -> Iterator[str]:
    """The prompts that the run's student has answered at the end."""
    path = None if run is None else run / "evaluation" / "student-after.jsonl"
    if path is None or not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line).get("prompt")
            if isinstance(prompt, str):
                yield prompt


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, ids: tuple[int, ...], max_tokens: int) -> str:
    """The greedy answer to a prompt.

    Raises:
        ModelError: the model cannot generate.
    """
    given = torch.tensor([ids])
    output = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=max_tokens
    )
    return str(tokenizer.decode(output[0, given.shape[1] :], skip_special_tokens=True))
