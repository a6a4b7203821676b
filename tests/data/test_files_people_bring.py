"""Files as people have them: endings, compression, encodings, tables, folders, mixtures, broken rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from toy_tokenizers import TURNS, byte_tokenizer

from stillhouse.data import Data, DataConfig, load_data
from stillhouse.data.datasets import DatasetConfig, parse_dataset
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError
from stillhouse.files import STAGE

ROWS = [{"prompt": f"say {n}", "response": f"{n}, é\u2028"} for n in range(4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ASKED = [(row["prompt"], row["response"]) for row in ROWS]


def dataset(value: Any) -> DatasetConfig:
    found: DatasetConfig = parse_dataset(value)
    return found


def read(value: Any, reading: Reading | None = None) -> list[tuple[str, str | None]]:
    rows = dataset(value).rows(reading or Reading())
    return [(row.instruction, row.response) for row in rows]


def loaded(train: Any, tokenizer: Any = None, **options: Any) -> Data:
    config = DataConfig.model_validate({"train": train, "template": "plain", **options})
    return load_data(config, tokenizer or byte_tokenizer())


def write(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(separator: str) -> str:
    cells = [("prompt", "response"), *((p, f'"{r}"') for p, r in ASKED)]
    return "".join(f"{a}{separator}{b}\r\n" for a, b in cells)


def test_every_ending_gives_the_same_rows(tmp_path: Path) -> None:
    listed = json.dumps(ROWS)
    files = {
        "a.jsonl": LINES,
        "bom.jsonl": b"\xef\xbb\xbf" + LINES,
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
        "a.ndjson": LINES,
        "a.json": listed,
        "bom.json": b"\xef\xbb\xbf" + listed.encode(),
        "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
        "pretty.json": json.dumps({"examples": ROWS}, indent=2),
        "broken.json": '{"examples": [\n' + ",\n".join(map(json.dumps, ROWS)) + "]}\n",
        "a.csv": table(","),
        "bom.csv": b"\xef\xbb\xbf" + table(",").encode(),
        "semicolons.csv": table(";"),
        "a.tsv": table("\t"),
        "a.jsonl.gz": gzip.compress(LINES),
        "a.jsonl.bz2": bz2.compress(LINES),
        "a.jsonl.xz": lzma.compress(LINES),
        "a.jsonl.zst": pyarrow.compress(LINES, codec="zstd", asbytes=True),
        "a.csv.gz": gzip.compress(table(",").encode()),
    }
    for name, content in files.items():
        assert read(write(tmp_path / name, content)) == ASKED, name


def test_patterns_folders_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    lines = LINES.splitlines(keepends=True)
    for number in (0, 1):
        write(tmp_path / "jsonl" / f"train-{number}.jsonl", b"".join(lines[2 * number : 2 * number + 2]))
        shard = datasets.Dataset.from_list(ROWS[2 * number : 2 * number + 2])
        (tmp_path / "parquet").mkdir(exist_ok=True)
        shard.to_parquet(tmp_path / "parquet" / f"train-0000{number}-of-00002.parquet")
    write(tmp_path / "jsonl" / "test.jsonl", b"\xef\xbb\xbf" + lines[3])
    write(tmp_path / "jsonl" / "README.md", "# Rows")
    assert read(str(tmp_path / "jsonl" / "train-*.jsonl")) == ASKED
    assert read(str(tmp_path / "jsonl")) == ASKED
    assert read(str(tmp_path / "parquet")) == ASKED
    assert read({"kind": "hf", "path": str(tmp_path / "jsonl"), "split": "test"}) == ASKED[3:]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert read(str(tmp_path / "saved")) == read(str(arrow)) == ASKED
    assert read({"kind": "hf", "path": str(tmp_path / "saved"), "split": "train[1:3]"}) == ASKED[1:3]
    with pytest.raises(DataError, match="no file has a name of this pattern"):
        read(str(tmp_path / "none-*.jsonl"))
    with pytest.raises(DataError, match=r"has no split 'valid'; allowed: train, test"):
        read({"kind": "hf", "path": str(tmp_path / "jsonl"), "split": "valid"})


def test_files_of_a_folder_that_no_split_has_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "plain" / "a.jsonl", LINES)
    write(tmp_path / "plain" / "b.jsonl", LINES)
    assert len(read(str(tmp_path / "plain"))) == 8
    write(tmp_path / "mixed" / "train.jsonl", LINES)
    write(tmp_path / "mixed" / "test.jsonl", LINES)
    assert len(read(str(tmp_path / "mixed"))) == 4
    assert not caplog.records, "each file has a split"
    write(tmp_path / "mixed" / "more.jsonl", LINES)
    write(tmp_path / "mixed" / "notes.md", "no data")
    assert len(read(str(tmp_path / "mixed"))) == 4
    (told,) = (record.getMessage() for record in caplog.records)
    assert "1 data files have no split in their names, as others have, and are not read: more.jsonl." in told
    assert f"Name all with a pattern, such as {tmp_path}/mixed/*.jsonl" in told


def test_a_local_file_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "rows.jsonl", b"\xef\xbb\xbf" + LINES)
    write(tmp_path / "data" / "rows.csv", table(","))
    for name in ("data/rows.jsonl", "data/rows.csv"):
        assert read({"kind": "hf", "path": name}) == ASKED
    for missing in ("rows.jsonl", "data/rowz.csv", "data/nothing", "./x", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            read({"kind": "hf", "path": missing})


def test_nulls_and_types_that_change_stop_nothing(tmp_path: Path) -> None:
    rows = [{**row, "meta": None} for row in ROWS] + [{**ROWS[0], "meta": "late", "score": 3}]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(path)) == len(read({"kind": "hf", "path": path})) == 5
    import datasets

    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}]
    other = [{"name": "g", "parameters": {"properties": {"b": {"type": "string"}}}}]
    call = [{"function": {"name": "f", "arguments": {"a": "x"}}}]
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "tool_calls": call},
    ]
    data = datasets.Dataset.from_list(
        [{"messages": messages, "tools": tools}, {"messages": messages, "tools": other}]
    )
    data.to_parquet(tmp_path / "tools.parquet")
    first, second = dataset(str(tmp_path / "tools.parquet")).rows(Reading())
    assert first.tools[0]["function"]["parameters"] == {"properties": {"a": {"type": "string"}}}
    assert second.tools[0]["function"]["parameters"] == {"properties": {"b": {"type": "string"}}}
    assert first.completion[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "x"}}


BROKEN = {
    '{"prompt": "a"': "is not JSON",
    "[1]": "is a JSON list, not an object",
    '{"prompt": null}': "field 'prompt' is null",
    '{"prompt": "a", "prompt": "b"}': "has the key 'prompt' twice",
    '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}": "nested more than 200 deep",
    '{"prompt": ' + "[" * 500 + "]" * 500 + "}": "nested more than 200 deep",
    '{"prompt": "a", "n": ' + "9" * 10_000 + "}": "holds a number that is too long",
    '{"prompt": NaN}': "field 'prompt' should be text, got float nan",
    '{"prompt": "a\\ud83d"}': "holds half of a surrogate pair",
    '{"foo": "a"}': "no prompt found in the fields foo",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "number of images: 0; places for",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_bad_row_is_refused_with_a_way_out_or_dropped_and_counted(tmp_path: Path, line: str) -> None:
    lines = LINES.splitlines(keepends=True)
    path = write(tmp_path / "rows.jsonl", lines[0] + line.encode() + b"\n" + b"".join(lines[1:]))
    with pytest.raises(DataError) as caught:
        loaded(path)
    assert f"{path}:2: " in str(caught.value)
    assert BROKEN[line] in str(caught.value)
    assert str(caught.value).endswith("data.bad_rows: drop")
    data = loaded(path, bad_rows="drop")
    (report,) = data.report["sets"]
    assert [prompt.text for prompt in data.train] == [f"{prompt}\n" for prompt, _ in ASKED]
    assert (report["rows"], report["kept"], sum(report["dropped"].values())) == (5, 4, 1)
    assert BROKEN[line] in report["bad_rows"][0]
    assert any("of 5 rows 1 x" in text and report["bad_rows"][0] in text for text in data.report["warnings"])


def test_bad_cells_and_rows_that_the_template_refuses_are_dropped_too(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'prompt,response\na,b\nc\nd,e,f\n"g\nh",i\n')
    with pytest.raises(DataError, match=r"rows\.csv:3: has 1 cells, and the header has 2"):
        read(path)
    reading = Reading("drop")
    assert read(path, reading) == [("a", "b"), ("g\nh", "i")]
    assert reading.dropped == {"cells that do not fit the header": 2}
    two = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write(tmp_path / "rows.jsonl", LINES + json.dumps({"messages": two}).encode())
    with pytest.raises(DataError, match=r"rows\.jsonl:5: .*the template plain .*data\.bad_rows: drop"):
        loaded(path)
    (report,) = loaded(path, bad_rows="drop").report["sets"]
    assert (report["rows"], report["kept"]) == (5, 4)
    assert report["dropped"] == {"refused by the template": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 text. Convert it: iconv -f UTF-16"),
        ("rows.csv", table(",").encode("utf-16-le"), "is UTF-16 text"),
        (
            "rows.jsonl",
            '{"prompt": "naïve “x”"}\n'.encode("cp1252"),
            "rows.jsonl:1: is not UTF-8 text (byte 0xef",
        ),
        ("rows.csv", "prompt\nnaïve\n".encode("cp1252"), "probably Windows-1252"),
        ("rows.jsonl.zst", b"not packed", "cannot be unpacked"),
        ("rows.csv", "a,a\n1,2\n", "the header needs a different name for each column"),
        (
            "rows.json",
            '{"prompt": {"0": "a"}, "response": {"0": "b"}}',
            "holds columns, as pandas writes them",
        ),
        ("rows.json", '{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}', "has several lists of rows: a, b"),
    ],
)
def test_files_that_say_what_they_are(tmp_path: Path, name: str, content: bytes | str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert words in str(caught.value)


def test_a_large_row_is_a_row(tmp_path: Path) -> None:
    text = "ab " * 13_000_000
    assert read(write(tmp_path / "rows.csv", f'prompt,response\n"{text}",x\n')) == [(text, "x")]
    assert read(write(tmp_path / "rows.jsonl", json.dumps({"prompt": text}))) == [(text, None)]


def about_sources(data: Data) -> list[tuple[float, int, int]]:
    return [(one["weight"], one["rows"], one["kept"]) for one in data.report["sets"][0]["sources"]]


def test_a_mixture_repeats_each_source_by_its_weight_and_reports_it(tmp_path: Path) -> None:
    web = write(tmp_path / "web.jsonl", LINES)
    maths = write(tmp_path / "maths.csv", "question,answer\n1+1,2\n2+2,4\n")
    data = loaded([{"path": web, "weight": 0.5}, {"path": maths, "weight": 2.5}])
    assert [prompt.text.strip() for prompt in data.train] == [
        "say 1", "say 3", "1+1", "1+1", "2+2", "2+2", "2+2"
    ]  # fmt: skip
    assert len({prompt.id for prompt in data.train}) == 7
    assert data.train == loaded([{"path": web, "weight": 0.5}, {"path": maths, "weight": 2.5}]).train
    (report,) = data.report["sets"]
    assert report["path"] == f"{web}, {maths}"
    assert about_sources(data) == [(0.5, 2, 2), (2.5, 5, 5)]
    assert report["rows"] == 7
    assert about_sources(loaded([web])) == [(1.0, 4, 4)]
    one = loaded({"path": web, "weight": 2})
    assert [prompt.text for prompt in one.train[:2]] == ["say 0\n", "say 0\n"]
    each = loaded([{"path": web, "limit": 1}, {"path": maths, "labelled": 1}])
    assert [prompt.response_ids is not None for prompt in each.train] == [True, True, False]
    with pytest.raises(ValueError, match="limit belongs to the datasets of a mixture"):
        dataset({"kind": "mixture", "sources": [web], "limit": 2})
    with pytest.raises(ValueError, match="a mixture holds datasets, not other mixtures"):
        dataset([web, [maths]])
    assert dataset([web]).fingerprint() != dataset([{"path": web, "weight": 2}]).fingerprint()


def test_formats_and_unused_fields_are_told_once(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "context": "b", "response": "c", "category": "d", "id": "x"},
        {"instruction": "e", "context": "", "response": "f", "category": "d", "id": "y"},
        {"prompt": "g", "note": "only here", "test": "kept"},
    ]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = loaded(path)
    (report,) = data.report["sets"]
    assert report["formats"] == {
        "instruction/context/response": {"rows": 2, "fields": ["instruction", "context", "response"]},
        "prompt/response": {"rows": 1, "fields": ["prompt"]},
    }
    (told,) = data.report["warnings"]
    assert "fields 'category' (text in 67 % of rows), 'note' (text in 33 % of rows) are not used" in told
    assert "data.ignore: [category, note]" in told
    silent = loaded(path, ignore=["category", "note"])
    assert silent.report["warnings"] == []
    assert silent.train[0].facts["category"] == "d"


def test_a_named_field_that_no_row_has_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", LINES)
    with pytest.raises(
        DataError, match=r"no row has a field 'respons' \(fields\.response\) \(did you mean 'response'"
    ):
        read({"path": path, "fields": {"response": "respons"}})


def test_a_cut_response_of_a_stage_file_stays_unfinished(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": "a", "response": "cut he", "finished": False, "token_ids": [1]},
        {"prompt": "b", "response": "whole", "finished": True, "facts": {"finished": False}},
        {"prompt": turns, "tools": [{"name": "f"}], "response": "x", "finished": True},
    ]
    stage = [{STAGE: {"stage": "responses"}}, *rows]
    path = write(tmp_path / "teacher.jsonl", "".join(json.dumps(row) + "\n" for row in stage))
    tokenizer = byte_tokenizer(TURNS)
    data = loaded({"path": path, "limit": 2}, tokenizer, template="chat")
    assert [prompt.response_finished for prompt in data.train] == [False, True]
    assert [(prompt.response_ids or ())[-1] == data.end_id for prompt in data.train] == [False, True]
    assert data.train[1].facts == {"finished": False}
    last = list(dataset(path).rows(Reading()))[-1]
    assert last.prompt_fields()["tools"] == [{"type": "function", "function": {"name": "f"}}]
