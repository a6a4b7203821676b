"""The command line: one short file for each verb, heavy imports inside the verb."""

from stillhouse.cli.app import main

__all__ = ["main"]
