"""Uploads an exported folder to the Hugging Face hub, through its own library."""

from __future__ import annotations

from pathlib import Path

from stillhouse import console
from stillhouse.console.format import compact_number
from stillhouse.errors import EnvironmentFault
from stillhouse.models.paths import error_summary
from stillhouse.runs.export.config import ExportConfig


def push_to_hub(folder: Path, config: ExportConfig) -> None:
    """Upload a finished folder as one commit; with `dry_run` only say what would be.

    The token is the library's affair: `hf auth login`, or HF_TOKEN.

    Raises:
        EnvironmentFault: the hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    assert config.repo is not None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if config.dry_run:
        for path in files:
            size = compact_number(path.stat().st_size)
            console.say(f"would be uploaded: {path.relative_to(folder)} ({size} bytes)")
        kind = "private" if config.private else "public"
        console.note(f"Nothing was uploaded to {config.repo} ({kind} if it has to be made).")
        return
    api = HfApi(library_name="stillhouse")
    try:
        made = api.create_repo(config.repo, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Export by Stillhouse")
    except Exception as error:  # the library's, or that of whatever it speaks HTTP with
        raise EnvironmentFault(
            f"--repo {config.repo}: the hub did not take it {error_summary(error)}. The folder is whole. "
            f"Log in (hf auth login, or HF_TOKEN), then: hf upload {config.repo} {folder}"
        ) from error
