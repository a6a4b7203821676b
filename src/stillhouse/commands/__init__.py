"""The command line: one file a command, named as the command; it imports torch and the like in its function.

A new command is a new file here that decorates its function with `app.command`; no list names it.
"""

import importlib
import pkgutil

from stillhouse.commands.app import main

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["main"]
