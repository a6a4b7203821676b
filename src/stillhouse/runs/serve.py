"""Serves a teacher's hidden states to runs in other processes and on other machines."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from stillhouse import console
from stillhouse.config import read_config
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.models import (
    fingerprint_of_files,
    load_teacher,
    load_tokenizer,
    local_device,
    unwrap,
    vocab_digest,
)
from stillhouse.models.config import TeacherModel
from stillhouse.models.hidden import head_of
from stillhouse.remote import check_key_env
from stillhouse.remote.client import is_loopback
from stillhouse.runs.checks import context_length
from stillhouse.teachers.hidden.protocol import KEY, VERSION, ServedFacts

logger = logging.getLogger("stillhouse")

KEEP_ALIVE = 60
"""Seconds for which a connection without a request stays open: longer than a client keeps one, so that none
is closed at the moment at which it is used."""
GRACE = 5
"""Seconds that requests under way have when the server is asked to end."""


class ServeConfig(TeacherModel):
    """A teacher, and where it answers.

    Example: `{path: Qwen/Qwen2.5-7B-Instruct, dtype: bfloat16, host: 0.0.0.0, key_env: TEACHER_KEY}`
    """

    host: str = "127.0.0.1"
    """The address to listen on; anything but this machine's own loopback needs `key_env`. The connection is
    not encrypted: let it go through a network that you trust, or a tunnel."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8600
    """The port; 0: any that is free."""
    key_env: str | None = None
    """Name of the environment variable with the key that every request has to bring; by default
    STILLHOUSE_TEACHER_KEY, and without that a new one, which is printed."""
    batch_tokens: int = Field(16_384, ge=1)
    """Most tokens of a forward pass, padding included; a longer sequence goes alone."""

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return check_key_env(value)


def serve_config(file: Path, overrides: list[str]) -> ServeConfig:
    """The configuration of a server: its file with the command line's values on top.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    return read_config(ServeConfig, file, overrides)


def serve(config: ServeConfig) -> None:
    """Load the teacher and answer until a signal.

    Raises:
        ConfigError: the address is open to others and there is no key.
        EnvironmentFault: a package is missing, or the port is taken.
        ModelError: the model cannot be loaded.
    """
    try:
        import uvicorn

        from stillhouse.teachers.hidden.server import HiddenServer
    except ImportError as error:
        raise EnvironmentFault(
            "`stillhouse serve` needs the packages starlette and uvicorn. Install them with: pip install "
            "'stillhouse[serve]'"
        ) from error
    key, new = _key(config)
    taken = taken_socket(config)
    with taken, console.phase("Loading the teacher", quiet=True):
        model = load_teacher(config).to(local_device())
        facts = served_facts(config, model)
        app = HiddenServer(model, facts, key, config.batch_tokens).app()
        host, port = taken.getsockname()[:2]
        _checked(taken.listen, host, port)  # who connects before is refused, and asks another server at once
        console.say(f"{facts.path} ({facts.fingerprint}, {facts.dtype}) at http://{_in_url(host)}:{port}")
        if new:
            console.say(f"Key of this server: export {KEY}={key}")
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        )
        uvicorn.Server(settings).run(sockets=[taken])


def served_facts(config: ServeConfig, model: Any) -> ServedFacts:
    """What the server says about a loaded teacher."""
    head = head_of(model)
    return ServedFacts(
        VERSION,
        fingerprint_of_files(config),
        config.path,
        str(head.weight.dtype).removeprefix("torch."),
        int(head.weight.shape[0]),
        int(head.weight.shape[1]),
        context_length(unwrap(model).config),
        vocab_digest(load_tokenizer(config).get_vocab()),
        head.scale,
        head.softcap,
    )


def _key(config: ServeConfig) -> tuple[str, bool]:
    """The key, and whether it is new."""
    found = os.environ.get(config.key_env or KEY, "").strip()
    if found:
        return found, False
    if config.key_env is not None:
        raise EnvironmentFault(f"key_env: the environment variable {config.key_env} is not set.")
    if not is_loopback(f"http://{_in_url(config.host)}"):
        raise ConfigError(
            Fault(
                "key_env",
                "is needed: others can reach this address",
                got=f"host={config.host}",
                hint=f"Put a key into an environment variable and name it, or set {KEY}.",
            )
        )
    return secrets.token_urlsafe(24), True


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def taken_socket(config: ServeConfig) -> socket.socket:
    """The address, taken before the model is loaded; nobody can connect yet."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        _checked(lambda: taken.bind((config.host, config.port)), config.host, config.port)
    except EnvironmentFault:
        taken.close()
        raise
    return taken


def _checked(use: Callable[[], None], host: str, port: int) -> None:
    """Bind or listen.

    Raises:
        EnvironmentFault: another program has the address, or there is none such.
    """
    try:
        use()
    except (OSError, OverflowError) as error:
        raise EnvironmentFault(
            f"{host}:{port} cannot be listened on ({error}). Choose another host or port."
        ) from error
