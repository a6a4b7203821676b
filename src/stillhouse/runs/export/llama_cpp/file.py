"""Writes the GGUF file of a student, and asks llama.cpp for its answer."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillhouse import __version__
from stillhouse.errors import EngineError
from stillhouse.runs.export.llama_cpp.families import family_of, tensors_of
from stillhouse.runs.export.llama_cpp.vocabulary import write_vocabulary
from stillhouse.runs.export.packages import require_packages
from stillhouse.runs.export.student import Example, FinishedStudent

TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""dtype -> llama.cpp's name of it for a tensor and for a file."""


def require_gguf(smoke_test: bool) -> None:
    """Make sure that GGUF files can be written, and asked.

    Raises:
        EnvironmentFault: a package is missing.
    """
    require_packages("gguf", ("gguf",), "xllamacpp", smoke_test)


def write_file(student: FinishedStudent, dtype: str, path: Path) -> None:
    """Write weights, numbers and tokenizer of a student.

    Norms, biases and positions stay float32, as llama.cpp has them.

    Raises:
        ModelError: llama.cpp cannot carry the model or its tokenizer.
    """
    import gguf

    family = family_of(student.model)
    tensor_type, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    config = student.model.config
    writer.add_type("model")
    writer.add_name(student.name)
    writer.add_description(f"Exported by Stillhouse {__version__}")
    if student.licence:
        writer.add_license(student.licence)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = student.model.get_input_embeddings().weight.shape[0]
    writer.add_vocab_size(rows)
    family.write_numbers(writer, config)
    write_vocabulary(writer, student.tokenizer, student.ends, rows)
    for name, tensor in tensors_of(student.model, family):
        data = tensor.float().contiguous().numpy()
        whole = data.ndim <= 1 or name.endswith("_norm.weight") or name.startswith("position_embd")
        kind = gguf.GGMLQuantizationType["F32" if whole else tensor_type]
        if kind == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # a block has 32 weights
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer_of(path: Path, example: Example) -> str:
    """llama.cpp's greedy answer to a prompt.

    Raises:
        EngineError: the file does not load, or the prompt has other ids there.
    """
    with serving(path, len(example.token_ids) + example.max_tokens) as post:
        asked = {"content": example.prompt, "add_special": example.special_tokens, "parse_special": True}
        ids = post("/tokenize", asked)["tokens"]
        if tuple(ids) != example.token_ids:
            raise EngineError(
                f"{path.name}: llama.cpp reads the prompt as other tokens ({ids[:8]} ... instead of "
                f"{list(example.token_ids[:8])} ...)"
            )
        options = {"prompt": list(example.token_ids), "temperature": 0, "n_predict": example.max_tokens}
        return str(post("/completion", options)["content"])


@contextlib.contextmanager
def serving(path: Path, context: int) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama.cpp's server in this process: a function that posts to one of its paths.

    Cache and attention are in float32; by default they round to 16 bits, which may choose another token.

    Raises:
        EngineError: the file does not load.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.hostnames, settings.port, settings.verbosity = ["127.0.0.1"], 0, -1
    settings.n_ctx, settings.n_parallel, settings.warmup = context, 1, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise EngineError(f"{path.name}: llama.cpp does not load it ({error})") from error

    def post(place: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + place, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    with urllib.request.urlopen(server.listening_address + "/slots") as reply:
        reply.read()  # its loop runs: a server that ends before its loop has begun waits for it for ever
    yield post
