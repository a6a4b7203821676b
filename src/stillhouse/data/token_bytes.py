"""What each token of a tokenizer spells, in bytes, and how a tokenizer spells given bytes.

Bytes are the one thing that tokenizers have in common: a piece of a byte-level tokenizer may be half a
character, which no offset in characters can say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from stillhouse.errors import ModelError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Example:
        >>> spelling = TokenBytes(tokenizer)
        >>> spelling.pieces([40, 716]), spelling.encode(b"I am")
        ([b"I", b" am"], [40, 716])
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read the vocabulary.

        Raises:
            ModelError: the tokenizer is of a sort whose tokens cannot be read as bytes.
        """
        self.tokenizer = tokenizer
        parts = _parts(tokenizer)
        self._byte_level = "ByteLevel" in parts
        if not self._byte_level and not parts & {"Metaspace", "ByteFallback"}:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokens cannot be read as bytes (decoder: "
                f"{', '.join(sorted(parts)) or 'none'}), which comparing tokenizers needs. Byte-level and "
                "SentencePiece tokenizers can."
            )
        vocabulary = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()}
        special |= {i for i, token in added.items() if token.special}
        self.special: dict[str, int] = {piece: i for piece, i in vocabulary.items() if i in special}
        """The special tokens by name."""
        self.table: dict[int, bytes] = {}
        """The bytes of each token; special tokens spell nothing and are not in it."""
        for piece, index in vocabulary.items():
            if index in special:
                continue
            spelt = str(added[index].content).encode() if index in added else self._bytes(piece)
            if spelt:
                self.table[index] = spelt
        # "a" comes back as " a" from tokenizers that put a space in front of every text.
        self._prefix = b" " if self._spell("a") == b" a" else b""

    def __len__(self) -> int:
        """How many ids there are, special ones included."""
        return len(self.tokenizer)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The token of each spelling; of several an ordinary one, not the fallback for a byte."""
        pieces = self.tokenizer.convert_ids_to_tokens(list(self.table))
        ordered = sorted(zip(self.table.items(), pieces, strict=True), key=lambda item: item[1][:3] != "<0x")
        return {spelt: index for (index, spelt), _ in ordered}

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """What each token of a text spells; nothing for special tokens.

        The space that some tokenizers put in front of every text is not part of it.
        """
        found = [self.table.get(index, b"") for index in ids]
        first = next((place for place, piece in enumerate(found) if piece), None)
        if first is not None and self._prefix and found[first].startswith(self._prefix):
            found[first] = found[first][len(self._prefix) :]
        return found

    def encode(self, text: bytes) -> list[int] | None:
        """The token ids of a text of any bytes; None if the tokenizer cannot spell it exactly.

        What is valid UTF-8 is tokenised as text, each other byte as a token of its own.
        """
        ids: list[int] = []
        for valid, run in _runs(text):
            if valid and not (ids and self._prefix):
                ids += self.tokenizer(run.decode(), add_special_tokens=False, verbose=False)["input_ids"]
            elif valid:
                return None  # the tokenizer would put a space into the middle of the text
            else:
                single = [self.ids.get(run[at : at + 1]) for at in range(len(run))]
                if None in single:
                    return None
                ids += [index for index in single if index is not None]
        return ids if b"".join(self.pieces(ids)) == text else None

    def _spell(self, text: str) -> bytes:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return b"".join(self.table.get(index, b"") for index in ids)

    def _bytes(self, piece: str) -> bytes:
        if self._byte_level:
            return b"".join(map(_bytes_of, piece))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def _parts(tokenizer: Any) -> set[str]:
    """The types of decoder inside a tokenizer of the `tokenizers` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: is not a tokenizer of the tokenizers library (tokenizer.json), so "
            "its tokens cannot be read as bytes, which comparing tokenizers needs."
        )
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    nested = decoder.get("decoders", [decoder])
    return {str(part["type"]) for part in nested if "type" in part}


@cache
def _bytes_of(char: str) -> bytes:
    """The byte behind a character of a byte-level vocabulary (GPT-2's table), or the character itself.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from 256 on.
    """
    code = ord(char)
    if _printable(code):
        return bytes([code])
    others = [value for value in range(256) if not _printable(value)]
    return bytes([others[code - 256]]) if 256 <= code < 256 + len(others) else char.encode()


def _printable(code: int) -> bool:
    return 0x21 <= code <= 0x7E or 0xA1 <= code <= 0xAC or 0xAE <= code <= 0xFF


def _runs(text: bytes) -> Iterator[tuple[bool, bytes]]:
    """The text in pieces that are valid UTF-8 as a whole or not at all, in order."""
    while text:
        try:
            text.decode()
            yield True, text
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield True, text[: error.start]
            yield False, text[error.start : error.end]
            text = text[error.end :]
