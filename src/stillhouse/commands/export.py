"""stillhouse export: a finished student as a folder that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import faults_as_options


@app.command("export", rich_help_panel=RESULTS)
def export(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder, or the folder of any model.", metavar="RUN", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", help="safetensors, gguf, onnx, or hub.")] = "safetensors",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new folder; default: RUN/export/TARGET.", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, of gguf also q8_0; auto: as stored; onnx: float32 alone."
        ),
    ] = "auto",
    repo: Annotated[
        str | None, typer.Option(help="With --to hub: org/name there.", show_default=False)
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="With --to hub: who sees a new repository.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --to hub: list what would be uploaded.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(help="Question of the smoke test; default: the first held-out one.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Length limit of the smoke test's answer.", min=1)] = 64,
    smoke_test: Annotated[
        bool, typer.Option(help="Run the export's own smoke test; one that fails leaves nothing behind.")
    ] = True,
) -> None:
    """Export a student: merged weights, tokenizer, chat template, end tokens, card and a smoke test.

    The folder needs no Stillhouse. It is written whole and tested, or not at all.
    """
    from stillhouse.config import Layer, Layered, validate
    from stillhouse.runs.export.config import ExportConfig
    from stillhouse.runs.export.targets import export_student

    options = {
        "to": to, "dtype": dtype, "repo": repo, "private": private, "dry_run": dry_run, "prompt": prompt,
        "max_tokens": max_tokens, "smoke_test": smoke_test,
    }  # fmt: skip
    with faults_as_options({name: f"--{name.replace('_', '-')}" for name in options}):
        config, _ = validate(ExportConfig, Layered.merged(Layer.of(options, "command line")))
    folder = export_student(run, config, output or run / "export" / config.to)
    if config.to == "hub" and not config.dry_run:
        console.say(f"hub: {config.repo}")
    console.say(f"{'safetensors' if config.to == 'hub' else config.to}: {folder}")
