"""A server that is not there is told of within seconds; one that was there and went away is waited for."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from stillhouse.errors import ServerError
from stillhouse.remote import ServedModel, ServerConnection
from stillhouse.remote import client as client_module
from tests.servers import Fault, Service, broken, free_port, serving


def answer(path: str, body: Any) -> tuple[int, Any]:
    return 200, {"data": [{"id": "m"}]} if body is None else {"value": 1}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(answer) as running:
        yield running


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_CONTACT", 0.3)


PATIENT: dict[str, Any] = {"retries": 1000, "timeout": 1000.0, "backoff": 0.05}
"""A test that waits for these does not end."""


@pytest.mark.parametrize("model", [None, "m"])
def test_nobody_listens(model: str | None) -> None:
    server = ServerConnection(url=f"http://127.0.0.1:{free_port()}/v1", model=model, **PATIENT)
    with pytest.raises(ServerError, match=r"x no connection\).*Look whether the server runs"):
        server.model_name(server.client())


@pytest.mark.parametrize("model", [None, "m"])
def test_somebody_listens_and_says_nothing(silent: str, model: str | None) -> None:
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s"):
        ServedModel(ServerConnection(url=silent, model=model, **PATIENT), None)


@pytest.mark.parametrize("fault", ["drop", (502, {}), (504, {})], ids=str)
def test_a_proxy_with_nobody_behind(service: Service, fault: Fault) -> None:
    with broken(service.url, lambda n: fault) as proxy, pytest.raises(ServerError, match="not answered"):
        ServerConnection(url=proxy.url, **PATIENT).client().request("models")


def test_a_server_that_says_that_it_is_loading_is_waited_for(service: Service) -> None:
    with broken(service.url, lambda n: (503, {}) if n < 6 else None) as proxy:
        server = ServerConnection(url=proxy.url, **PATIENT | {"backoff": 0.01})
        assert server.model_name(server.client()) == "m"


def test_an_outage_after_the_first_answer_is_waited_for(service: Service) -> None:
    with broken(service.url, lambda n: "drop" if 1 <= n < 8 else None) as proxy:
        client = ServerConnection(url=proxy.url, **PATIENT | {"backoff": 0.01}).client()
        client.reach()
        for _ in range(2):
            assert client.request("completions", {"n": 1}, lambda reply: reply["value"]) == 1
    assert client.usage.retries == 7


@pytest.mark.parametrize("fault", [(401, {}), (404, {}), (500, {})], ids=str)
def test_whatever_a_server_says_shows_that_it_is_there(service: Service, fault: Fault) -> None:
    with broken(service.url, lambda n: fault) as proxy:
        ServerConnection(url=proxy.url, backoff=0.001, retries=2).client().reach()
