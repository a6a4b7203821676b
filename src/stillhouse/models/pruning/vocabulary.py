"""A tokenizer, and a model, of fewer tokens: those that some data use.

The text that uses these tokens is cut into the same tokens as before: kept are the tokens that were used, all
that they can be merged from with the merges between them, every byte, and every added token. Of a merge list
only what was never applied to that text goes, so each step of its encoding stays the first that applies; the
best segmentation of a unigram model and the longest match of WordPiece stay what they were, because they are
kept and nothing is added. Any other text is still encoded, in more pieces.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.models.pruning.sizes import FIELD

Numbers = tuple[int, ...]
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
KNOWN = ("BPE", "Unigram", "WordPiece", "WordLevel")
"""Kinds of tokenizer models that can be trimmed."""
OWN_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def trimmed_tokenizer(tokenizer: Any, used: Collection[int]) -> tuple[Any, Numbers]:
    """The same tokenizer with only what `used` needs, and the ids that its tokens had, in order.

    Token number i of the new tokenizer is token number `ids[i]` of the old one.

    Args:
        tokenizer: a fast tokenizer.
        used: the ids that some data use.

    Raises:
        ModelError: the tokenizer is none of the tokenizers library, or of another kind than these know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{FIELD}.vocabulary: {type(tokenizer).__name__} is no tokenizer of the tokenizers library, so "
            "it cannot be trimmed. Use vocabulary: all."
        )
    tree = json.loads(backend.to_str())
    kind = tree["model"].get("type") or "BPE"
    if kind not in KNOWN:
        raise ModelError(
            f"{FIELD}.vocabulary: a {kind} tokenizer cannot be trimmed; can be: {', '.join(KNOWN)}. "
            "Use vocabulary: all."
        )
    added = {int(one["id"]) for one in tree.get("added_tokens") or ()}
    kept = tuple(
        sorted(added | _needed(tree["model"], frozenset(used), byte_level='"ByteLevel"' in backend.to_str()))
    )
    new_ids = {old: new for new, old in enumerate(kept)}
    _trim(tree, new_ids)
    return _loaded(tokenizer, tree, new_ids), kept


def _needed(model: Mapping[str, Any], used: frozenset[int], byte_level: bool) -> set[int]:
    """The ids of a tokenizer's own vocabulary that stay."""
    ids = _ids(model)
    names = {number: token for token, number in ids.items()}
    queue = [names[number] for number in used if number in names]
    for token in ids:
        single = len(token) == 1 and (byte_level or token.isascii() or token == "▁")
        if single or BYTE.fullmatch(token) or token == model.get("unk_token"):
            queue.append(token)
    if isinstance(model.get("unk_id"), int):
        queue.append(names[model["unk_id"]])
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in _merges(model):
        parts.setdefault(_merged(model, left, right), []).append((left, right))
    kept: set[str] = set()
    while queue:
        token = queue.pop()
        if token not in kept:
            kept.add(token)
            queue += [part for pair in parts.get(token, ()) for part in pair]
    return {ids[token] for token in kept}


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece: number for number, (piece, _) in enumerate(vocab)}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in model.get("merges") or ())
    return [(left, right) for left, right in pairs]


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _trim(tree: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Take out of a tokenizer's JSON what is not kept, and number the rest anew."""
    model = tree["model"]
    ids = _ids(model)
    kept = {token for token, number in ids.items() if number in new_ids}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new_ids[number] for token, number in ids.items() if token in kept}
    else:
        model["vocab"] = [one for number, one in enumerate(model["vocab"]) if number in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"]) if isinstance(model["unk_id"], int) else None
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in _merges(model)
            if {left, right, _merged(model, left, right)} <= kept
        ]
    for one in tree.get("added_tokens") or ():
        one["id"] = new_ids[int(one["id"])]
    tree["post_processor"] = _renumbered(tree.get("post_processor"), new_ids)
    if isinstance(tree.get("padding"), dict):
        tree["padding"]["pad_id"] = new_ids.get(tree["padding"]["pad_id"], 0)


def _renumbered(node: Any, new_ids: Mapping[int, int]) -> Any:
    """The ids of special tokens in a post-processor: `"ids": [1]` of templates, `"sep": ["</s>", 2]`."""
    if isinstance(node, dict):
        return {
            name: [new_ids[one] for one in value] if name == "ids" else _renumbered(value, new_ids)
            for name, value in node.items()
        }
    if isinstance(node, list):
        if len(node) == 2 and isinstance(node[0], str) and isinstance(node[1], int):
            return [node[0], new_ids[node[1]]]
        return [_renumbered(one, new_ids) for one in node]
    return node


def _loaded(tokenizer: Any, tree: dict[str, Any], new_ids: Mapping[int, int]) -> Any:
    """A tokenizer of the same class over other JSON."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="stillhouse-tokenizer-") as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():  # files of slow tokenizers would win over the trimmed one
            if path.is_file() and path.name not in OWN_FILES:
                path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            known = settings["added_tokens_decoder"].items()
            settings["added_tokens_decoder"] = {str(new_ids[int(old)]): one for old, one in known}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        made = AutoTokenizer.from_pretrained(folder)
    made.name_or_path = tokenizer.name_or_path
    return made


def check_encodes_alike(trimmed: Any, whole: Any, kept: Sequence[int], texts: Sequence[str]) -> None:
    """Make sure that texts are the same tokens in both.

    Raises:
        ModelError: naming the first that is not.
    """
    for text in texts:
        before = whole(text, add_special_tokens=False)["input_ids"]
        after = [kept[one] for one in trimmed(text, add_special_tokens=False)["input_ids"]]
        if before != after:
            raise ModelError(
                f"{FIELD}.vocabulary: the trimmed tokenizer cuts {text[:60]!r} into other tokens than the "
                "whole one, so it cannot take its place. Use vocabulary: all."
            )


def renumber_special_tokens(configs: Sequence[Any], kept: Sequence[int]) -> None:
    """Name the special tokens of configurations by their new numbers, in place.

    Ids of tokens that are gone were defaults of the architecture, and become None.

    Args:
        configs: of a model and of its generation.
        kept: the ids that stay.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    for owner in {id(one): one for one in configs if one is not None}.values():
        for name, value in owner.to_dict().items():
            if not name.endswith("token_id") or value is None:
                continue
            several = isinstance(value, list)
            found = [new_ids[one] for one in (value if several else [value]) if one in new_ids]
            setattr(owner, name, found if several else next(iter(found), None))
