"""Models on OpenAI-compatible servers: bounded concurrency, retries, and what a server can do."""

from stillhouse.remote.completions import Capabilities, CompletionChoice, ServedModel
from stillhouse.remote.config import ServerConnection, check_key_env, check_url

__all__ = [
    "Capabilities",
    "CompletionChoice",
    "ServedModel",
    "ServerConnection",
    "check_key_env",
    "check_url",
]
