"""How a configuration names a server: its address, its key, and how patiently to ask."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from stillhouse.config import StrictConfig
from stillhouse.errors import EnvironmentFault, ServerError

if TYPE_CHECKING:
    from stillhouse.remote.client import Client


def check_url(value: str, example: str) -> str:
    """A URL that leads to a server and holds no secret; for validators of configurations.

    Raises:
        PydanticCustomError: it is none, or holds one.
    """
    parts = urlsplit(value)
    _ = parts.port  # which raises a ValueError of its own where it is none
    if value.split() != [value] or parts.scheme not in ("http", "https") or not parts.hostname:
        raise PydanticCustomError("url", "must look like {example}", {"example": example})
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise PydanticCustomError(
            "url_secret",
            "must hold no user, password or query, because run folders keep it; put the key into an "
            "environment variable and name that in key_env (got {it})",
            {"it": f"{parts.scheme}://{parts.hostname}/..."},
        )
    return value


def check_key_env(value: str | None) -> str | None:
    """The name of an environment variable; for validators of configurations, which run folders keep.

    Raises:
        PydanticCustomError: it is none.
    """
    if value is not None and not (value.isidentifier() and value.isupper()):
        # Somebody may have put the key itself here, so the message does not repeat it.
        raise PydanticCustomError(
            "key_env",
            "must be the name of an environment variable in capitals, such as OPENAI_API_KEY, and never "
            "the key itself (got {it})",
            {"it": f"{len(value)} characters that are none"},
        )
    return value


class ServerConnection(StrictConfig):
    """An OpenAI-compatible server: vLLM, llama.cpp, SGLang, TGI, Ollama, LM Studio or a hosted one.

    Example: `ServerConnection(url="http://127.0.0.1:8000/v1", concurrency=64)`
    """

    url: str
    """Where the API is, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """The name under which the server knows the model; default: the only one that it serves."""
    key_env: str | None = None
    """Name of the environment variable that holds the API key. The key itself is never written anywhere."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    """Most requests in flight at a time."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Most retries of a request that was rate-limited, timed out or broke off, with exponential backoff. A
    server that has never answered is given up after a few seconds."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds to wait for a whole response; a long text on a busy server takes its time."""
    backoff: Annotated[float, Field(gt=0)] = 0.5
    """Seconds before the first retry; doubled each time, up to a minute."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        return check_url(value, "http://HOST:PORT/v1")

    @field_validator("key_env")
    @classmethod
    def _check_key_env(cls, value: str | None) -> str | None:
        return check_key_env(value)

    def client(self) -> Client:
        """A client with these settings; nothing is sent yet.

        Raises:
            EnvironmentFault: a package is not installed, or the environment variable is not set.
        """
        try:
            from stillhouse.remote.client import Client
        except ImportError as error:
            raise EnvironmentFault(
                "servers need the packages httpx and tenacity. Install them with: pip install "
                "'stillhouse[server]'"
            ) from error
        return Client(self, self.api_key())

    def api_key(self) -> str | None:
        """The API key from the environment.

        Raises:
            EnvironmentFault: the variable is not set, or holds what cannot be a key.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise EnvironmentFault(
                f"key_env: the environment variable {self.key_env}, which should hold the key for "
                f"{self.url}, is not set."
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise EnvironmentFault(
                f"key_env: the environment variable {self.key_env} holds spaces, line breaks or characters "
                "that no key has. Look at what was pasted there."
            )
        return key

    def model_name(self, client: Client) -> str:
        """The name to request: `model`, or the only one that the server lists.

        Raises:
            ServerError: the server does not answer, or lists no model or several.
        """
        if self.model is not None:
            client.reach()  # a dead server is told of now, and not when a long first answer fails to come
            return self.model
        names = client.request("models", parse=lambda reply: [str(model["id"]) for model in reply["data"]])
        if len(names) != 1:
            listed = ", ".join(names[:10]) or "none"
            raise ServerError(
                f"{client.url}: serves {len(names)} models ({listed}). Set model to one of them."
            )
        return names[0]
