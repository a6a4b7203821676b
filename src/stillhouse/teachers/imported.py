"""A teacher of which only log-probabilities are left that another program has written down."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from stillhouse.config import FilePath
from stillhouse.errors import ConfigError, Fault
from stillhouse.teachers.base import REGISTRY, AnyTeacher, TeacherConfig
from stillhouse.teachers.cached import CacheTeacherConfig


@REGISTRY.register
class ImportedTeacherConfig(TeacherConfig):
    """Log-probabilities that exist already, such as vLLM's, read by `stillhouse cache import` into a store.

    Example: `teacher: {kind: imported, name: Qwen2.5-72B, k: 20, on_miss: skip}`
    """

    kind: Literal["imported"] = "imported"
    name: str = "imported"
    """Whose log-probabilities they are; tells stores in one folder apart."""
    k: int = Field(20, ge=1)
    """How many of the most probable tokens are stored for each position, at most."""
    folder: FilePath = Path("teacher-cache")
    """Where the store is."""
    on_miss: Literal["error", "skip"] = "error"
    """What happens to a row of the data set that was not imported: `error` ends the run, `skip` leaves such
    rows out before training and counts them."""

    provides: ClassVar[frozenset[str]] = frozenset({"topk"})
    in_process: ClassVar[bool] = False
    caches: ClassVar[bool] = True
    store_command: ClassVar[str] = "stillhouse cache import RUN.YAML FILE"

    @property
    def skips_rows(self) -> bool:
        """Whether rows that are not there are left out."""
        return self.on_miss == "skip"

    def fingerprint(self, memory: Path) -> str:
        """From its name."""
        return hashlib.sha256(f"imported\n{self.name}".encode()).hexdigest()[:16]

    def cache_folders(self) -> dict[str, Path]:
        """That of the store."""
        return {"folder": self.folder}

    @property
    def store(self) -> CacheTeacherConfig:
        """The store as a cached teacher."""
        return CacheTeacherConfig(
            of=self, store="topk", k=self.k, logprobs="float32", folder=self.folder, on_miss="error"
        )

    def check_tokenizer(self, tokenizer: object) -> None:
        """Refuse a student whose tokenizer is not the one that the import was checked against.

        Raises:
            TeacherError: it is not, or nothing was imported.
        """
        self.store.check_tokenizer(tokenizer)

    def build(self, model: nn.Module | None, vocab: int) -> AnyTeacher:
        """The running teacher over its store.

        Raises:
            TeacherError: nothing was imported.
        """
        return self.store.build(None, vocab)


def require_imported(config: TeacherConfig | None, path: str) -> ImportedTeacherConfig:
    """The configuration of a teacher whose log-probabilities are imported.

    Args:
        config: of a teacher.
        path: where it stands in the configuration of the run.

    Raises:
        ConfigError: it is of another kind.
    """
    if isinstance(config, ImportedTeacherConfig):
        return config
    got = "no teacher" if config is None else f"kind {config.kind}"
    hint = f"Set {path}: {{kind: imported, name: NAME, k: 20}}."
    raise ConfigError(Fault(path, "has no store to import into", got=got, hint=hint))
