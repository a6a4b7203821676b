"""A server that lies: every lie is an error that names server, request and field, and none is kept."""

from __future__ import annotations

import copy
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.batch import TokenBatch
from stillhouse.core.journal import Journal
from stillhouse.core.types import Prompt
from stillhouse.data.collate import collate
from stillhouse.engines import Sampling, ServerConfig, TokenizerInfo
from stillhouse.engines.server import ServerEngine
from stillhouse.errors import ServerError, StillhouseError
from stillhouse.evaluate.judge import AnswerPair, Rubric, judge_pairs
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.remote import ServerConnection, replies
from stillhouse.remote.answers import answer_limit
from stillhouse.rollouts.fixed import reference_response
from stillhouse.teachers import SparseTeacher
from stillhouse.teachers.server import ServerTeacherConfig
from tests.servers import Service, serving
from tests.vllm_like import TEACHER

VOCAB = 1024
K = 3
Lie = Callable[[dict[str, Any]], Any]
NAN, INF = float("nan"), float("inf")


class Liar:
    """Answers as vLLM does, without a model; answers that would be kept pass through `lie`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lie: Lie | None = None

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 256}]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/chat/completions":
            return 200, self.told({"choices": [{"message": {"content": "[[A]]"}}]})
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids, add_special_tokens=False)["input_ids"]
        written = [7] * body["max_tokens"]
        choice: dict[str, Any] = {
            "text": "x",
            "finish_reason": "length",
            "token_ids": written,
            "prompt_token_ids": ids,
            "logprobs": {"token_logprobs": [-0.5] * len(written)},
        }
        if (k := body.get("prompt_logprobs")) is not None:
            rows = [{t: -3.5} | {100 + n: -2.0 - n for n in range(k)} for t in ids[1:]]
            choice["prompt_logprobs"] = [
                None,
                *({str(token): {"logprob": value} for token, value in row.items()} for row in rows),
            ]
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(written)}}
        return 200, self.told(reply) if "seed" in body or k == K else reply

    def told(self, reply: dict[str, Any]) -> Any:
        if self.lie is None:
            return reply
        changed = copy.deepcopy(reply)
        other = self.lie(changed)
        return changed if other is None else other


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TeacherModel(path=TEACHER))


@pytest.fixture(scope="module")
def liar(tokenizer: Any) -> Liar:
    return Liar(tokenizer)


@pytest.fixture(scope="module")
def service(liar: Liar) -> Iterator[Service]:
    with serving(liar) as running:
        yield running


@pytest.fixture(scope="module")
def engine(service: Service, tokenizer: Any) -> ServerEngine:
    config = ServerConfig(url=service.url, backoff=0.001, retries=1)
    return config.build(None, TokenizerInfo.from_tokenizer(tokenizer))


def choice(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """A lie in the one choice of an answer, which `change` changes in place."""

    def lie(reply: dict[str, Any]) -> None:
        change(reply["choices"][0])

    return lie


def ids(value: Any) -> Lie:
    return choice(lambda c: c.update(token_ids=value))


def logprobs(value: Any) -> Lie:
    return choice(lambda c: c["logprobs"].update(token_logprobs=value))


@pytest.mark.parametrize("said", [INF, NAN, -3, "many", [4], {}, True, 2**70])
def test_a_usage_that_is_no_number_of_tokens_is_not_counted(said: Any) -> None:
    reply = {"usage": {"prompt_tokens": said, "completion_tokens": said}}
    assert replies.token_usage(reply) == (0, 0)
    assert replies.token_usage({"usage": said}) == (0, 0)


WRITTEN: dict[str, tuple[Lie, str]] = {
    "an id beyond the vocabulary": (ids([7, 999999, 7, 7]), r"token_ids\[1\]: is 999999"),
    "the first id beyond": (ids([7, 7, 7, 1024]), r"\[3\]: is 1024, and the tokenizer has ids 0 to 1023"),
    "a negative id": (ids([-5, 7, 7, 7]), r"token_ids\[0\]: is -5"),
    "an id of 70 bits": (ids([7, 2**70, 7, 7]), "a huge integer"),
    "an id that is a float": (ids([7, 7.0, 7, 7]), r"token_ids\[1\]: is 7\.0"),
    "an id that is a truth value": (ids([True, 7, 7, 7]), r"token_ids\[0\]: is True"),
    "an id that is text": (ids(["7", 7, 7, 7]), r"token_ids\[0\]: is '7'"),
    "an id that is null": (ids([None, 7, 7, 7]), r"token_ids\[0\]: is None"),
    "ids in a list of lists": (ids([[7, 7, 7, 7]]), r"token_ids\[0\]: is a list"),
    "ids as text": (ids("7777"), "token_ids: is '7777', not a list"),
    "ids as a mapping": (ids({"0": 7}), "not a list of token ids"),
    "300 tokens for 4": (ids([7] * 300), "has 300 tokens, and at most 4 were asked for"),
    "one token too many": (ids([7] * 5), "has 5 tokens, and at most 4"),
    "one value too few": (logprobs([-0.5] * 3), "token_logprobs: has 3 values for 4 tokens"),
    "one value too many": (logprobs([-0.5] * 5), "token_logprobs: has 5 values for 4 tokens"),
    "a log-probability above 0": (logprobs([-0.5, 0.7, -0.5, -0.5]), r"\[1\]: 0.7 is no log-probability"),
    "a log-probability that is NaN": (logprobs([NAN, -0.5, -0.5, -0.5]), r"\[0\]: nan is no"),
    "a log-probability that is infinite": (logprobs([INF, -0.5, -0.5, -0.5]), r"\[0\]: inf is no"),
    "a token that cannot have been sampled": (logprobs([-0.5, -INF, -0.5, -0.5]), r"\[1\]: is -inf"),
    "a log-probability that is null": (logprobs([None, -0.5, -0.5, -0.5]), r"\[0\]: None is no"),
    "a log-probability that is text": (logprobs(["-0.5"] * 4), r"\[0\]: '-0.5' is no"),
    "another prompt": (
        choice(lambda c: c.update(prompt_token_ids=[1, 2, 3, 4, 5])),
        r"prompt_token_ids: has",
    ),
    "another token in the prompt": (
        choice(lambda c: c["prompt_token_ids"].__setitem__(2, 400)), r"has 400 at 2, where \d+ was sent",
    ),
    "another number of tokens read": (
        lambda r: r["usage"].update(prompt_tokens=2),
        r"usage.prompt_tokens: is 2",
    ),
    "a prompt that was cut": (lambda r: r.update(truncated=True), "truncated: the prompt was cut"),
    "two choices": (lambda r: r.update(choices=r["choices"] * 2), "has 2 choices, and one was asked for"),
    "half a character": (choice(lambda c: c.update(text="\ud83d")), r"choices\[0\].text: holds half a char"),
    "text that is a list": (choice(lambda c: c.update(text=["x"])), r"choices\[0\].text: is a list"),
    "JSON nested 20,000 deep": (lambda r: Raw(b"[" * 20_000 + b"]" * 20_000), "nested too deeply"),
    "no choice": (lambda r: r.update(choices=[]), "unexpected answer"),
    "no ids": (choice(lambda c: c.pop("token_ids")), "unexpected answer|NoneType|without"),
    "no tokens": (ids([]), "has 4 values for 0 tokens"),
    "no mapping": (lambda r: [r], "unexpected answer"),
    "an integer of 10,000 digits": (
        lambda r: Raw(b'{"choices": ' + b"9" * 10_000 + b"}"),
        "unexpected answer",
    ),
    "a reason that is none": (
        choice(lambda c: c.update(finish_reason={"a": 1})),
        "stopped a response because",
    ),
}  # fmt: skip


class Raw(bytes):
    """A body as it is."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_lie_about_what_was_written(
    name: str, liar: Liar, service: Service, engine: ServerEngine, tmp_path: Path
) -> None:
    lie, words = WRITTEN[name]
    asked, sampling = [[10, 11, 12, 13, 14]], Sampling(max_tokens=4, logprobs=True)
    engine.use_journal(tmp_path / "answers.jsonl")
    liar.lie = lie
    with pytest.raises(StillhouseError, match=words) as caught:
        engine.generate(asked, sampling, seed=0)
    if isinstance(caught.value, ServerError):
        assert service.url in str(caught.value)
    assert not (tmp_path / "answers.jsonl").exists()
    liar.lie = None
    assert engine.generate(asked, sampling, seed=0)[0].token_ids == (7, 7, 7, 7)


