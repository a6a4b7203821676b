"""Requests get their answers through every kind of fault, each once, or the error says what happened."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tenacity import AsyncRetrying, RetryCallState
from tenacity import Future as TenacityFuture

from stillhouse.config import Layer, Layered, StrictConfig, validate
from stillhouse.errors import ConfigError, EnvironmentFault, RequestRejected, ServerError
from stillhouse.remote import ServedModel, ServerConnection
from stillhouse.remote.client import Client, is_loopback
from stillhouse.remote.retries import Backoff, TransientError, parse_retry_after
from tests.servers import Fault, Service, broken, free_port, serving


def double(path: str, body: Any) -> tuple[int, Any]:
    if body is None:
        return 200, {"data": [{"id": "one"}]}
    return 200, {"value": 2 * body["n"], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(double) as running:
        yield running


def client(url: str, api_key: str | None = None, **options: Any) -> Client:
    quick = {"backoff": 0.001, "timeout": 10.0, "concurrency": 8, **options}
    return Client(ServerConnection(url=url, **quick), api_key)


def ask_all(asking: Client, count: int) -> list[tuple[int, int]]:
    bodies = [{"n": n} for n in range(count)]
    return list(asking.request_many("completions", bodies, lambda reply: reply["value"]))


def test_every_request_is_answered_once(service: Service) -> None:
    asking = client(service.url)
    assert sorted(ask_all(asking, 50)) == [(n, 2 * n) for n in range(50)]
    assert sorted(body["n"] for body in service.bodies("/v1/completions")) == list(range(50))
    assert vars(asking.usage) == {
        "requests": 50, "retries": 0, "prompt_tokens": 150, "completion_tokens": 50,
    }  # fmt: skip


BEFORE: list[Fault] = ["drop", (429, {}), (500, {}), (503, {"Retry-After": "0"})]
AFTER: list[Fault] = ["lose", "truncate", "garble"]


def test_faults_before_the_server_lose_and_double_nothing(service: Service) -> None:
    with broken(service.url, lambda n: BEFORE[n // 2 % 4] if n % 2 == 0 else None) as proxy:
        asking = client(proxy.url, retries=30)
        assert sorted(ask_all(asking, 60)) == [(n, 2 * n) for n in range(60)]
    assert sorted(body["n"] for body in service.bodies("/v1/completions")) == list(range(60))
    assert set(proxy.done) == {"drop", "429", "500", "503", "passed"}
    assert asking.usage.retries == sum(proxy.done.values()) - 60


def test_lost_and_damaged_answers_are_asked_for_again(service: Service) -> None:
    with broken(service.url, lambda n: AFTER[n // 2 % 3] if n % 2 == 0 else None) as proxy:
        asking = client(proxy.url, retries=30)
        assert sorted(ask_all(asking, 60)) == [(n, 2 * n) for n in range(60)]
    assert set(proxy.done) == {"lose", "truncate", "garble", "passed"}
    # The server cannot know that an answer was lost, but only the damaged ones were asked for twice, and only
    # what was used is counted.
    asked = Counter(body["n"] for body in service.bodies("/v1/completions"))
    assert sum(asked.values()) == 60 + asking.usage.retries
    assert asking.usage.prompt_tokens == 180


def test_stalled_connections_time_out_and_are_repeated(service: Service) -> None:
    with broken(service.url, lambda n: "stall" if n in (1, 4) else None) as proxy:
        asking = client(proxy.url, timeout=0.3)
        assert sorted(ask_all(asking, 8)) == [(n, 2 * n) for n in range(8)]
    assert asking.usage.retries >= 2
    assert proxy.done["stall"] == 2


def test_an_answer_that_comes_in_drops_times_out_too(service: Service) -> None:
    with broken(service.url, lambda n: "drip" if n == 0 else None) as proxy:
        asking = client(proxy.url, timeout=0.5)
        assert ask_all(asking, 1) == [(0, 0)]
    assert (asking.usage.retries, asking.usage.prompt_tokens) == (1, 3)


def test_a_redirection_is_not_followed_but_told(service: Service) -> None:
    away = (307, {"Location": "https://elsewhere.example/v1?key=sk-very-secret"})
    with broken(service.url, lambda n: away) as proxy, pytest.raises(ServerError) as caught:
        ask_all(client(proxy.url, api_key="sk-very-secret"), 1)
    assert "It says that the API is at https://elsewhere.example/v1?key=[key]" in str(caught.value)
    assert proxy.done == {"307": 1}


@pytest.mark.parametrize(
    "value",
    [["x"], {"choices": ["x"]}],
)
def test_odd_answers_are_errors_with_what_came(value: Any) -> None:
    with (
        serving(lambda path, body: (200, value)) as odd,
        pytest.raises(ServerError, match="2 x an unexpected answer"),
    ):
        list(client(odd.url, retries=1).request_many("completions", [{}], lambda reply: reply["value"]))
    with (
        serving(lambda path, body: (200, value)) as odd,
        pytest.raises(ServerError, match="unexpected answer"),
    ):
        ServedModel(ServerConnection(url=odd.url, model="m", retries=0), None)


def test_text_in_any_script_arrives_and_half_a_character_is_refused(service: Service) -> None:
    asking = client(service.url)
    bodies = [{"n": 1, "prompt": "Größe 北京 здравствуйте 👋🏽 \u2028"}]
    assert list(asking.request_many("completions", bodies, lambda reply: reply["value"])) == [(0, 2)]
    assert service.bodies("/v1/completions") == bodies
    with pytest.raises(RequestRejected, match="half a character cannot be sent"):
        list(asking.request_many("completions", [{"n": 1, "prompt": "\ud83d"}]))


def test_giving_up_says_what_happened_how_often_and_what_to_do(service: Service) -> None:
    with broken(service.url, lambda n: (429, {})) as proxy, pytest.raises(ServerError) as caught:
        ask_all(client(proxy.url, retries=3), 1)
    text = str(caught.value)
    assert "4 x status 429 Too Many Requests" in text
    assert "not now" in text  # the server's own words
    assert "lower concurrency" in text


def test_answers_before_a_failure_are_given_first(service: Service) -> None:
    got = []
    with broken(service.url, lambda n: None if n < 5 else (500, {})) as proxy:
        answers = client(proxy.url, retries=1, concurrency=1).request_many(
            "completions", [{"n": n} for n in range(20)]
        )
        with pytest.raises(ServerError, match="asked 2 times"):
            got.extend(index for index, _ in answers)
    assert got == [0, 1, 2, 3, 4]
    assert proxy.done == {"passed": 5, "500": 2}  # nobody goes on with the other fourteen


@pytest.mark.parametrize(("status", "words"), [(400, "not now"), (401, "key_env"), (404, "model")])
def test_a_refusal_is_not_repeated(service: Service, status: int, words: str) -> None:
    with broken(service.url, lambda n: (status, {})) as proxy, pytest.raises(RequestRejected, match=words):
        ask_all(client(proxy.url), 1)
    assert sum(proxy.done.values()) == 1


def test_an_answer_of_another_form_is_repeated_and_then_shown(service: Service) -> None:
    asking = client(service.url, retries=2)
    with pytest.raises(ServerError, match=r"3 x an unexpected answer.*'wrong'.*got .*value"):
        asking.request("completions", {"n": 1}, lambda reply: reply["wrong"])


def test_nobody_listens() -> None:
    with pytest.raises(ServerError, match=r"2 x no connection.*Look whether the server runs"):
        client(f"http://127.0.0.1:{free_port()}", retries=1).request("models")


def test_a_server_that_asks_for_hours_is_not_waited_for(service: Service) -> None:
    with broken(service.url, lambda n: (429, {"Retry-After": "7200"})) as proxy:
        with pytest.raises(ServerError, match="asks to wait 2 h 00 min"):
            client(proxy.url).request("models")
        assert sum(proxy.done.values()) == 1


def test_retry_after_is_waited_for(service: Service) -> None:
    start = time.monotonic()
    with broken(service.url, lambda n: (429, {"Retry-After": "1"}) if n == 0 else None) as proxy:
        assert ask_all(client(proxy.url), 1) == [(0, 0)]
    assert time.monotonic() - start >= 1.0


def test_leaving_early_hangs_up(service: Service) -> None:
    answers = client(service.url, concurrency=2).request_many("completions", [{"n": n} for n in range(1000)])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(service.bodies("/v1/completions")) < 1000


def test_it_works_where_an_event_loop_runs_already(service: Service) -> None:
    async def notebook() -> list[tuple[int, int]]:
        return ask_all(client(service.url), 3)

    assert sorted(asyncio.run(notebook())) == [(0, 0), (1, 2), (2, 4)]


def test_the_key_is_sent_and_never_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret")
    server = ServerConnection(url=service.url, key_env="SECRET_KEY", retries=0)
    server.client().request("models")
    assert service.headers[-1]["authorization"] == "Bearer sk-very-secret"
    assert "sk-very" not in server.model_dump_json()
    with (
        serving(lambda path, body: (401, {"error": "wrong key sk-very-secret"})) as refusing,
        pytest.raises(RequestRejected, match=r"wrong key \[key\]") as caught,
    ):
        ServerConnection(url=refusing.url, key_env="SECRET_KEY").client().request("models")
    shown = "".join(traceback.format_exception(caught.value))
    assert "sk-very" not in shown, "not in what led to it either"


@pytest.mark.parametrize("key", ["sk-hunter2\nHost: x", "sk hunter2", "sk-hunter2\u2026"])
def test_what_cannot_be_a_key_is_refused_and_not_repeated(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", key)
    with pytest.raises(EnvironmentFault, match="SECRET_KEY holds spaces") as caught:
        ServerConnection(url="http://127.0.0.1:1/v1", key_env="SECRET_KEY").client()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_is_not_there_is_an_error() -> None:
    assert "NO_SUCH_KEY" not in os.environ
    with pytest.raises(EnvironmentFault, match="NO_SUCH_KEY"):
        ServerConnection(url="http://127.0.0.1:1/v1", key_env="NO_SUCH_KEY").client()


@pytest.mark.parametrize(
    ("fields", "secret"),
    [
        ({"url": "http://user:hunter2@host/v1"}, "hunter2"),
        ({"url": "https://host/v1?api_key=hunter2"}, "hunter2"),
        ({"url": "http://host/v1", "key_env": "sk-hunter2"}, "hunter2"),
        ({"url": "host:8000"}, None),
    ],
)
def test_secrets_in_the_configuration_are_refused_and_not_repeated(
    fields: dict[str, Any], secret: str | None
) -> None:
    class Tree(StrictConfig):
        server: ServerConnection

    with pytest.raises(ConfigError, match="server") as caught:
        validate(Tree, Layered.merged(Layer.of({"server": fields}, "run.yaml")))
    if secret is not None:
        assert secret not in str(caught.value)


def test_the_served_model_is_found_when_there_is_one(service: Service) -> None:
    server = ServerConnection(url=service.url)
    assert server.model_name(server.client()) == "one"
    with serving(lambda path, body: (200, {"data": [{"id": "a"}, {"id": "b"}]})) as two:
        server = ServerConnection(url=two.url)
        with pytest.raises(ServerError, match=r"2 models \(a, b\). Set model"):
            server.model_name(server.client())


def test_loopback_is_recognised() -> None:
    assert all(map(is_loopback, ("http://127.0.0.1:80", "http://localhost/v1", "http://[::1]:8000")))
    assert not is_loopback("https://api.example.org")


def test_proxies_do_not_stand_before_loopback(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert ask_all(client(service.url), 1) == [(0, 0)]


def test_pauses_double_up_to_a_limit_and_are_reproducible() -> None:
    def waits(failure: TransientError, seed: int, attempts: int = 12) -> list[float]:
        backoff, state = Backoff(0.5, seed), RetryCallState(AsyncRetrying(), None, (), {})
        found = []
        for attempt in range(1, attempts + 1):
            state.attempt_number = attempt
            state.outcome = TenacityFuture.construct(attempt, failure, has_exception=True)
            found.append(backoff(state))
        return found

    failure = TransientError("status 500")
    found = waits(failure, seed=7)
    assert found == waits(failure, seed=7)
    assert all(0.25 * 2**n <= value < 0.5 * 2**n for n, value in enumerate(found[:7]))
    assert 30.0 <= min(found[7:]) <= max(found[7:]) < 60.0, "a minute, times a half to one"
    assert waits(TransientError("status 429", retry_after=33.0), seed=7, attempts=1) == [33.0]
    assert waits(failure, seed=8)[0] != found[0]


def test_retry_after_as_seconds_and_as_a_date() -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert parse_retry_after({"retry-after": "1.5"}) == 1.5
    assert parse_retry_after({"retry-after": "Thu, 01 Jan 2026 00:00:09 GMT"}, now) == 9.0
    assert [parse_retry_after({"retry-after": text}) for text in ("soon", "inf", "nan", "")] == [None] * 4
    assert parse_retry_after({}) is None


def test_a_real_server_answers(llama_server: str) -> None:
    server = ServerConnection(url=llama_server)
    asking = server.client()
    assert server.model_name(asking) == "smollm2"
    body = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    text = asking.request("completions", body, lambda reply: reply["choices"][0]["text"])
    assert "Paris" in text
    assert asking.usage.completion_tokens == 3


@pytest.mark.parametrize("usage", ["x", {"prompt_tokens": "x"}, {"prompt_tokens": None}])
def test_a_usage_that_is_no_number_of_tokens_is_not_counted(usage: Any) -> None:
    with serving(lambda path, body: (200, {"value": 1, "usage": usage})) as odd:
        asking = client(odd.url, retries=0)
        found = list(asking.request_many("completions", [{}], lambda reply: reply["value"]))
    assert found == [(0, 1)]
    assert asking.usage.prompt_tokens == 0
