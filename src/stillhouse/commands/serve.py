"""stillhouse serve: a teacher for runs in other processes and on other machines."""

from __future__ import annotations

from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("serve", rich_help_panel=RUN)
def serve(file: RunFile, overrides: Overrides = None) -> None:
    """Serve a teacher's hidden states, as a YAML file says (path, dtype, host, port, key_env).

    Runs ask it by teacher: {kind: remote, url: http://HOST:PORT}.
    """
    from stillhouse.runs.serve import serve as answer
    from stillhouse.runs.serve import serve_config

    answer(serve_config(file, list(overrides or ())))