@pytest.mark.parametrize(
    "kept",
    [
        [[999999], True, None],
        [[-5], True, None],
        [[7] * 9, False, None],
        [[], True, None],
        [[7], 1, None],
        [[7], True, [0.5]],
        [[7], True, [-0.5, -0.5]],
        {"a": 1},
        "x",
    ],
    ids=str,
)
def test_what_was_kept_before_and_cannot_be_is_asked_for_again(
    kept: Any, liar: Liar, engine: ServerEngine, tmp_path: Path
) -> None:
    asked, sampling = [[10, 11, 12, 13, 14]], Sampling(max_tokens=4)
    liar.lie = None
    engine.use_journal(tmp_path / "answers.jsonl")
    engine.generate(asked, sampling, seed=0)
    (line,) = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "answers.jsonl").write_text(json.dumps(json.loads(line) | {"value": kept}) + "\n", "utf-8")
    engine.use_journal(tmp_path / "answers.jsonl")
    assert engine.generate(asked, sampling, seed=0)[0].token_ids == (7, 7, 7, 7)


def position(change: Callable[[dict[str, Any]], Any], place: int = 4) -> Lie:
    return choice(lambda c: change(c["prompt_logprobs"][place]))


def values(change: Callable[[list[Any]], Any]) -> Lie:
    return choice(lambda c: change(c["prompt_logprobs"]))


