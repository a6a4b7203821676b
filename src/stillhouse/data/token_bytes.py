"""The bytes of each token of a tokenizer, and the tokenization of given bytes.

Bytes are what all tokenizers have in common: a token of a byte-level tokenizer may be half a character, which
character offsets cannot express.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from stillhouse.data.text_tokens import SPACE, TextTokenizer, UnspellableText
from stillhouse.errors import ModelError


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Example:
        >>> token_bytes = TokenBytes(tokenizer)
        >>> token_bytes.pieces([40, 716]), token_bytes.encode(b"I am")
        ([b"I", b" am"], [40, 716])
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read the vocabulary.

        Raises:
            ModelError: it is neither byte-level nor SentencePiece, so its tokens have no exact bytes.
        """
        self.tokenizer = tokenizer
        decoders = _decoder_types(tokenizer)
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and not decoders & {"Metaspace", "ByteFallback"}:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokens cannot be read as bytes (decoder: "
                f"{', '.join(sorted(decoders)) or 'none'}), which comparing tokenizers needs. Byte-level and "
                "SentencePiece tokenizers can."
            )
        vocab = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()}
        special |= {i for i, token in added.items() if token.special}
        self.special_ids: dict[str, int] = {piece: i for piece, i in vocab.items() if i in special}
        """The ids of special tokens by name."""
        self.bytes_of_id: dict[int, bytes] = {}
        """The bytes of each token, without special tokens, which have none."""
        for piece, index in vocab.items():
            if index in special:
                continue
            content = str(added[index].content).encode() if index in added else self._bytes(piece)
            if content:
                self.bytes_of_id[index] = content
        self.texts = TextTokenizer(tokenizer)

    def __len__(self) -> int:
        """Vocab size, special tokens included."""
        return len(self.tokenizer)

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The token with given bytes; of several, a regular token rather than a byte-fallback token."""
        pieces = self.tokenizer.convert_ids_to_tokens(list(self.bytes_of_id))
        ordered = sorted(
            zip(self.bytes_of_id.items(), pieces, strict=True), key=lambda item: item[1][:3] != "<0x"
        )
        return {content: index for (index, content), _ in ordered}

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token of a response; empty for special tokens."""
        return [self.bytes_of_id.get(index, b"") for index in ids]

    def encode(self, text: bytes) -> list[int] | None:
        """The ids of arbitrary bytes as a response; None if the tokenizer cannot represent them exactly.

        Valid UTF-8 is tokenised as text that follows a prompt, every other byte as a byte token.
        """
        ids: list[int] = []
        for valid, run in _runs(text):
            if valid:
                try:
                    ids += self.texts.continuation(self.texts.guard(run.decode()))
                except UnspellableText:
                    return None
            else:
                single = [self.id_of_bytes.get(run[at : at + 1]) for at in range(len(run))]
                if None in single:
                    return None
                ids += [index for index in single if index is not None]
        return ids if b"".join(self.pieces(ids)) == text else None

    def _bytes(self, piece: str) -> bytes:
        if self._byte_level:
            return b"".join(map(_bytes_of, piece))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def _decoder_types(tokenizer: Any) -> set[str]:
    """The types of the decoders in a tokenizer of the `tokenizers` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: is not a tokenizer of the tokenizers library (tokenizer.json), so "
            "its tokens cannot be read as bytes, which comparing tokenizers needs."
        )
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    nested = decoder.get("decoders", [decoder])
    return {str(one["type"]) for one in nested if "type" in one}


@cache
def _bytes_of(char: str) -> bytes:
    """The byte behind a character of a byte-level vocabulary (GPT-2's table), or the character itself.

    Printable Latin-1 characters are their own bytes; the others, in order, are the characters from 256 up.
    """
    code = ord(char)
    if _printable(code):
        return bytes([code])
    others = [value for value in range(256) if not _printable(value)]
    return bytes([others[code - 256]]) if 256 <= code < 256 + len(others) else char.encode()


def _printable(code: int) -> bool:
    return 0x21 <= code <= 0x7E or 0xA1 <= code <= 0xAC or 0xAE <= code <= 0xFF


def _runs(text: bytes) -> Iterator[tuple[bool, bytes]]:
    """The text split into runs of valid UTF-8 (True) and of invalid bytes (False), in order."""
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
