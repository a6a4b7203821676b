"""The folder of a GGUF export: the file, a card that says how llama.cpp is asked, and the smoke test."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from stillhouse.data.templates import Chat, Template
from stillhouse.errors import EngineError
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.description import write_description
from stillhouse.runs.export.llama_cpp.file import TYPES, answer_of, require_gguf, write_file
from stillhouse.runs.export.safetensors import copy_kept, facts
from stillhouse.runs.export.smoke_test import SmokeTest, write_smoke_test
from stillhouse.runs.export.student import FinishedStudent

logger = logging.getLogger("stillhouse")

_IMPORTS = """\
import json
import urllib.request

import xllamacpp"""
_CODE = """\
TOKEN_IDS = {token_ids}


def post(path, body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {{"Content-Type": "application/json"}}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


settings = xllamacpp.CommonParams()
settings.model.path = str(folder / {file})
settings.hostnames, settings.port, settings.verbosity = ["127.0.0.1"], 0, -1
settings.n_ctx, settings.n_parallel, settings.warmup = len(TOKEN_IDS) + MAX_TOKENS, 1, False
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
urllib.request.urlopen(server.listening_address + "/slots").read()  # ended before its loop runs, it hangs
asked = {{"content": PROMPT, "add_special": {special}, "parse_special": True}}
if (ids := post("/tokenize", asked)["tokens"]) != TOKEN_IDS:
    sys.exit(f"smoke test failed: the prompt has the ids {{ids}}, expected {{TOKEN_IDS}}")
options = {{"prompt": TOKEN_IDS, "temperature": 0, "n_predict": MAX_TOKENS}}
answer = post("/completion", options)["content"].strip()"""
_USAGE = """\
```console
llama-server -m {file} --port 8080 --jinja{arguments}
curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"messages": {messages}, "temperature": 0}}'
```

`pip install xllamacpp` has the same server in Python, as `smoke_test.py` uses it. {prompts}"""


def write_gguf(student: FinishedStudent, config: ExportConfig, folder: Path) -> None:
    """Write file, card and smoke test; the answer that is recorded is llama.cpp's own.

    Raises:
        StillhouseError: llama.cpp cannot carry the student, or answers otherwise than transformers.
    """
    require_gguf(config.smoke_test)
    name = re.sub(r"[^\w.-]+", "-", student.name)
    path = folder / f"{name}-{TYPES[student.dtype][0]}.gguf"
    write_file(student, student.dtype, path)
    example, beside = replace(student.example, answer=student.example.answer.strip()), "not compared"
    if config.smoke_test:
        answer = answer_of(path, example).strip()
        beside = compared(example.answer, answer, student.dtype)
        example = replace(example, answer=answer)
    code = _CODE.format(
        token_ids=list(example.token_ids), file=repr(path.name), special=example.special_tokens
    )
    write_smoke_test(folder, SmokeTest("xllamacpp (llama.cpp in Python)", _IMPORTS, code), example)
    copy_kept(student.folder, folder, ("stillhouse.json", "LICEN[CS]E*", "NOTICE*"))
    arguments, prompts = _asked(student.encoder.template)
    system = getattr(student.encoder.template, "system", None)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "..."})
    usage = _USAGE.format(
        file=path.name,
        arguments=arguments,
        messages=json.dumps(messages, ensure_ascii=False),
        prompts=prompts,
    )
    found = facts(student, f"`{path.name}`, for llama.cpp and what builds on it")
    write_description(folder, student, usage, found | {"Beside transformers": beside}, library="gguf")


def compared(expected: str, answer: str, dtype: str) -> str:
    """How llama.cpp's text compares with transformers' of the same weights in float32, in words.

    Raises:
        EngineError: it is another text, and not because of fewer bits.
    """
    if answer == expected:
        return f"the smoke test's text is transformers' word for word ({len(answer.split())} words)"
    pairs = zip(answer.split(), expected.split(), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if dtype == "float32" or not same:
        raise EngineError(
            f"llama.cpp answers otherwise than transformers, so nothing was exported: {answer[:80]!r}, and "
            f"transformers {expected[:80]!r}. Two tokens of almost equal probability are a harmless cause: "
            "try another --prompt."
        )
    logger.warning("in %s llama.cpp's text leaves transformers' after %d words", dtype, same)
    return (
        f"the first {same} words of the smoke test's text are transformers'; then rounding to {dtype}, of "
        "weights and of what llama.cpp multiplies them with, has chosen another token"
    )


def _asked(template: Template) -> tuple[str, str]:
    """Arguments of llama-server, and a sentence, with which a prompt is that of the training."""
    if not isinstance(template, Chat):
        return "", (
            f"The student was trained on the template `{template.kind}`. The file's chat template writes it "
            "for one user turn; a system turn is refused. To `/completion`, send the prompt as "
            "`smoke_test.py` has it."
        )
    said = ["The file has the chat template of the training."]
    arguments = f" --chat-template-kwargs '{json.dumps(template.options)}'" if template.options else ""
    if template.system:
        said.append("Send the system turn above, as the training did.")
    if template.empty_reasoning == "prompt":
        said.append(
            "The training ended each prompt with empty reasoning (`<think></think>`), which the chat "
            "template adds only where one of its options says so."
        )
    return arguments, " ".join(said)
