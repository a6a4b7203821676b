"""Sets of prompts: nothing is lost without a count, and what cannot be used is named."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import TURNS, byte_tokenizer

from stillhouse.data import Data, DataConfig, load_data
from stillhouse.data.collate import collate
from stillhouse.data.rows import Row
from stillhouse.data.templates import TEMPLATES
from stillhouse.data.tokenise import EncodedRow, Encoder
from stillhouse.errors import DataError, EnvironmentFault

TOKENIZER = byte_tokenizer()
ROWS = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(5)]


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loaded(train: Any, needs: Any = (), tokenizer: Any = TOKENIZER, **options: Any) -> Data:
    values = {"train": train, "template": "plain", **options}
    return load_data(DataConfig.model_validate(values), tokenizer, needs=needs)


def about(data: Data, name: str = "train") -> dict[str, Any]:
    return next(one for one in data.report["sets"] if one["name"] == name)


def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path) -> None:
    import datasets

    plain = write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    first = loaded(plain)
    for name in ("rows.jsonl.gz", "rows.json", "rows.parquet", "saved", "splits"):
        other = loaded(str(tmp_path / name))
        assert other.train == first.train
        assert len(about(other)["sha256"]) == 64
    assert [prompt.id for prompt in first.train] == [f"train:{n}" for n in range(1, 6)]
    assert first.train[2].references == ("2",)
    assert first.end_id == TOKENIZER.eos_token_id
    with pytest.raises(DataError, match=r"no split 'tran' \(did you mean 'train'\?\); allowed: train"):
        loaded({"kind": "hf", "path": str(tmp_path / "splits"), "split": "tran"})
    with pytest.raises((DataError, EnvironmentFault), match="nobody/nothing"):
        loaded({"kind": "hf", "path": "nobody/nothing"})


def test_lines_that_are_broken_are_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"\n[1]\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: is not JSON .* data.bad_rows: drop"):
        loaded(str(path))
    data = loaded(str(path), bad_rows="drop")
    assert [prompt.text for prompt in data.train] == ["a\n", "c\n"]
    assert about(data)["dropped"] == {"not JSON": 1, "not an object": 1}
    assert about(data)["rows"] == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "no row is left for data.train: 0 rows read"),
        ("rows.jsonl", b'{"prompt": "n\xe9"}\n', "rows.jsonl:1: is not UTF-8"),
        ("rows.jsonl", b'{"foo": 1}\n', "rows.jsonl:1: no prompt found in the fields foo"),
        ("rows.jsonl", b'{"text": "words"}\n', "holds plain text, no prompt: give the file as data.text"),
        ("rows.jsonl.gz", b"not packed", "cannot be unpacked"),
        ("rows.json", b"[1]", "rows.json[1]: is not an object"),
        ("rows.json", b"[", "rows.json:1: is not JSON"),
        ("rows.json", b'[{"prompt": "a\\ud83d"}]', "rows.json:1: holds half of a surrogate pair"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        loaded(str(tmp_path / name))
    assert words in str(caught.value)


def test_a_named_conversation_that_is_none_is_not_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"turns": "user: hi", "prompt": "something else"}])
    with pytest.raises(DataError, match=r"field 'turns' should be a list of turns"):
        loaded({"path": path, "fields": {"messages": "turns"}})


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file \(did you mean 'train\.jsonl'\?\)"):
        loaded(str(tmp_path / "trein.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        loaded({"kind": "jsonl", "path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"is no folder here, and does not end in one of \.jsonl"):
        DataConfig.model_validate({"train": str(tmp_path / "rows.xyz")})


def test_labelled_rows_are_the_first_and_the_others_keep_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = loaded({"path": path, "labelled": 2})
    assert [prompt.response_ids is not None for prompt in data.train] == [True, True, False, False, False]
    assert data.train[4].references == ()
    assert about(data)["with_response"] == 2
    needed = loaded({"path": path, "labelled": 2}, needs={"responses"})
    assert len(needed.train) == 2
    assert about(needed)["dropped"] == {"unlabelled": 3}
    assert needed.report["warnings"] == []
    assert len(loaded({"path": path, "limit": 3}).train) == 3


def test_rows_with_several_outputs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "outputs": ["x", "y"]},
        {"prompt": "b", "outputs": ["z"]},
        {"prompt": "c", "outputs": []},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    one = loaded(path)
    assert [prompt.references for prompt in one.train] == [("x", "y"), ("z",), ()]
    each = loaded({"path": path, "each_output": True})
    assert [prompt.id for prompt in each.train] == ["train:1", "train:1:2", "train:2", "train:3"]
    texts = [TOKENIZER.decode(p.response_ids[:-1]) for p in each.train if p.response_ids]
    assert texts == ["x", "y", "z"]
    assert each.train[1].references == ("x", "y")
    assert about(each)["rows"] == 3


def test_a_row_without_a_needed_response_is_named_or_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, *({"instruction": f"ask {n}"} for n in range(5))])
    assert len(loaded(path).train) == 10
    with pytest.raises(DataError, match=r"rows\.jsonl:6, .*rows\.jsonl:8 and 2 more: no response"):
        loaded(path, needs={"responses"})
    dropped = loaded(path, needs={"responses"}, no_response="drop")
    assert about(dropped)["dropped"] == {"no response": 5}
    with pytest.raises(DataError, match=r"no response, but data\.valid needs one"):
        loaded(path, valid=path)


def test_too_long_responses_are_cut_without_an_end_or_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "x" * n} for n in (3, 4, 9)])
    cut = loaded(path, max_response=5)
    assert [prompt.response_finished for prompt in cut.train] == [True, True, False]
    assert all(len(p.response_ids or ()) <= 5 for p in cut.train)
    assert TOKENIZER.eos_token_id not in (cut.train[2].response_ids or ())
    assert about(cut)["truncated"] == {"response": 1}
    dropped = loaded(path, max_response=5, too_long={"response": "drop"})
    assert about(dropped)["dropped"] == {"response too long": 1}
    assert len(dropped.train) == 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab cé", min_size=1, max_size=30), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_cut_prompts_fit_and_keep_the_template_and_one_side(
    tmp_path: Path, words: list[str], side: str
) -> None:
    tokenizer = byte_tokenizer(TURNS)
    limit = len(tokenizer("<|start|>user\n<|turn|>\n<|start|>assistant\n")["input_ids"]) + 8
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": "ok", "response": "y"}, *({"prompt": text} for text in words)]
    )
    data = loaded(
        path, tokenizer=tokenizer, template="chat", max_prompt=limit, too_long={"prompt": f"truncate_{side}"}
    )
    report = about(data)
    assert report["kept"] + sum(report["dropped"].values()) == len(words) + 1
    for prompt in data.train:
        assert len(prompt.token_ids) <= limit
        assert prompt.text.startswith("<|start|>user\n")
        assert prompt.text.endswith("<|turn|>\n<|start|>assistant\n")
        kept = prompt.text.removeprefix("<|start|>user\n").removesuffix("<|turn|>\n<|start|>assistant\n")
        whole = ["ok", *words][int(prompt.id.split(":")[1]) - 1]
        assert (
            whole.rstrip().endswith(kept) if side == "left" else whole.lstrip().startswith(kept)
        ) or not kept
        assert list(prompt.token_ids) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]


def test_prompts_are_dropped_by_default_and_losses_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a" * 50}, {"prompt": " "}, {"prompt": "short"}])
    with caplog.at_level(logging.WARNING, "stillhouse"):
        data = loaded(path, max_prompt=10)
    assert about(data)["dropped"] == {"prompt too long": 1, "empty prompt": 1}
    assert "of 3 rows 1 x empty prompt, 1 x prompt too long" in data.report["warnings"][0]
    assert data.report["warnings"][0] in caplog.text
    with pytest.raises(
        DataError, match=r"no row is left for data\.train: 3 rows read; 1 x empty prompt, 2 x prompt too long"
    ):
        loaded(path, max_prompt=2)


def test_validation_prompts_that_are_trained_on_are_told(tmp_path: Path) -> None:
    train, valid = (
        write(tmp_path / "t.jsonl", ROWS),
        write(tmp_path / "v.jsonl", [ROWS[1], {"prompt": "new", "response": "x"}]),
    )
    data = loaded(train, valid=valid)
    assert "1 of 2 prompts of data.valid" in data.report["warnings"][0]
    assert about(data, "valid")["also_in_train"] == 1
    assert not {p.id for p in data.train} & {p.id for p in data.valid}


def test_texts_of_megabytes_are_not_tokenised_to_their_ends(tmp_path: Path) -> None:
    long = "many words " * 100_000
    rows = [{"instruction": "say", "output": text} for text in (long, long[:50])]
    rows += [{"instruction": long, "output": "much"}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = loaded(path, max_prompt=64, max_response=20)
    first, second = data.train
    assert first.response_ids == second.response_ids
    assert about(data)["truncated"] == {"response": 2}
    assert about(data)["dropped"] == {"prompt too long": 1}
    path = write(tmp_path / "one.jsonl", rows[2:])
    [cut] = loaded(path, max_prompt=64, too_long={"prompt": "truncate_right"}).train
    assert cut.text.startswith("many words ")
    assert len(cut.token_ids) <= 64
    encoder = Encoder(TEMPLATES.parse("plain"), TOKENIZER)
    [some] = encoder.encode([Row("rows.jsonl:1", instruction="say", response=long)], most_tokens=64)
    assert isinstance(some, EncodedRow)
    assert some.response_ids is not None
    assert 64 < len(some.response_ids) < len(TOKENIZER(long).input_ids)


def test_plain_text_is_cut_into_whole_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "book.txt").write_text("0123456789" * 3)
    data = loaded(path, text=str(tmp_path / "book.txt"), text_block=8)
    assert len(data.text) == 3
    assert about(data, "text")["dropped"] == {"tokens after the last block": 7}
    tokens = [id for block in data.text for id in (*block.prompt.token_ids, *block.token_ids)]
    assert TOKENIZER.decode(tokens) == ("0123456789" * 3)[:24]
    batch = collate(data.text, pad_id=0)
    assert batch.response_mask.sum() == 3 * 7
    documents = write(tmp_path / "docs.jsonl", [{"text": "abc"}, {"text": "defg"}])
    joined = loaded(path, text=documents, text_block=4).text
    assert [block.finished for block in joined] == [True, False]
    with pytest.raises(DataError, match="less than one block"):
        loaded(path, text=documents, text_block=64)
    with pytest.raises(DataError, match="has no field text"):
        loaded(path, text=path)


def test_the_packaged_demo_data() -> None:
    base = "package:stillhouse/demo/data/"
    data = loaded({"path": f"{base}train.jsonl", "labelled": 200}, valid=f"{base}dev.jsonl")
    assert len(data.train) == 3101
    assert about(data)["with_response"] == 200
    assert len({prompt.token_ids for prompt in data.train}) == 3101
    teacher = loaded(
        {"path": f"{base}train.jsonl", "each_output": True}, valid=f"{base}eval.jsonl", needs={"responses"}
    )
    assert len(teacher.train) == 8349
    assert len(teacher.valid) == 150
    assert data.report["warnings"] == teacher.report["warnings"] == []


def test_with_all_turns_trained_on_a_conversation_without_a_last_answer_is_cut_behind_the_one_before(
    tmp_path: Path,
) -> None:
    def said(*texts: str) -> dict[str, Any]:
        return {
            "messages": [
                {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)
            ]
        }

    rows = [said("Fruit?", "Fig.", "Root?", "Beet.", "Nut?"), said("Leaf?", "Kale.", "Sea?"), said("Nut?")]
    path, tokenizer = write(tmp_path / "rows.jsonl", rows), byte_tokenizer(TURNS)
    options: dict[str, Any] = {"needs": {"responses"}, "tokenizer": tokenizer, "template": "chat"}
    data = loaded(path, train_on="all", no_response="drop", **options)
    answers = [tokenizer.decode(prompt.response_ids) for prompt in data.train]
    assert answers == [
        "Fig.<|turn|>\n<|start|>user\nRoot?<|turn|>\n<|start|>assistant\nBeet.<|turn|>",
        "Kale.<|turn|>",
    ]
    assert about(data)["dropped"] == {"no response": 1}
    assert about(data)["notes"] == {"nobody answers the last turns of a conversation: they are left out": 2}
    with pytest.raises(DataError, match="no response"):
        loaded(path, train_on="last", **options)
    asked = loaded(path, tokenizer=tokenizer, template="chat", train_on="all").train
    assert [prompt.response_ids for prompt in asked] == [None] * 3
