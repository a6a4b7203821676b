"""Servers of hidden states that are busy, slow, moved or replaced, and the client's end in their midst."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.remote_teachers import SECRET

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import TeacherError
from stillhouse.teachers.hidden.protocol import FINGERPRINT, KEY, VERSION, ServedFacts, pack_tensors
from stillhouse.teachers.hidden.turns import Turns
from stillhouse.teachers.remote import RemoteTeacherConfig

Answer = tuple[int, dict[str, str], bytes]
MARK = "0" * 16
FACTS = ServedFacts(VERSION, MARK, "teacher", "float32", 1024, 4, 64, None, 1.0, None).as_json()
GOOD: dict[str, Answer] = {
    "teacher": (200, {}, json.dumps(FACTS).encode()),
    "head": (200, {}, pack_tensors({"weight": torch.zeros(1024, 4)})),
    "hidden": (200, {}, pack_tensors({"hidden": torch.ones(2, 4)})),
}
ASKED = TokenBatch.of([[3, 5, 7]], [1], pad_id=0)


class Scripted:
    """A server whose answers a test decides, request by request."""

    def __init__(self, answer: Callable[[str], Answer | None]) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.rpartition("/")[2]
                outer.asked.append(path)
                status, headers, body = answer(path) or GOOD[path]
                self.send_response(status)
                for name, value in {FINGERPRINT: MARK, "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scripted]]:
    monkeypatch.setenv(KEY, SECRET)
    begun: list[Scripted] = []

    def one(answer: Callable[[str], Answer | None] = lambda path: None) -> Scripted:
        begun.append(Scripted(answer))
        return begun[-1]

    yield one
    for server in begun:
        server.end()


def only(name: str, *answers: Answer) -> Callable[[str], Answer | None]:
    """These answers for one path, one after the other, and good ones from then on and for the others."""
    left = list(answers)
    return lambda path: left.pop(0) if path == name and left else None


@pytest.mark.parametrize("path", ["teacher", "hidden"])
def test_a_server_that_is_busy_is_asked_again(serving: Callable[..., Scripted], path: str) -> None:
    busy: Answer = (503, {"Retry-After": "0.01"}, b"{}")
    server = serving(only(path, busy, busy))
    states = RemoteTeacherConfig(url=(server.url,)).build(None, 1024).hidden(ASKED)
    assert states.tolist() == [[1.0] * 4] * 2
    assert server.asked.count(path) >= 3


def test_nobody_waits_for_a_server_that_asks_for_an_hour(serving: Callable[..., Scripted]) -> None:
    server = serving(only("hidden", (429, {"Retry-After": "3600"}, b"{}")))
    teacher = RemoteTeacherConfig(url=(server.url,)).build(None, 1024)
    with pytest.raises(TeacherError, match=r"asks to wait 1 h.* with --resume"):
        teacher.hidden(ASKED)


def test_one_that_has_moved_or_been_replaced_is_told(serving: Callable[..., Scripted]) -> None:
    config = RemoteTeacherConfig
    moved = serving(only("teacher", (307, {"Location": "https://gpu1:8600/v1/teacher"}, b"")))
    with pytest.raises(TeacherError, match=r"says that it is at https://gpu1:8600.*correct teacher\.url"):
        config(url=(moved.url,)).check_signal(3)
    for path in ("head", "hidden"):
        replaced = serving(only(path, (200, {FINGERPRINT: "1" * 16}, GOOD[path][2])))
        with pytest.raises(TeacherError, match=f"is of teacher {'1' * 16}, not {MARK}"):
            config(url=(replaced.url,)).build(None, 1024).hidden(ASKED)
    broken = serving(only("head", (200, {}, pack_tensors({"weight": torch.full((1024, 4), torch.nan)}))))
    with pytest.raises(TeacherError, match="the head has numbers that are NaN"):
        config(url=(broken.url,)).build(None, 1024)


def test_a_slow_server_gets_what_it_can_answer_while_the_other_works(
    serving: Callable[..., Scripted],
) -> None:
    """It is let go on only after the other one has answered everything else."""
    go_on = threading.Event()
    count = 12

    def slowly(path: str) -> None:
        if path == "hidden":
            go_on.wait(60)

    def quickly(path: str) -> None:
        if quick.asked.count("hidden") >= count - 2:  # the slow one holds at most two
            go_on.set()

    slow, quick = serving(slowly), serving(quickly)
    teacher = RemoteTeacherConfig(url=(slow.url, quick.url), request_tokens=3).build(None, 1024)
    many = TokenBatch.of([[3, 5, 7 + one] for one in range(count)], [1] * count, pad_id=0)
    assert len(teacher.hidden(many)) == 2 * count
    assert go_on.is_set()
    assert slow.asked.count("hidden") <= 2


def test_closing_gives_up_what_no_server_answers(serving: Callable[..., Scripted]) -> None:
    ended = threading.Event()
    stalled = serving(lambda path: (ended.wait(60), None)[1] if path == "hidden" else None)
    teacher = RemoteTeacherConfig(url=(stalled.url,), timeout=60).build(None, 1024)
    before = set(threading.enumerate())
    teacher.prefetch([ASKED])
    ((running, _),) = teacher._ahead.values()
    assert teacher.close() is None
    assert running.cancelled()
    left = [one for one in set(threading.enumerate()) - before if "process_request" not in one.name]
    assert all(one.daemon for one in left), "nothing that the end of the process waits for"
    ended.set()


def test_each_client_has_its_turn() -> None:
    async def served() -> list[str]:
        turns, order = Turns(), list[str]()

        async def ask(client: str) -> None:
            async with turns.of(client):
                order.append(client)
                await asyncio.sleep(0)

        asked = [asyncio.create_task(ask(client)) for client in ["many"] * 5 + ["one", "gone"]]
        await asyncio.sleep(0)
        asked[-1].cancel()  # a client that goes while it waits takes no turn, and blocks none
        await asyncio.gather(*asked, return_exceptions=True)
        return order

    assert asyncio.run(served()) == ["many", "many", "one", "many", "many", "many"]
