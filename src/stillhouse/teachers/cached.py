"""A teacher whose signal is cached on disk, and found again by content: whatever the order, batch or run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from stillhouse.config import Bytes, FilePath, because
from stillhouse.core.head import ModelHead
from stillhouse.core.requirements import LOGPROBS
from stillhouse.errors import ConfigError, Fault, ModelError, TeacherError
from stillhouse.models import TeacherModel, load_tokenizer, local_device, shared_ids, vocab_digest
from stillhouse.remote import ServerConnection
from stillhouse.teachers.base import (
    REGISTRY,
    AnyTeacher,
    Teacher,
    TeacherConfig,
)
from stillhouse.teachers.cached_teachers import CachedSparseTeacher, CachedTeacher
from stillhouse.teachers.store import (
    HEAD,
    DamagedShard,
    Manifest,
    Record,
    Shard,
    Store,
    find_stores,
    write_shard,
)
from stillhouse.teachers.store.codecs import (
    DTYPES,
    RECORD_OVERHEAD,
    Codec,
    HiddenCodec,
    LabelsCodec,
    LogprobDtype,
    SampledCodec,
    SparseCodec,
    TopkCodec,
)

OPTIONS = {
    "hidden": ("dtype",),
    "topk": ("k", "logprobs"),
    "sampled": ("samples", "temperature", "logprobs"),
    "labels": (),
}
"""The fields that belong to each kind of store."""


def parse_of(value: Any) -> Any:
    """The teacher behind a cache: a path alone means a live one."""
    parsed = REGISTRY.parse({"kind": "live", "path": value} if isinstance(value, str) else value)
    return parsed.without_cache()


@REGISTRY.register
class CacheTeacherConfig(TeacherConfig):
    """A teacher's signal on disk: computed once for each text, whatever the order, the batch or the run.

    Example: `teacher: {kind: cache, of: Qwen/Qwen2.5-7B-Instruct, store: hidden}`
    """

    kind: Literal["cache"] = "cache"
    of: Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_of)]
    """The teacher itself: a path, or another teacher's configuration."""
    store: Literal["hidden", "topk", "sampled", "labels"] = "hidden"
    """Last hidden states (exact), the most probable tokens and the mass of the rest (smaller, biased),
    weighted random samples (smaller, unbiased, noisy), or the log-probabilities of the text's own tokens
    alone."""
    folder: FilePath = Path("teacher-cache")
    """Where stores are; any number of runs and teachers may share it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Dtype of stored hidden states; "auto" is that of the teacher's weights and loses nothing. int8 keeps a
    scale for each token."""
    k: int = Field(64, ge=1)
    """How many of the most probable tokens `topk` stores."""
    samples: int = Field(64, ge=1, le=65535)
    """How many samples `sampled` draws for each token, with replacement."""
    temperature: float = Field(1.0, ge=0.5, le=4.0)
    """`sampled` draws from the teacher's distribution at this temperature; its weights undo that."""
    logprobs: LogprobDtype = "float16"
    """Dtype of the log-probabilities of `topk` and `sampled` (there float32 or float16)."""
    on_miss: Literal["fill", "error", "skip"] = "fill"
    """On a cache miss let the teacher compute the record and store it, or stop; with "skip" rows of the data
    set that are not there are left out before training and counted. With "error" and "skip" no teacher is
    loaded."""
    limit: Bytes | None = None
    """Size of the store, such as 20GB, beyond which nothing more is stored."""

    model_field: ClassVar[str] = "of"
    caches = True

    @property
    def fills_cache(self) -> bool:
        """Whether it may compute what is missing."""
        return self.on_miss == "fill"

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.fills_cache else because(f"on_miss: {self.on_miss} stores nothing", "limit")

    def cache_folders(self) -> dict[str, Path]:
        """Its own."""
        return {"folder": self.folder}

    @property
    def skips_rows(self) -> bool:
        """Whether rows that are not there are left out."""
        return self.on_miss == "skip"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.of, CacheTeacherConfig):
            raise ValueError("of is a cache itself; name the teacher behind it")
        if self.of.sharded:
            raise ValueError(
                "of.shard: processes that share a teacher ask it together, and a cache asks about what it "
                "has not; leave shard out, or fill the cache elsewhere and set on_miss: error"
            )
        others = {name for kind, names in OPTIONS.items() for name in names if kind != self.store}
        foreign = sorted((others - set(OPTIONS[self.store])) & self.changed_fields())
        if foreign:
            raise ValueError(f"store: {self.store} has no {' or '.join(foreign)}")
        if self.store == "sampled" and self.logprobs == "uint8":
            raise ValueError("store: sampled keeps log-probabilities as float32 or float16")
        given = self.of.provides & LOGPROBS
        possible = [one for one in ("topk", "labels") if one in given or (one == "labels" and given)]
        if "distribution" not in given and self.store not in possible:
            raise ValueError(
                f"store: {self.store} needs whole distributions, which kind: {self.of.kind} does not give"
                + (f"; set store: {possible[0]}" if possible else "")
            )
        return self

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """What its kind of store gives to losses; text too where the teacher is available."""
        signal = "distribution" if self.store == "hidden" else self.store
        return frozenset({signal}) | (self.of.provides & {"text"} if self.on_miss == "fill" else set())

    def model_to_load(self) -> TeacherModel | None:
        """The teacher behind it; None where a cache miss is an error."""
        return self.of.model_to_load() if self.on_miss == "fill" else None

    def model_that_reads(self) -> TeacherModel | None:
        """The teacher behind it."""
        return self.of.model_that_reads()

    def codec(self, vocab: int, dtype: str | None = None) -> Codec:
        """How records are encoded.

        Args:
            vocab: number of token ids that student and teacher share.
            dtype: that of the teacher's weights, for "auto".
        """
        if self.store == "topk":
            return TopkCodec(self.k, self.logprobs, vocab)
        if self.store == "labels":
            return LabelsCodec()
        if self.store == "sampled":
            assert self.logprobs != "uint8"
            return SampledCodec(self.samples, self.temperature, self.logprobs, vocab)
        return HiddenCodec(dtype or "float32" if self.dtype == "auto" else self.dtype)

    def build(self, model: nn.Module | None, vocab: int) -> AnyTeacher:
        """The running teacher over its store.

        Raises:
            TeacherError: there is no store, and no teacher that could fill one.
        """
        if not self.fills_cache:
            codec = self.codec(vocab)
            folder, manifest = self._existing(codec)
            store = Store(folder, manifest, self.limit)
            if isinstance(codec, SparseCodec):
                return CachedSparseTeacher(store, codec, None, in_process=self.of.in_process)
            codec = HiddenCodec(manifest.codec.removeprefix("hidden-"))
            return CachedTeacher(store, codec, _read_head(folder, vocab), None)
        teacher = self.of.build(model, vocab)
        head = teacher.head.weight if isinstance(teacher, Teacher) else None
        codec = self.codec(vocab, None if head is None else _dtype_of(head))
        manifest = self._manifest(codec, teacher)
        folder = self.folder / f"{manifest.fingerprint}-{codec.name}"
        store = Store(folder, manifest, self.limit)
        if isinstance(codec, SparseCodec):
            return CachedSparseTeacher(store, codec, teacher, in_process=self.of.in_process)
        assert isinstance(codec, HiddenCodec)
        assert isinstance(teacher, Teacher)
        _write_head(folder, manifest, teacher.head)
        return CachedTeacher(store, codec, teacher.head, teacher)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student whose ids are not those of the teacher that filled the store.

        Raises:
            TeacherError: the tokenizers differ, or there is no store.
        """
        if self.on_miss == "fill":
            self.of.check_tokenizer(tokenizer)
            return
        folder, manifest = self._existing(self.codec(len(tokenizer)))
        same = manifest.tokenizer in (None, vocab_digest(tokenizer.get_vocab()))
        if not same and not self._has_more_tokens(tokenizer, manifest):
            raise TeacherError(
                f"{folder}: was filled by a teacher whose tokenizer is not the student's, so its token ids "
                "mean other text. Choose a student of the teacher's family."
            )

    def _has_more_tokens(self, tokenizer: Any, manifest: Manifest) -> bool:
        """Whether the teacher that filled the store has all ids of this tokenizer and others behind; known
        where its tokenizer is on this machine."""
        model = self.of.model_that_reads()
        if model is None:
            return False
        try:
            theirs = load_tokenizer(model)
        except ModelError:
            return False
        filled = vocab_digest(theirs.get_vocab()) == manifest.tokenizer
        return filled and shared_ids(tokenizer, theirs) == len(tokenizer)

    def server(self) -> ServerConnection | None:
        """See the teacher behind it."""
        return self.of.server()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those of the teacher behind it, where it is asked."""
        return self.of.addresses if self.on_miss == "fill" else ()

    def remote_head(self) -> tuple[int, int, int] | None:
        """See the teacher behind it, where it is asked."""
        return self.of.remote_head() if self.on_miss == "fill" else None

    def cache_bytes(self, tokens: int, sequences: int, vocab: int, width: int, dtype_bytes: int) -> int:
        """See `TeacherConfig`."""
        codec = self.codec(vocab, {4: "float32", 2: "bfloat16"}[dtype_bytes])
        size = tokens * codec.row_bytes(width) + RECORD_OVERHEAD * sequences
        head = vocab * width * dtype_bytes if self.store == "hidden" else 0
        return int(min(size, self.limit or size) + head)

    def served_model(self) -> Mapping[str, str | None] | None:
        """See the teacher behind it, where it is asked."""
        return self.of.served_model() if self.on_miss == "fill" else None

    def check_signal(self, tokens: int) -> None:
        """See the teacher behind it."""
        if self.on_miss == "fill":
            self.of.check_signal(tokens)

    def _manifest(self, codec: Codec, teacher: AnyTeacher) -> Manifest:
        """What the shards of a teacher that is available say about it."""
        model = self.of.model_to_load()
        head = teacher.head if isinstance(teacher, Teacher) else None
        return Manifest(
            codec=codec.name,
            fingerprint=self.of.fingerprint(self.folder),
            teacher={name: getattr(self.of, name, None) for name in ("kind", "path", "adapter", "url")},
            tokenizer=(self.of.served_model() or {}).get("tokenizer")
            if model is None
            else vocab_digest(load_tokenizer(model).get_vocab()),
            head={} if head is None else {"scale": head.scale, "softcap": head.softcap},
        )

    def _existing(self, codec: Codec) -> tuple[Path, Manifest]:
        """The folder of a store that another machine or run has filled.

        Raises:
            TeacherError: there is none for this teacher and codec, or more than one.
        """
        path = getattr(self.of, "path", None) or getattr(self.of, "name", None)
        wanted = [codec.name]
        if self.store == "hidden" and self.dtype == "auto":
            wanted = [HiddenCodec(dtype).name for dtype in DTYPES]
        stores = find_stores(self.folder)
        fitting = {folder: one for folder, one in stores.items() if one.codec in wanted}
        try:
            digest = self.of.fingerprint(self.folder)
            fitting = {folder: one for folder, one in fitting.items() if one.fingerprint == digest}
        except ModelError:  # the weights are on another machine: the path that they had there decides
            fitting = {folder: one for folder, one in fitting.items() if one.teacher.get("path") == path}
        if len(fitting) == 1:
            return next(iter(fitting.items()))
        present = ", ".join(folder.name for folder in fitting or stores) or "nothing"
        raise TeacherError(
            f"{self.folder}: holds {len(fitting) or 'no'} stores of {' or '.join(wanted)} for teacher.of "
            f"{path}; there: {present}. "
            + (
                "Name one of them by teacher.dtype or remove the others (stillhouse cache prune --teacher)."
                if fitting
                else f"Fill one: {self.of.store_command}."
            )
        )


