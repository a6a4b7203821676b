"""A tokenizer as llama.cpp has it: tokens with their kinds, merges or scores, special tokens, chat template.

How a text is split before merging is read from the tokenizer's own rules, not from a list of known
tokenizers: one that was trained or trimmed here is written as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.runs.export.llama_cpp.families import OTHERS

_NO_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", _NO_WORD + _SPACES), ("bytes", False)): "qwen2",
    (("split", _NO_WORD + "{1,3}" + _SPACES), ("bytes", False)): "llama-bpe",
}
"""The rules of a tokenizer's splitting -> llama.cpp's name of the same."""
IGNORE_MERGES = ("llama-bpe",)
"""Where llama.cpp takes a piece that is a token as a whole, without merging."""
METASPACE = "▁"


def write_vocabulary(writer: Any, tokenizer: Any, ends: Sequence[int], rows: int) -> None:
    """Write everything of a tokenizer into a GGUF file.

    Args:
        writer: a `GGUFWriter`.
        tokenizer: a fast tokenizer.
        ends: the ids that end a response.
        rows: of the model's embeddings; those without a token are written as unused.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(f"gguf: a tokenizer of type {model['type']} is not written here, only BPE. {OTHERS}")
    if len(tokenizer) > rows:
        raise ModelError(
            f"gguf: the tokenizer has {len(tokenizer):,} tokens, the model {rows:,} rows for them."
        )
    tokens, kinds = _tokens(tokenizer, rows, model)
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, backend, tokens)
    else:
        _write_byte_level(writer, backend)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, rows: int, model: Any) -> tuple[list[str], list[int]]:
    """All tokens by id, each with its kind."""
    from gguf import TokenType

    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(rows):
        token = by_id.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in by_id else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        if token == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        elif model.get("byte_fallback") and kind == TokenType.NORMAL and _is_byte(token):
            kind = TokenType.BYTE
        tokens.append(token)
        kinds.append(int(kind))
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pairs(model: Any) -> list[tuple[str, str]]:
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(first, second) for first, second in pairs]


def _write_byte_level(writer: Any, backend: Any) -> None:
    """BPE over bytes, as GPT-2, Llama 3, Qwen and SmolLM have it."""
    model = backend["model"]
    splits, problems = _splits(backend["pre_tokenizer"]), list[str]()
    name = SPLITS.get(splits)
    if name is None:
        problems.append(f"splits text by a rule that llama.cpp has no name for here ({splits})")
    normalizer = (backend.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        problems.append(f"normalises text by {normalizer}")
    if name is not None and bool(model.get("ignore_merges")) != (name in IGNORE_MERGES):
        problems.append("takes whole words before merges where llama.cpp does not, or the other way round")
    if problems:
        raise ModelError(f"gguf: the tokenizer {' and '.join(problems)}. {OTHERS}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([f"{first} {second}" for first, second in _pairs(model)])


def _splits(rules: Any) -> tuple[tuple[str, Any], ...]:
    """The rules of a pre-tokenizer, in order."""
    if rules is None:
        return ()
    if rules["type"] == "Sequence":
        return tuple(split for rule in rules["pretokenizers"] for split in _splits(rule))
    if rules["type"] == "ByteLevel" and not rules.get("add_prefix_space"):
        return (("bytes", rules.get("use_regex", True)),)
    if rules["type"] == "Digits":
        return (("digits", rules["individual_digits"]),)
    if rules["type"] == "Split" and rules["behavior"] == "Isolated" and not rules["invert"]:
        return (("split", rules["pattern"].get("Regex") or rules["pattern"].get("String")),)
    return ((rules["type"], json.dumps(rules, sort_keys=True)),)


def _write_sentencepiece(writer: Any, backend: Any, tokens: Sequence[str]) -> None:
    """BPE over characters with bytes as a last resort, as Llama 2 and Mistral have it.

    llama.cpp merges the neighbours whose token has the highest score: a token's is minus the rank of the
    first merge that makes it.
    """
    merges = _pairs(backend["model"])
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_add_space_prefix(_begins_with_space(backend))


def _begins_with_space(backend: Any) -> bool:
    """Whether a text gets a space before its first word.

    Raises:
        ModelError: spaces are written in another way than SentencePiece's.
    """
    rules = [backend.get("normalizer"), backend.get("pre_tokenizer")]
    parts = [
        part for rule in rules if rule for part in rule.get("normalizers", rule.get("pretokenizers", [rule]))
    ]
    found = {part["type"] for part in parts}
    spaces = any(
        (part["type"] == "Replace" and part["content"] == METASPACE and part["pattern"] == {"String": " "})
        or part["type"] == "Metaspace"
        for part in parts
    )
    if not spaces or found - {"Prepend", "Replace", "Metaspace"}:
        raise ModelError(
            f"gguf: the tokenizer prepares text by {', '.join(sorted(found)) or 'nothing'}. {OTHERS}"
        )
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _write_special(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    """Special tokens by their roles; further ends of a response as ends of a turn and of a message."""
    for role in ("bos", "unk", "pad"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(int(index))
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    others = [end for end in ends if end != tokenizer.eos_token_id]
    if len(others) > 2:
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(others)))
        raise ModelError(
            f"gguf: a file has room for three tokens that end a response; beside the first: {names}."
        )
    for add, end in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(int(end))
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
