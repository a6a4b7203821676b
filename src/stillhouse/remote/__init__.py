"""Talking to OpenAI-compatible servers over HTTP: bounded concurrency, retries, counts."""

from stillhouse.remote.client import Client, Counts
from stillhouse.remote.completions import Abilities, Completions
from stillhouse.remote.server import Server

__all__ = ["Abilities", "Client", "Completions", "Counts", "Server"]
