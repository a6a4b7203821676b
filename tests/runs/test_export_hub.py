"""`--to hub` against a server on this machine that answers as the hub does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stillhouse.errors import EnvironmentFault
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.targets import export_student
from tests.runs.test_export_gguf import MODELS, make


class Hub(BaseHTTPRequestHandler):
    """Makes a repository, takes every file as a regular one, and keeps what was posted."""

    posted: list[tuple[str, list[Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).splitlines()
        self.posted.append((self.path, [json.loads(line) for line in body]))
        [first] = self.posted[-1][1][:1]
        answers: dict[str, Any] = {
            "/api/repos/create": {"url": "http://127.0.0.1/me/tiny", "id": "1"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/me/tiny/preupload/main": {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in first.get("files", [])
                ]
            },
            "/api/models/me/tiny/commit/main": {
                "success": True,
                "commitOid": "0",
                "commitUrl": "http://127.0.0.1/me/tiny/commit/0",
            },
        }
        self._say(answers.get(self.path, {}))

    def do_GET(self) -> None:
        self._say({})

    def _say(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"posted": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this server is on this machine
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_folder_is_uploaded_whole_and_private(hub: type[Hub], tmp_path: Path) -> None:
    config = ExportConfig(to="hub", repo="me/tiny", smoke_test=False, max_tokens=2)
    folder = export_student(make(tmp_path / "tiny", MODELS["llama"]), config, tmp_path / "out")
    posted = dict(hub.posted)
    assert posted["/api/repos/create"][0].get("visibility") == "private"
    sent = {
        line["value"]["path"] for line in posted["/api/models/me/tiny/commit/main"] if line["key"] == "file"
    }
    assert sent == {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "README.md", "smoke_test.py"} <= sent


def test_a_dry_run_lists_and_asks_nobody(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig(to="hub", repo="me/tiny", dry_run=True, smoke_test=False, max_tokens=2)
    folder = export_student(make(tmp_path / "tiny", MODELS["llama"]), config, tmp_path / "out")
    assert "would be uploaded: model.safetensors" in capsys.readouterr().out
    assert not hub.posted
    assert (folder / "model.safetensors").is_file()


def test_a_hub_that_cannot_be_reached_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = ExportConfig(to="hub", repo="me/tiny", smoke_test=False, max_tokens=2)
    with pytest.raises(EnvironmentFault, match="hf upload me/tiny"):
        export_student(make(tmp_path / "tiny", MODELS["llama"]), config, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_repository_is_the_hubs_alone() -> None:
    for options in ({"to": "hub"}, {"to": "gguf", "repo": "me/tiny"}):
        with pytest.raises(ValueError, match="belong together"):
            ExportConfig.model_validate(options)