def more_mass(row: dict[str, Any]) -> None:
    for entry in row.values():
        entry["logprob"] = -0.1


SCORED: dict[str, tuple[Lie, str]] = {
    "an id beyond the vocabulary": (
        position(lambda row: row.update({"999999": row.pop("102")})),
        r"prompt_logprobs\[4\]: has token 999999",
    ),
    "the first id beyond": (position(lambda row: row.update({"1024": row.pop("100")})), "has token 1024"),
    "a negative id": (position(lambda row: row.update({"-5": row.pop("102")})), "has token -5"),
    "an id that is no number": (
        position(lambda row: row.update({"Fig": row.pop("102")})),
        "unexpected answer",
    ),
    "an id twice": (position(lambda row: row.update({"0100": row.pop("102")})), "'0100' is no token id"),
    "a mass of 8": (position(more_mass), "sum to 3.619"),
    "a mass of a little over 1": (
        position(lambda row: row["100"].update(logprob=-0.05)), r"prompt_logprobs\[4\]: .* sum to 1\.0",
    ),
    "a value above 0": (
        position(lambda row: row["100"].update(logprob=0.5)),
        "token 100: 0.5 is no log-prob",
    ),
    "NaN": (position(lambda row: row["100"].update(logprob=NAN)), "token 100: nan is no"),
    "infinity": (position(lambda row: row["101"].update(logprob=INF)), "token 101: inf is no"),
    "null": (position(lambda row: row["101"].update(logprob=None)), "token 101: None is no"),
    "text": (position(lambda row: row["101"].update(logprob="-1")), "token 101: '-1' is no"),
    "truth": (position(lambda row: row["101"].update(logprob=False)), "token 101: False is no"),
    "no value": (position(lambda row: row["101"].clear()), "unexpected answer"),
    "fewer than were asked for": (
        position(lambda row: [row.pop("101"), row.pop("102")]),
        r"\[4\]: has 2 tokens, and 3 \(or 4\) .*lower k",
    ),
    "more than were asked for": (
        position(lambda row: row.update({str(n): {"logprob": -30.0} for n in range(200, 220)})),
        "has 23 tokens",
    ),
    "one position less": (values(lambda rows: rows.pop()), r"has \d+ positions for \d+ tokens"),
    "one position more": (
        values(lambda rows: rows.append(dict(rows[-1]))),
        r"has \d+ positions for \d+ tokens",
    ),
    "shifted by one": (values(lambda rows: rows.append(rows.pop(0))), r"\[0\]: has values, although nothing"),
    "shifted by one and filled": (
        values(lambda rows: [rows.pop(1), rows.append(dict(rows[-1]))]),
        r"prompt_logprobs\[\d+\]: leaves out token",
    ),
    "another text": (
        values(lambda rows: rows.insert(1, rows.pop())),
        r"leaves out token \d+, although it stands",
    ),
    "a hole": (values(lambda rows: rows.__setitem__(4, None)), r"\[4\]: leaves out token"),
    "a position that is a list": (values(lambda rows: rows.__setitem__(4, [1])), "unexpected answer"),
    "positions that are a number": (choice(lambda c: c.update(prompt_logprobs=5)), "unexpected answer"),
    "other ids sent back": (choice(lambda c: c["prompt_token_ids"].__setitem__(3, 400)), "has 400 at 3"),
    "fewer ids sent back": (choice(lambda c: c["prompt_token_ids"].pop()), "prompt_token_ids: has"),
    "another number of tokens read": (
        lambda r: r["usage"].update(prompt_tokens=1),
        "usage.prompt_tokens: is 1",
    ),
    "two choices": (lambda r: r.update(choices=r["choices"] * 2), "has 2 choices"),
    "nothing": (lambda r: {}, "unexpected answer"),
}  # fmt: skip


