"""Loading tokenizers, and whether student and teacher have the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.models.config import ModelConfig
from stillhouse.models.paths import foreign_files, model_files, path_hint


def load_tokenizer(config: ModelConfig, fallback: ModelConfig | None = None) -> Any:
    """The tokenizer of a model; without a pad token, its end-of-sequence token pads.

    Args:
        config: the model.
        fallback: the teacher, whose tokenizer a student without one gets.

    Raises:
        ModelError: there is no tokenizer at the path, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    owner = config if (config.path or config.tokenizer or fallback is None) else fallback
    path = config.tokenizer or owner.path
    if path is None:
        raise ModelError("student.tokenizer: needed with from_config if there is no teacher to take it from.")
    options: dict[str, Any] = {"trust_remote_code": owner.trust_remote_code}
    if owner.gguf_file and not config.tokenizer:
        options["gguf_file"] = owner.gguf_file
    folder = _tokenizer_folder(path)
    hint = path_hint(path, options.get("gguf_file"))
    with foreign_files(f"{path}: no tokenizer could be loaded from there", hint):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return with_padding(tokenizer, path)


def with_padding(tokenizer: Any, name: str) -> Any:
    """The tokenizer, told to pad with its end of sequence where it has nothing of its own.

    Args:
        tokenizer: of transformers.
        name: what a message calls it.

    Raises:
        ModelError: it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no end-of-sequence token, so no response could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_ends(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens that a model's generation config names; reads no weights.

    Ids of ordinary tokens are left out: the defaults of an architecture's config, which a tokenizer of
    another size never meant.
    """
    from transformers import AutoConfig, GenerationConfig

    if config.path is None or config.gguf_file is not None:
        return ()
    folder = model_files(config.path).model
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):
        try:
            found = getattr(
                AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code),
                "eos_token_id",
                None,
            )
        except (OSError, ValueError, KeyError):  # told where the model is loaded
            found = None
    return control_ends(found, tokenizer)


def control_ends(named: int | list[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens that a generation config names, without ids of ordinary tokens."""
    ids = named if isinstance(named, list) else [] if named is None else [named]
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return tuple(int(one) for one in ids if one in control)


def shared_ids(student: Any, teacher: Any) -> int | None:
    """How many ids, from the first, are the same tokens in both vocabularies.

    None unless one vocabulary is the other plus added tokens behind all of its ids, so that both cut a text
    into the same tokens.
    """
    smaller, larger = sorted((student, teacher), key=len)
    few, many = smaller.get_vocab(), larger.get_vocab()
    more = many.keys() - few.keys()
    if any(many.get(token) != index for token, index in few.items()):
        return None
    count = len(smaller)
    added = larger.get_added_vocab()
    return count if all(token in added and many[token] >= count for token in more) else None


def _tokenizer_folder(path: str) -> str:
    """Where the tokenizer of a model is: with an adapter, or else with the model that it belongs to."""
    files = model_files(path)
    if files.adapter is None or (Path(files.adapter) / "tokenizer_config.json").is_file():
        return files.adapter or files.model
    return files.model


def check_same_tokenizer(student: Any, teacher: Any) -> int:
    """The vocab size that student and teacher share.

    Heads of different height are fine: rows beyond the vocab size are padding, which the loss leaves out.

    Raises:
        ModelError: an id stands for different tokens, so a loss over token ids would be silently wrong.
    """
    difference = tokenizer_difference(student, teacher)
    if difference is None:
        return len(student.get_vocab())
    raise ModelError(
        f"student and teacher have different tokenizers: {difference}. A loss over token ids would compare "
        "different tokens. Use objective uld, span or transport, or a teacher with the student's tokenizer; "
        "a student of the teacher's family, or one that starts from the teacher (student.from_teacher), has "
        "it."
    )


def tokenizer_difference(student: Any, teacher: Any) -> str | None:
    """How two vocabularies differ, for messages; None if every id is the same token in both."""
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return None
    differing = [token for token, index in student_vocab.items() if teacher_vocab.get(token) != index]
    extra = len(teacher_vocab.keys() - student_vocab.keys())
    differences = []
    if differing:
        examples = ", ".join(
            f"{token!r} is {student_vocab[token]} for the student, {teacher_vocab.get(token)} for the teacher"
            for token in differing[:3]
        )
        differences.append(
            f"{len(differing):,} of the student's {len(student_vocab):,} tokens have another id or none with "
            f"the teacher ({examples})"
        )
    if extra:
        differences.append(
            f"{extra:,} of the teacher's {len(teacher_vocab):,} tokens are none of the student's"
        )
    return "; ".join(differences)


def vocab_digest(vocab: Mapping[str, int]) -> str:
    """16 hexadecimal digits that change with the id of any token."""
    rows = sorted((index, token) for token, index in vocab.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
