"""A teacher in other processes: the live teacher's numbers, several servers, kills, stalls, wrong models."""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.remote_teachers import SECRET, TEACHER, Process, teacher_process

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import ConfigError, EnvironmentFault, TeacherError
from stillhouse.models import load_teacher
from stillhouse.models.config import TeacherModel
from stillhouse.runs.serve import ServeConfig, serve, taken_socket
from stillhouse.teachers.cached import CacheTeacherConfig
from stillhouse.teachers.hidden.protocol import (
    DTYPE,
    FINGERPRINT,
    KEY,
    VERSION,
    ServedFacts,
    pack_request,
    pack_tensors,
    unpack_request,
)
from stillhouse.teachers.live import LiveTeacher, LiveTeacherConfig
from stillhouse.teachers.remote import RemoteTeacherConfig


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    begun: list[Process] = []

    def one(**options: Any) -> Process:
        folder = tmp_path / f"server{len(begun)}"
        folder.mkdir()
        begun.append(Process(folder, **options))
        return begun[-1]

    yield one
    for process in begun:
        process.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with teacher_process(tmp_path_factory.mktemp("shared")) as process:
        yield process


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)


def batch(seed: int = 0, count: int = 5) -> TokenBatch:
    torch.manual_seed(seed)
    ids = [torch.randint(2, 900, (int(n),)).tolist() for n in torch.randint(6, 24, (count,))]
    trained = [None, (1, 0, *([1] * (len(ids[1]) - 5))), *[None] * (count - 2)]
    return TokenBatch.of(ids, [3] * count, pad_id=0, trained=trained)


def live() -> LiveTeacher:
    return LiveTeacher(load_teacher(TeacherModel(path=TEACHER, dtype="float32")), 1024)


def remote(*urls: str, **options: Any) -> RemoteTeacherConfig:
    return RemoteTeacherConfig(url=urls, **options)


def test_it_gives_the_numbers_of_the_live_teacher(shared: Process, tmp_path: Path) -> None:
    config = remote(shared.url, request_tokens=20)
    teacher, exact = config.build(None, 1024), live()
    asked = batch()
    expected = exact.hidden(asked)
    torch.testing.assert_close(teacher.hidden(asked), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        teacher.head.logits(teacher.hidden(asked)).log_softmax(-1),
        exact.head.logits(expected).log_softmax(-1),
        rtol=0,
        atol=1e-5,
    )
    teacher.prefetch([batch(1), asked])
    sent = teacher.tokens
    torch.testing.assert_close(teacher.hidden(asked), expected, rtol=0, atol=1e-5)
    assert teacher.tokens == sent, "what was asked for ahead is not asked for again"
    for dtype, near in (("bfloat16", 1e-2), ("int8", 2e-2)):
        rounded = remote(shared.url, dtype=dtype).build(None, 1024).hidden(asked).float()
        assert 0 < (rounded - expected).norm() / expected.norm() < near
    assert config.fingerprint(tmp_path) == LiveTeacherConfig(path=TEACHER, dtype="float32").fingerprint(
        tmp_path
    )
    assert remote(shared.url, dtype="int8").fingerprint(tmp_path) != config.fingerprint(tmp_path)
    line = teacher.close()
    assert line is not None
    assert shared.url in line


def test_its_cache_is_that_of_the_live_teacher(shared: Process, tmp_path: Path) -> None:
    cache: dict[str, Any] = {"store": "hidden", "folder": str(tmp_path)}
    over = CacheTeacherConfig(of=remote(shared.url), **cache).build(None, 1024)
    first = batch()
    over.prefetch([first])  # type: ignore[union-attr]
    states = over.hidden(first)  # type: ignore[union-attr]
    assert over.close() is not None
    of = {"kind": "live", "path": TEACHER, "dtype": "float32"}
    model = load_teacher(TeacherModel(path=TEACHER, dtype="float32"))
    again = CacheTeacherConfig(of=of, **cache).build(model, 1024)
    torch.testing.assert_close(again.hidden(first), states, rtol=0, atol=0)  # type: ignore[union-attr]
    assert again.pop_metrics()["cache/hits"] == (5, 5)


def test_a_killed_and_a_stalled_server_cost_no_answer(start: Callable[..., Process]) -> None:
    one, other = start(), start()
    teacher = remote(one.url, other.url, timeout=1.5, request_tokens=8).build(None, 1024)
    expected = live().hidden(batch())
    torch.testing.assert_close(teacher.hidden(batch()), expected, rtol=0, atol=1e-5)
    assert all(teacher._client.counts().values()), "both are asked"
    other.send(signal.SIGSTOP)
    torch.testing.assert_close(teacher.hidden(batch()), expected, rtol=0, atol=1e-5)
    other.end()
    torch.testing.assert_close(teacher.hidden(batch()), expected, rtol=0, atol=1e-5)
    assert teacher._client.retries > 0
    one.end()
    dead = remote(one.url, other.url, retries=1, timeout=1.0)
    with pytest.raises(TeacherError, match="does not answer"):
        dead.check_signal(10)
    teacher._client._settings = dead
    with pytest.raises(TeacherError, match="gave no answer, asked 2 times"):
        teacher.hidden(batch())