def some_text(tokenizer: Any) -> TokenBatch:
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    response = (*tokens("Zizzi serves Indian food."), tokenizer.eos_token_id)
    return collate([reference_response(Prompt("0", tokens("name[Zizzi]\n"), "name[Zizzi]\n", response))], 0)


@pytest.mark.parametrize("name", SCORED)
def test_a_lie_about_a_text(name: str, liar: Liar, service: Service, tokenizer: Any, tmp_path: Path) -> None:
    lie, words = SCORED[name]
    config = ServerTeacherConfig(url=service.url, model="m", k=K, backoff=0.001, retries=1, cache=tmp_path)
    teacher, batch = config.build(None, VOCAB), some_text(tokenizer)
    assert isinstance(teacher, SparseTeacher)
    liar.lie = lie
    with pytest.raises(ServerError, match=words) as caught:
        teacher.sparse_logprobs(batch)
    assert service.url in str(caught.value)
    assert not list(tmp_path.glob("*/shard-*"))
    liar.lie = None
    rows = teacher.sparse_logprobs(batch)
    assert rows.labels is not None
    assert rows.labels.tolist() == [-3.5] * len(rows)


@pytest.mark.parametrize("content", ["\ud83d", 5, ["[[A]]"], {"text": "[[A]]"}])
def test_a_lie_of_a_judge(content: Any, liar: Liar, service: Service, tmp_path: Path) -> None:
    client = ServerConnection(url=service.url, backoff=0.001, retries=0).client()
    pairs, replies = [AnswerPair("0", "Name a fruit.", "Fig.", "Stone.")], tmp_path / "replies.jsonl"
    liar.lie = lambda reply: reply["choices"][0]["message"].update(content=content)
    with pytest.raises(ServerError, match=r"choices\[0\].message.content"):
        judge_pairs(pairs, client, "m", Rubric(), Journal(replies))
    assert not replies.exists()
    liar.lie = None
    assert judge_pairs(pairs, client, "m", Rubric(), Journal(replies))[0].verdicts == ("A", "A")


class Endless(BaseHTTPRequestHandler):
    """Sends a body without end, as `headers` of the server say."""

    def do_GET(self) -> None:
        headers, chunk = self.server.answer  # type: ignore[attr-defined]
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            while True:
                self.wfile.write(chunk)
                self.server.sent += len(chunk)  # type: ignore[attr-defined]
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        """Silent."""


def packed() -> bytes:
    """A mebibyte of spaces, again and again, as members of one gzip stream are."""
    return gzip.compress(b" " * (1 << 20))


@pytest.mark.parametrize(
    ("headers", "chunk", "words", "most"),
    [
        ({}, b" " * 65536, "sent more than 32 MiB", 48 << 20),
        ({"Content-Length": str(4 << 30)}, b" " * 65536, "sent more than 32 MiB", 4 << 20),
        ({"Content-Encoding": "br"}, b"x", "packs its answer as br, unasked", 4 << 20),
        ({"Content-Type": "text/html; charset=utf-8"}, b"<html>",
        "answers with text/html, not with JSON", 4 << 20),
        ({"Content-Type": "text/event-stream"}, b"data: {}\n\n", "answers with text/event-stream", 4 << 20),
        ({"Content-Type": "video/mp4"}, b"x", "answers with video/mp4", 4 << 20),
    ],
)  # fmt: skip
def test_no_more_of_a_body_is_read_than_was_asked_for(
    headers: dict[str, str], chunk: bytes, words: str, most: int
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    server.answer, server.sent = (headers, chunk), 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with pytest.raises(ServerError, match=words) as caught:
            ServerConnection(url=url, retries=0).client().request("models")
        assert "not answered" not in str(caught.value), "it is not asked again"
        assert server.sent < most  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def test_a_packed_body_is_measured_unpacked() -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    server.answer, server.sent = ({"Content-Encoding": "gzip", "Content-Length": str(len(bomb))}, bomb), 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with pytest.raises(ServerError, match="sent more than 32 MiB"):
            ServerConnection(url=url, retries=0).client().request("models")
    finally:
        server.shutdown()
        server.server_close()


def test_the_limit_of_a_body_grows_with_what_was_asked() -> None:
    short = {"prompt": [1] * 10, "max_tokens": 6}
    assert answer_limit(short) < 5 << 20
    whole = {"prompt": [1] * 4096, "max_tokens": 1, "prompt_logprobs": 20}
    entry = len(
        json.dumps({"151935": {"logprob": -12.345678901234567, "rank": 151936, "decoded_token": " " * 128}})
    )
    assert answer_limit(whole) > 4096 * 21 * entry
    assert answer_limit({"messages": [], "model": "m"}) > 65536 * 32
