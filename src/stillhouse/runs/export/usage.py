"""How an exported student is called from Python: code for its card, with the answer that it gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.types import Prompt
from stillhouse.data.templates import Template
from stillhouse.models import image_reader, unwrap
from stillhouse.models.readers import auto_class
from stillhouse.runs.build import Parts

_MAX_NEW_TOKENS = 64
_HOLE = "\ufdd0"
"""Where the tokens of an image stood in a text."""
_CODE = """\
from transformers import {auto_class}, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, dtype="{dtype}")
{prompt}
output = model.generate(**inputs, do_sample=False, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""
_CODE_WITH_IMAGES = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="{dtype}")
images = [Image.open(name) for name in {names}]  # those of {row}
inputs = processor(text=[{text}], images=[images], return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, do_sample=False, max_new_tokens={max_new_tokens})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""
_FROM_TURNS = """\
turns = {turns}
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True{options}
)"""
_FROM_TEXT = """\
prompt = {text}
inputs = tokenizer(prompt, return_tensors="pt"{options})"""


@dataclass(frozen=True, slots=True)
class UsageExample:
    """Code that asks the student one question of its data, and what it prints.

    Example: `UsageExample(code="from transformers import ...", answer="Fig")`
    """

    code: str
    answer: str


def example_usage(parts: Parts, tokenizer: Any) -> UsageExample | None:
    """The student asked with transformers alone, greedily; None if no prompt of the data can be written so.

    The code is made for the first prompt, of the held-out ones where there are any, whose token ids it gives.

    Args:
        parts: the run, with the student as it is exported.
        tokenizer: the one that is exported with it.
    """
    prompts = (*parts.data.valid, *parts.data.train)
    dtype = str(next(parts.student.parameters()).dtype).removeprefix("torch.")
    for prompt in prompts[:20]:
        if prompt.images:
            if (found := _with_images(prompt, parts, dtype)) is not None:
                return found
            continue
        asked = _as_code(prompt, tokenizer, parts.config.data.template)
        if asked is not None:
            auto = auto_class(unwrap(parts.student).config).__name__
            code = _CODE.format(auto_class=auto, dtype=dtype, prompt=asked, max_new_tokens=_MAX_NEW_TOKENS)
            ids = torch.tensor([prompt.token_ids])
            return UsageExample(
                code, _answer({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, parts)
            )
    return None


def _with_images(prompt: Prompt, parts: Parts, dtype: str) -> UsageExample | None:
    """A prompt with images, through the processor; None if it does not give the prompt's token ids."""
    reader = image_reader(parts.student)
    assert reader is not None
    text = parts.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    for shown in reader.expand(prompt.images):
        before, _, after = text.partition(shown)
        text = f"{before}{_HOLE}{after}"
    text = text.replace(_HOLE, reader.image_token)
    images = [[one.open() for one in prompt.images]]
    inputs = reader.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    if inputs["input_ids"][0].tolist() != list(prompt.token_ids):
        return None
    names = [f"image_{number}.png" for number in range(1, 1 + len(prompt.images))]
    code = _CODE_WITH_IMAGES.format(
        dtype=dtype,
        names=json.dumps(names),
        row=prompt.id,
        text=json.dumps(text, ensure_ascii=False),
        max_new_tokens=_MAX_NEW_TOKENS,
    )
    return UsageExample(code, _answer(inputs, parts))


def _as_code(prompt: Prompt, tokenizer: Any, template: Template) -> str | None:
    """Lines that make `inputs` with exactly the token ids of a prompt."""
    ids = list(prompt.token_ids)
    options = getattr(template, "options", {})
    if (turns := _turns(prompt)) is not None and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            more = "".join(f", {name}={value!r}" for name, value in options.items())
            return _FROM_TURNS.format(turns=json.dumps(turns, ensure_ascii=False, indent=4), options=more)
    for special in (True, False):
        if tokenizer(prompt.text, add_special_tokens=special)["input_ids"] == ids:
            more = "" if special else ", add_special_tokens=False"
            return _FROM_TEXT.format(text=json.dumps(prompt.text, ensure_ascii=False), options=more)
    return None


def _turns(prompt: Prompt) -> list[Any] | None:
    """The prompt as turns of a conversation; None if it has an input apart or tools."""
    fields = prompt.fields
    if not fields or fields.keys() - {"prompt"}:
        return None
    asked = fields["prompt"]
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)


@torch.no_grad()
def _answer(inputs: Mapping[str, Tensor], parts: Parts) -> str:
    """What the code prints, from the student in memory."""
    model: Any = unwrap(parts.student)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    output = model.generate(
        **{name: value.to(device) for name, value in inputs.items()},
        do_sample=False,
        max_new_tokens=_MAX_NEW_TOKENS,
        eos_token_id=list(parts.facts.eos_ids),
        pad_token_id=parts.facts.pad_id,
    )
    model.train(training)
    start = inputs["input_ids"].shape[1]
    answer: str = parts.tokenizer.decode(output[0, start:], skip_special_tokens=True)
    return answer.strip()
