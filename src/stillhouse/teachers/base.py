"""The interfaces of every teacher signal: hidden states with a head, or a few tokens of each row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import TeacherModel
from stillhouse.remote import ServerConnection

MetricSums = dict[str, tuple[float, float]]
"""Name in the metrics log -> total, and over how many; the log shows the mean."""


@runtime_checkable
class RunningTeacher(Protocol):
    """What every teacher has besides its signal."""

    def pop_metrics(self) -> MetricSums:
        """For the metrics log, such as cache hits since this was last called; empty where there is none."""
        ...

    def usage(self) -> dict[str, Any] | None:
        """URL and counts of the requests to the server that it is on; None if it is on none."""
        ...

    def close(self) -> str | None:
        """Let go of files and connections; a line for whoever ran it, where something was counted."""
        ...


@runtime_checkable
class Teacher(RunningTeacher, Protocol):
    """The teacher's last hidden states for a batch; with `head` they are its exact distribution."""

    @property
    def head(self) -> ModelHead:
        """The teacher's output embedding, which turns its hidden states into logits."""
        ...

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[N, Dt]: a row for each response token of the batch, sequence after sequence, without gradient."""
        ...


@runtime_checkable
class LayerTeacher(Teacher, Protocol):
    """A teacher that shows the hidden states of its layers too."""

    def layers(self, batch: TokenBatch, depths: Sequence[float]) -> tuple[Tensor, dict[float, Tensor]]:
        """As `hidden`, with the hidden states at some depths (0 to 1), by depth."""
        ...


@runtime_checkable
class SparseTeacher(RunningTeacher, Protocol):
    """A teacher that gives log-probabilities of a few tokens of each row only: a sparse cache, a server."""

    form: str
    """"topk", "sampled" or "labels"; the form of what `sparse_logprobs` gives."""

    def sparse_logprobs(self, batch: TokenBatch) -> SparseLogprobs:
        """N rows: one for each response token, sequence after sequence, on the batch's device."""
        ...


@runtime_checkable
class StreamingTeacher(SparseTeacher, Protocol):
    """A sparse teacher that yields one sequence after the other, so that each can be stored at once."""

    def stream(self, batch: TokenBatch) -> Iterator[tuple[int, SparseLogprobs]]:
        """(sequence of the batch, its rows), in any order."""
        ...


@runtime_checkable
class PrefetchingTeacher(RunningTeacher, Protocol):
    """A teacher that is faster when it is asked about all micro-batches of a step at once."""

    def prefetch(self, batches: Sequence[TokenBatch]) -> None:
        """Fetch what it will be asked for each of them."""
        ...


