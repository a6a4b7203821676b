"""Tokenizers of fewer tokens: the same tokens of the text they were trimmed to, any text still readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.conftest import shared

from stillhouse.errors import ModelError
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.models.pruning.plan import with_tokens
from stillhouse.models.pruning.vocabulary import check_encodes_alike, trimmed_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, the first man on the moon said: 'one small step'!",
    "  spaces, and\nlines\n\nagain: the quick moon",
]
OTHER = "Zebras écrivent 漢字 🙂 unforeseeably"


def unigram(folder: Path) -> Any:
    """A unigram tokenizer with byte fallback, its own numbers and a template of special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator([*TEXTS, "never used words, of other letters: wxyz, jkqv"] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(one, made.token_to_id(one)) for one in ("<s>", "</s>")]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return load_tokenizer(TeacherModel(path=str(folder)))


def tokenizer_of(kind: str, folder: Path) -> Any:
    if kind == "unigram":
        return unigram(folder)
    places = {
        "demo": "package:stillhouse/demo/teacher",
        "gpt2": "data/tokenizers/gpt2",
        "stories260k": "data/models/stories260k",
    }
    path = places[kind]
    return load_tokenizer(TeacherModel(path=path if ":" in path else str(shared() / path)))


@pytest.mark.parametrize(
    "kind",
    [
        "demo",
        "unigram",
        pytest.param("gpt2", marks=pytest.mark.needs_shared),
        pytest.param("stories260k", marks=pytest.mark.needs_shared),
    ],
)
def test_the_text_of_the_data_is_the_same_tokens_and_special_tokens_stay(kind: str, tmp_path: Path) -> None:
    whole = tokenizer_of(kind, tmp_path)
    used = {one for text in TEXTS for one in whole(text)["input_ids"]}
    trimmed, kept = trimmed_tokenizer(whole, used)
    assert used <= set(kept)
    assert len(trimmed) == len(kept) < len(whole)
    check_encodes_alike(trimmed, whole, kept, TEXTS)
    for text in TEXTS:  # with the special tokens of its template, and joined
        assert [kept[one] for one in trimmed(text)["input_ids"]] == whole(text)["input_ids"]
        assert trimmed.decode(trimmed(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])
    for name in ("eos_token", "bos_token", "pad_token", "unk_token", "chat_template"):
        assert getattr(trimmed, name, None) == getattr(whole, name, None)
    assert [kept[one] for one in trimmed.all_special_ids] == whole.all_special_ids
    if kind != "unigram":
        assert trimmed.decode(trimmed(OTHER, add_special_tokens=False)["input_ids"]).strip() == OTHER
        assert len(trimmed(OTHER)["input_ids"]) >= len(whole(OTHER)["input_ids"])
    trimmed.save_pretrained(tmp_path / "again")
    again = load_tokenizer(TeacherModel(path=str(tmp_path / "again")))
    assert again.get_vocab() == trimmed.get_vocab()


def test_text_that_would_be_cut_otherwise_is_found(tmp_path: Path) -> None:
    whole = tokenizer_of("demo", tmp_path)
    trimmed, kept = trimmed_tokenizer(whole, whole(TEXTS[0])["input_ids"])
    with pytest.raises(ModelError, match=r"cuts .In 1969"):
        check_encodes_alike(trimmed, whole, kept, TEXTS[:2])


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_of_fewer_tokens_has_its_own_distribution_over_them(tied: bool) -> None:
    whole: Any = tiny.model(0, tie_word_embeddings=tied).eval()
    kept = (0, 1, 5, 7, 8, 20, 33, 60)
    fewer: Any = with_tokens(whole, kept)
    ids = torch.tensor([[2, 4, 7, 3]])
    with torch.no_grad():
        wanted = whole(input_ids=torch.tensor(kept)[ids]).logits[..., list(kept)]
        found = fewer(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)
    assert fewer.config.vocab_size == len(kept)
    assert (fewer.config.pad_token_id, fewer.config.eos_token_id) == (0, 1)
    assert (fewer.get_output_embeddings().weight is fewer.get_input_embeddings().weight) == tied


def test_special_tokens_take_their_new_numbers_and_strange_ones_none() -> None:
    whole: Any = tiny.model(0)
    whole.config.bos_token_id, whole.generation_config.eos_token_id = 40, [1, 33]
    fewer: Any = with_tokens(whole, (0, 1, 5, 33))
    assert (fewer.config.bos_token_id, fewer.generation_config.eos_token_id) == (None, [1, 3])
