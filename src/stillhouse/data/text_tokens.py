"""Texts of rows as token ids and back, exactly: no text becomes a control token, no space is gained or lost.

A control token is a token that the model's makers added to steer it, such as the end of a turn. The template
writes them; a row that spells one ("write <|im_end|> to stop") must not. `TextTokenizer.guard` puts a mark
into every such text before the template renders the row, and `ids` reads marked text in ordinary tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from stillhouse.errors import DataError

GUARD = "\U0010ffff\U0010fffe"
"""Stands inside a text that spells a control token: two code points that Unicode keeps from being text."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's character for a space."""

_BRACKETED = re.compile(r"[<\[{|｜].*[>\]}|｜]", re.DOTALL)
_HTML = re.compile(
    r"</?(a|b|blockquote|body|br|caption|code|div|em|h[1-6]|head|html|i|li|ol|p|pre|s|span|strong|sub|sup|table|"
    r"tbody|td|tfoot|th|thead|tr|u|ul)>"
)
_ANCHORS = ("a", "\n", ":", ">", " a")
"""Texts after which a text is tokenised as it would be inside of a longer one."""


class UnspellableText(DataError):
    """A row's text cannot be written in ordinary tokens."""


def unguarded(text: str) -> str:
    """The text that `TextTokenizer.guard` marked, as it was."""
    return text.replace(GUARD, "")


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers the model. Added words, runs of spaces and HTML tags are text."""
    content = content.strip().strip(SPACE)
    if special:
        return bool(content)
    return _BRACKETED.fullmatch(content) is not None and _HTML.fullmatch(content) is None


class TextTokenizer:
    """A tokenizer for the texts of rows and templates.

    Example:
        >>> texts = TextTokenizer(tokenizer)
        >>> texts.ids(["<|im_end|>", texts.guard("<|im_end|>")])
        [[151645], [27, 91, 318, 6213, 91, 29]]
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.control: dict[str, int] = {
            str(token.content): index
            for index, token in added.items()
            if is_control(str(token.content), token.special)
        }
        """The id of each control token by its text."""
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.control |= {str(token): int(index) for token, index in special if str(token).strip()}
        self.control_ids = frozenset(self.control.values())
        longest_first = sorted(self.control, key=len, reverse=True)
        self._any_control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._folds = any(token.normalized and index in self.control_ids for index, token in added.items())

    def guard(self, text: str) -> str:
        """The text with a mark inside of each piece that would be read as a control token.

        Raises:
            UnspellableText: no place in it can be marked, because the text becomes a control token only by
                the tokenizer's normalisation, or it has a mark already.
        """
        if GUARD in text:
            raise UnspellableText("holds U+10FFFF and U+10FFFE, which Unicode keeps from being text")
        while (found := self._any_control.search(text)) is not None:
            if len(found.group()) == 1:
                raise UnspellableText(f"holds {found.group()!r}, which is a control token of the tokenizer")
            at = found.start() + len(found.group()) // 2
            text = f"{text[:at]}{GUARD}{text[at:]}"
        if (found := self._any_control.search(self._folded(text))) is not None:
            raise UnspellableText(f"holds text that the tokenizer reads as its control token {found.group()}")
        return text

    def spells_control(self, text: str) -> bool:
        """Whether a text needs `guard`."""
        return GUARD in text or any(map(self._any_control.search, (text, self._folded(text))))

    def _folded(self, text: str) -> str:
        """The text as the tokenizer normalises it, where that comes before the search for control tokens."""
        normalizer = getattr(self._backend, "normalizer", None) if self._folds else None
        return "" if normalizer is None else str(normalizer.normalize_str(text))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, without the special tokens that the tokenizer puts around a text.

        Raises:
            UnspellableText: a guarded text has no ordinary tokens.
        """
        plain = [text for text in texts if GUARD not in text]
        encoded = iter(self._batch(plain) if plain else ())
        return [self._guarded_ids(text) if GUARD in text else next(encoded) for text in texts]

    def continuation(self, text: str) -> list[int]:
        """The ids of a text that follows other text: without the space that SentencePiece puts before a text.

        Raises:
            UnspellableText: the tokenizer joins the text with whatever stands before it.
        """
        if not self.adds_space:
            return self.ids([text])[0]
        for anchor in _ANCHORS:
            before, both = self.ids([anchor, anchor + text])
            if both[: len(before)] == before:
                return both[len(before) :]
        raise UnspellableText(f"the tokenizer cannot read {unguarded(text)!r:.40} after other text")

    def certainly_longer(self, tokens: int) -> int:
        """A number of characters, a million or more, of which no text has as few as so many tokens.

        Four times as many as the longest tokens would take, for what a normaliser leaves out; the cut that is
        made there is far behind the last token that counts.
        """
        return max(1_000_000, 4 * (tokens + 1) * self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def following(self, before: Sequence[str], texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """For each pair, the ids of the text before and those of the text after it.

        Both are tokenised as one text and divided where the first ends. Where a token would reach over that
        border, the first text keeps the ids that it has alone, as a model is given them when it generates,
        and the second is tokenised as a text that follows another.

        Raises:
            UnspellableText: a guarded text has no ordinary tokens.
        """
        both = self.ids([first + second for first, second in zip(before, texts, strict=True)])
        return [
            (first, whole[len(first) :] if whole[: len(first)] == first else self.continuation(text))
            for first, whole, text in zip(self.ids(before), both, texts, strict=True)
        ]

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text, such as the beginning of sequence."""
        plain = list(self._encode("a")["input_ids"])
        whole = list(self.tokenizer("a", verbose=False)["input_ids"])
        at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return whole[:at]

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text, as SentencePiece does."""
        first = self.tokenizer.convert_ids_to_tokens(self._encode("a")["input_ids"][:1])
        return bool(first) and str(first[0])[:1] in (SPACE, "\u0120", " ")

    def _batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts. Where a call of the tokenizer would only pass them on to the library that it
        is made of, without the offsets, masks and checks that the call adds."""
        backend = self._backend if self._passes_on else None
        if backend is None or backend.truncation or backend.padding or backend.encode_special_tokens:
            return [list(ids) for ids in self._encode(texts)["input_ids"]]
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _passes_on(self) -> bool:
        """Whether a call of the tokenizer is that of transformers' common class, with its defaults."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self.tokenizer)
        common = all(
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name)
            for name in ("__call__", "_encode_plus", "set_truncation_and_padding")
        )
        return common and not getattr(self.tokenizer, "split_special_tokens", False)

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)

    def _guarded_ids(self, text: str) -> list[int]:
        """The control tokens of a text that are not guarded, and what is between them in ordinary tokens."""
        if self._backend is None:
            raise UnspellableText("spells a control token, and only tokenizers of tokenizer.json can spell")
        encoded = self._encode(text, return_offsets_mapping=True)
        ids: list[int] = []
        start = 0
        for index, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if index in self.control_ids:
                ids += [*self._ordinary_ids(text[start:begin], start == 0), index]
                start = end
        return ids + self._ordinary_ids(text[start:], start == 0)

    def _ordinary_ids(self, text: str, first: bool) -> list[int]:
        text = unguarded(text)
        if not text:
            return []
        backend = _without_control(self._backend, self.control_ids)[0 if first else 1]
        tokens = backend.encode(text, add_special_tokens=False).tokens
        found = [self._backend.token_to_id(token) for token in tokens]
        if None in found or not self.control_ids.isdisjoint(found):
            raise UnspellableText("spells a control token that the tokenizer cannot write in ordinary tokens")
        return found

    @property
    def _backend(self) -> Any:
        return getattr(self.tokenizer, "backend_tokenizer", None)


@lru_cache(maxsize=8)
def _without_control(backend: Any, control_ids: frozenset[int]) -> tuple[Any, Any]:
    """A tokenizer without its control tokens: for the beginning of a text, and for what follows."""
    from tokenizers import Tokenizer

    facts = json.loads(backend.to_str())
    facts["added_tokens"] = [one for one in facts["added_tokens"] if one["id"] not in control_ids]
    facts |= {"post_processor": None, "truncation": None, "padding": None}
    beginning = Tokenizer.from_str(json.dumps(facts))
    prepending = [one for one in _parts(facts.get("pre_tokenizer")) if one.get("prepend_scheme") == "first"]
    for part in prepending:
        part["prepend_scheme"] = "never"
    return beginning, Tokenizer.from_str(json.dumps(facts)) if prepending else beginning


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer and those that it consists of."""
    if pre_tokenizer is None:
        return []
    return [pre_tokenizer, *(one for part in pre_tokenizer.get("pretokenizers", []) for one in _parts(part))]


def response_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a response as the model wrote it, without special tokens.

    A decoder of SentencePiece takes the first space of a text for its own; here it belongs to the response.
    """
    known = set(tokenizer.all_special_ids)
    ids = [int(index) for index in ids if int(index) not in known]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    first = tokenizer.convert_ids_to_tokens(ids[:1])
    if not first or not str(first[0]).startswith(SPACE):
        return str(tokenizer.decode(ids, **options))
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    before, both = str(tokenizer.decode(anchor, **options)), str(tokenizer.decode(anchor + ids, **options))
    return both.removeprefix(before)