@runtime_checkable
class FollowingTeacher(RunningTeacher, Protocol):
    """A teacher whose weights change with the student's."""

    def follow(self, step: int) -> None:
        """After each optimiser step, with the number of steps done."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


@runtime_checkable
class StoredTeacher(RunningTeacher, Protocol):
    """A teacher that answers from a store."""

    def knows(self, batch: TokenBatch) -> list[bool]:
        """For each sequence whether the store has what it is about."""
        ...


AnyTeacher = Teacher | SparseTeacher


class TeacherConfig(StrictConfig):
    """Where the teacher's signal comes from."""

    kind: str
    provides: ClassVar[frozenset[str]] = frozenset()
    """What it gives to losses (one of "distribution", "topk", "sampled", "labels"; see `core.sparse`),
    "layers" if it shows its hidden states, and "text" if it can write responses."""
    in_process: ClassVar[bool] = True
    """True if it computes in this process, so that autocast around it changes its numbers."""
    model_field: ClassVar[str] = ""
    """Where the model that is loaded stands in the configuration; "": in the configuration itself."""
    caches: ClassVar[bool] = False
    """True if it caches its signal by itself, so that replay need not."""
    of_student: ClassVar[bool] = False
    """True if its model is the student of the run, which `build` then gets."""

    @property
    def keeps_signal(self) -> bool:
        """Whether it says the same about a text at every step, so that replay may keep that."""
        return True

    @property
    def sharded(self) -> bool:
        """Whether several processes share its weights, and so ask it together."""
        return False

    @property
    def copies_student(self) -> bool:
        """Whether it keeps a copy of what is trained of the student in memory."""
        return False

    def check_in_run(self, path: str, own_prompt: bool) -> Iterator[Fault]:
        """What is wrong with it in a run; nothing by default.

        Args:
            path: where it stands in the configuration.
            own_prompt: whether it reads other prompts than the student.
        """
        return iter(())

    store_command: ClassVar[str] = "stillhouse cache build RUN.YAML"
    """What fills its store, where it has one."""

    @property
    def skips_rows(self) -> bool:
        """Whether rows of the data set that its store does not have are left out of the training."""
        return False

    @property
    def fills_cache(self) -> bool:
        """Whether it stores what it computes on disk, so that `stillhouse cache build` can fill its cache."""
        return False

    def model_to_load(self) -> TeacherModel | None:
        """The model that has to be loaded for it; None if there is none."""
        return None

    def model_that_reads(self) -> TeacherModel | None:
        """The model whose tokenizer says how its prompts are read, whether or not it is loaded here."""
        return self.model_to_load()

    @property
    def signals(self) -> frozenset[str]:
        """Of `core.requirements.SIGNALS`: what it `provides`, and its weights where they are loaded."""
        return self.provides | ({"weights"} if self.model_to_load() is not None else set())

    def fingerprint(self, memory: Path) -> str:
        """Hexadecimal digits that change with whatever the teacher's numbers depend on: the key of its cache.

        Args:
            memory: a folder in which the hashes of large files may be remembered.

        Raises:
            ModelError: its files are not there.
            ConfigError: a teacher of this kind cannot be cached.
        """
        raise ConfigError(Fault("teacher.of", "cannot be cached", got=f"kind {self.kind}"))

    def server(self) -> ServerConnection | None:
        """The server that it is on; None if it is on none."""
        return None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers that it asks; () where it asks none."""
        return ()

    def remote_head(self) -> tuple[int, int, int] | None:
        """Rows, width and bytes of a number of the head that is fetched from a server; None where none is.

        Raises:
            TeacherError: the server does not answer.
        """
        return None

    def cache_bytes(
        self, tokens: int, sequences: int, vocab: int, width: int, dtype_bytes: int
    ) -> int | None:
        """Bytes on disk of its cache for so many response tokens of so many sequences; None without one.

        Args:
            tokens: response tokens.
            sequences: that they are in.
            vocab: the height of its head.
            width: of its hidden states.
            dtype_bytes: bytes of one of its weights.
        """
        return None

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student's tokenizer that is not the teacher's, where no model is loaded for it."""

    def served_model(self) -> Mapping[str, str | None] | None:
        """`path`, `digest` and `tokenizer` (`vocab_digest`) of a model in another process that says so; None
        where there is none."""
        return None

    def cache_folders(self) -> dict[str, Path]:
        """The folders on disk that it reads from and adds to, by the field that names each."""
        return {}

    def without_cache(self) -> TeacherConfig:
        """Itself without a store of its own, for a cache around it."""
        return self

    def check_signal(self, tokens: int) -> None:
        """Refuse early what `build` would refuse, where that takes no loaded model.

        Args:
            tokens: length of the longest sequence that it will be asked about.
        """

    @abstractmethod
    def build(self, model: nn.Module | None, vocab: int) -> AnyTeacher:
        """The running teacher; `model` is loaded where the kind has one, and of `of_student` the student's;
        `vocab` counts shared ids."""


REGISTRY: Registry[TeacherConfig] = Registry("teacher", TeacherConfig, "live")  # type: ignore[type-abstract]
TeacherField = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a teacher."""