def _dtype_of(weight: Tensor) -> str:
    name = str(weight.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _write_head(folder: Path, manifest: Manifest, head: ModelHead) -> None:
    if not (folder / HEAD).is_file():
        tensors = {"weight": head.weight.detach().cpu()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu()
        write_shard(folder / HEAD, manifest, {"head": Record(len(head.weight), tensors)})


def _read_head(folder: Path, vocab: int) -> ModelHead:
    try:
        shard = Shard(folder / HEAD)
        record = shard.read("head")
    except (OSError, DamagedShard):
        record = None
    if record is None:
        raise TeacherError(
            f"{folder / HEAD}: is damaged or missing. Remove it with `stillhouse cache verify --repair`; "
            "`stillhouse cache build` with the teacher available then writes it anew, and the shards stay."
        )
    tensors = {name: one.to(local_device()) for name, one in record.tensors.items()}
    extras = shard.manifest.head
    return ModelHead(tensors["weight"], tensors.get("bias"), extras["scale"], extras["softcap"], vocab)


def cached_in(teacher: TeacherConfig, folder: Path) -> CacheTeacherConfig | None:
    """A teacher with its exact signal cached in a folder; None where it has a cache already, or has none to
    fill: it is the student itself, or gives no hidden states."""
    if teacher.caches or teacher.of_student or "distribution" not in teacher.provides:
        return None
    return CacheTeacherConfig(of=teacher, folder=folder)


def require_cache(config: TeacherConfig | None, path: str = "teacher") -> CacheTeacherConfig:
    """The configuration of a cached teacher.

    Args:
        config: of a teacher.
        path: where it stands in the configuration of the run.

    Raises:
        ConfigError: it is of another kind.
    """
    if isinstance(config, CacheTeacherConfig):
        return config
    got = "no teacher" if config is None else f"kind {config.kind}"
    raise ConfigError(Fault(path, "is not cached", got=got, hint=f"Set {path}: {{kind: cache, of: FOLDER}}."))
