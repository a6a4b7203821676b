"""The command line: one short file for each verb, heavy imports inside the verb."""

from stillhouse.commands.app import main

__all__ = ["main"]