def test_servers_of_different_weights_are_refused(start: Callable[..., Process], shared: Process) -> None:
    rounded = start(dtype="bfloat16")
    with pytest.raises(TeacherError, match="must serve the same weights in the same dtype"):
        remote(shared.url, rounded.url).build(None, 1024)
    teacher = remote(shared.url).build(None, 1024)
    teacher._client._servers[0].url = rounded.url  # as if it had been started anew with other weights
    with pytest.raises(TeacherError, match=r"status 409.*start that teacher again"):
        teacher.hidden(batch())


def test_the_server_refuses_what_it_does_not_know(shared: Process) -> None:
    asked = pack_request(batch(), range(5))
    headers = {"Authorization": f"Bearer {SECRET}", DTYPE: "float32"}
    short = batch()

    def status(path: str = "/v1/hidden", content: bytes | None = asked, **changed: str) -> tuple[int, str]:
        given = {**headers, **{name.replace("_", "-"): value for name, value in changed.items()}}
        answer = httpx.request(
            "GET" if content is None else "POST", shared.url + path, content=content, headers=given
        )
        return answer.status_code, answer.text

    assert status()[0] == 200
    for path in ("/v1/hidden", "/v1/teacher", "/v1/head"):
        content = asked if path == "/v1/hidden" else None
        assert status(path, content, Authorization="Bearer other")[0] == 401
    assert status("/v1/completions")[0] == 404
    assert status(**{FINGERPRINT: "0" * 16})[0] == 409
    assert status(**{DTYPE: "float8"})[0] == 400
    assert "safetensors" in status(content=b"{}")[1]
    assert "safetensors" in status(content=asked[:-3])[1]
    foreign = TokenBatch.of([[3, 5, 1024]], [1], pad_id=0)
    assert "another tokenizer" in status(content=pack_request(foreign, [0]))[1]
    long = TokenBatch.of([[3] * 5000], [1], pad_id=0)
    assert "the teacher takes" in status(content=pack_request(long, [0]))[1]
    again = unpack_request(asked, 1024, None)
    assert again.token_ids == short.token_ids
    assert again.row_counts == short.row_counts
    torch.testing.assert_close(again.row_labels(), short.row_labels())


def test_what_a_user_gets_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Process
) -> None:
    with pytest.raises(ValueError, match="each once"):
        remote(shared.url, shared.url)
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        remote("gpu1:8600")
    with pytest.raises(TeacherError, match="takes"):
        remote(shared.url).check_signal(100_000)
    monkeypatch.delenv(KEY)
    with pytest.raises(EnvironmentFault, match=f"{KEY} is not set"):
        remote(shared.url).client()
    with pytest.raises(ConfigError, match="others can reach this address"):
        serve(ServeConfig(path=TEACHER, host="0.0.0.0", port=0))
    taken = int(shared.url.rpartition(":")[2])
    with pytest.raises(EnvironmentFault, match="cannot be listened on"):
        serve(ServeConfig(path=TEACHER, port=taken))


def test_nobody_connects_before_the_teacher_is_loaded() -> None:
    with taken_socket(ServeConfig(path=TEACHER, port=0)) as taken:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(taken.getsockname(), timeout=5)
        taken.listen()
        socket.create_connection(taken.getsockname(), timeout=5).close()


@contextlib.contextmanager
def answers(**bodies: bytes) -> Iterator[str]:
    """A server whose answers are these, by the last part of the path; its URL."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header(FINGERPRINT, "0" * 16)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(bodies[self.path.rpartition("/")[2]])

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


FACTS = ServedFacts(VERSION, "0" * 16, "teacher", "float32", 1024, 4, 64, None, 1.0, None).as_json()
HEAD = pack_tensors({"weight": torch.zeros(1024, 4)})


@pytest.mark.parametrize(
    "description",
    [
        b'{"data": []}',
        b"[" * 5000,
        b"{" + b" " * (1 << 17) + json.dumps(FACTS).encode()[1:],
        json.dumps({**FACTS, "rows": "many"}).encode(),
        json.dumps({**FACTS, "scale": float("nan")}).encode(),
        json.dumps({**FACTS, "dtype": "int8"}).encode(),
    ],
    ids=["other", "nested", "large", "rows", "scale", "dtype"],
)
def test_a_server_of_something_else_is_told_from_one_of_ours(description: bytes) -> None:
    with (
        answers(teacher=description) as url,
        pytest.raises(TeacherError, match="is no server of"),
    ):
        remote(url).check_signal(10)


@pytest.mark.parametrize(
    ("head", "hidden", "told"),
    [
        (pack_tensors({"weight": torch.zeros(1024, 4).half()}), b"", "the head is not one"),
        (HEAD + bytes(1 << 17), b"", "the head is not one: .* more than"),
        (HEAD, pack_tensors({"hidden": torch.zeros(2, 4).half()}), "not whole"),
        (HEAD, bytes(1 << 17), "more than"),
        (HEAD, pack_tensors({"hidden": torch.tensor([[0.0] * 4, [0, 0, torch.nan, 0]])}), "NaN or infinite"),
    ],
    ids=["dtype of the head", "size of the head", "dtype", "size", "nan"],
)
def test_what_a_server_answers_is_checked_before_it_is_used(head: bytes, hidden: bytes, told: str) -> None:
    asked = TokenBatch.of([[3, 5, 7]], [1], pad_id=0)
    with (
        answers(teacher=json.dumps(FACTS).encode(), head=head, hidden=hidden) as url,
        pytest.raises(TeacherError, match=told),
    ):
        remote(url, retries=0).build(None, 1024).hidden(asked)
