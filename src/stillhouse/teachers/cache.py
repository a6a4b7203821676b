"""The configuration of a cached teacher, and the folder in which its stores are."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import nn

from stillhouse.config import FilePath
from stillhouse.core.head import ModelHead
from stillhouse.errors import ModelError, TeacherError
from stillhouse.files import atomic
from stillhouse.models import TeacherModel, load_tokenizer, own_device, tokenizer_digest
from stillhouse.teachers.base import REGISTRY, AnyTeacher, Teacher, TeacherConfig
from stillhouse.teachers.cached import CachedCompact, CachedTeacher
from stillhouse.teachers.forms import DTYPES, CompactForm, DrawsForm, Form, HiddenForm, Number, TopForm
from stillhouse.teachers.store import Store, care
from stillhouse.teachers.store.care import FACTS, HEAD

logger = logging.getLogger("stillhouse")

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
OPTIONS = {"hidden": ("dtype",), "topk": ("k", "logprobs"), "sampled": ("draws", "temperature", "logprobs")}
"""The fields that belong to each kind of store."""


def parse_bytes(value: Any) -> Any:
    """A number of bytes, or text such as `500MB`, `20 GB` or `1.5GiB`."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", value.upper())
    if found is None or found[2] not in UNITS:
        raise ValueError("is a size such as 500MB, 20GB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
"""The annotation of a config field that holds a size."""


def parse_of(value: Any) -> Any:
    """The model behind a cache: a path alone means a live one."""
    return REGISTRY.parse({"kind": "live", "path": value} if isinstance(value, str) else value).plain()


@REGISTRY.register
class CacheTeacherConfig(TeacherConfig):
    """What a teacher said, on disk: found again by content, whatever the order, the batch or the run.

    Example: `teacher: {kind: cache, of: Qwen/Qwen2.5-7B-Instruct, store: hidden}`
    """

    kind: Literal["cache"] = "cache"
    of: Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_of)]
    """The teacher itself: a path, or another teacher's configuration."""
    store: Literal["hidden", "topk", "sampled"] = "hidden"
    """Last hidden states (exact), the most probable tokens and the mass of the rest (smaller, biased), or
    weighted random draws (smaller, unbiased, noisy)."""
    folder: FilePath = Path("teacher-cache")
    """Where stores are; any number of runs and teachers may share it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Number format of hidden states; "auto" is that of the teacher's weights and loses nothing. int8 keeps a
    scale for each token."""
    k: int = Field(64, ge=1)
    """How many of the most probable tokens `topk` keeps."""
    draws: int = Field(64, ge=1, le=65535)
    """How many draws `sampled` makes for each token, with replacement."""
    temperature: float = Field(1.0, ge=0.5, le=4.0)
    """`sampled` draws from the teacher's distribution at this temperature; its weights undo that."""
    logprobs: Number = "float16"
    """Number format of the log-probabilities of `topk` and `sampled` (there float32 or float16)."""
    on_miss: Literal["fill", "error"] = "fill"
    """What is not there: let the teacher say it and keep that, or stop; with "error" no teacher is loaded."""
    limit: Bytes | None = None
    """Size of the store, such as 20GB, beyond which nothing more is kept."""

    remembers = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.of, CacheTeacherConfig):
            raise ValueError("of is a cache itself; name the teacher behind it")
        others = {name for kind, names in OPTIONS.items() for name in names if kind != self.store}
        foreign = sorted((others - set(OPTIONS[self.store])) & self.model_fields_set)
        if foreign:
            raise ValueError(f"store: {self.store} has no {' or '.join(foreign)}")
        if self.store == "sampled" and self.logprobs == "uint8":
            raise ValueError("store: sampled keeps log-probabilities as float32 or float16")
        signal = self.of.provides & {"distribution", "topk", "sampled"}
        if "distribution" not in signal and (self.store != "topk" or "topk" not in signal):
            raise ValueError(
                f"store: {self.store} needs whole distributions, which kind: {self.of.kind} does not give"
                + ("; set store: topk" if "topk" in signal else "")
            )
        return self

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """What its form of store gives to losses; text too where the teacher is at hand."""
        signal = "distribution" if self.store == "hidden" else self.store
        return frozenset({signal}) | (self.of.provides & {"text"} if self.on_miss == "fill" else set())

    def model_to_load(self) -> TeacherModel | None:
        """The teacher behind it; None where that is not to be asked."""
        return self.of.model_to_load() if self.on_miss == "fill" else None

    def form(self, vocab: int, dtype: str | None = None) -> Form:
        """How records look.

        Args:
            vocab: number of token ids that student and teacher share.
            dtype: the number format of the teacher's weights, for "auto".
        """
        if self.store == "topk":
            return TopForm(self.k, self.logprobs, vocab)
        if self.store == "sampled":
            assert self.logprobs != "uint8"
            return DrawsForm(self.draws, self.temperature, self.logprobs, vocab)
        return HiddenForm(dtype or "float32" if self.dtype == "auto" else self.dtype)

    def build(self, model: nn.Module | None, vocab: int) -> AnyTeacher:
        """The running teacher over its store.

        Raises:
            TeacherError: there is no store, and no teacher that could fill one.
        """
        inner = None
        if self.on_miss == "fill":
            inner = self.of.build(model, vocab)
        form = self.form(vocab, None if model is None else _dtype_of(model))
        if inner is None:
            place, facts = self._existing(form)
        else:
            place, facts = self._own(form, inner, vocab)
        store = Store(place, facts["shards"], self.limit)
        if isinstance(form, CompactForm):
            return CachedCompact(store, form, inner, local=self.of.local)
        if inner is None:
            form = HiddenForm(facts["shards"]["form"].removeprefix("hidden-"))
            return CachedTeacher(store, form, _load_head(place, facts, vocab), None)
        assert isinstance(form, HiddenForm)
        assert isinstance(inner, Teacher)
        return CachedTeacher(store, form, inner.head, inner)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student whose ids are not those of the teacher that filled the store.

        Raises:
            TeacherError: the tokenizers differ, or there is no store.
        """
        if self.on_miss == "fill":
            self.of.check_tokenizer(tokenizer)
            return
        place, facts = self._existing(self.form(len(tokenizer)))
        if facts["tokenizer"] not in (None, tokenizer_digest(tokenizer.get_vocab())):
            raise TeacherError(
                f"{place}: was filled by a teacher whose tokenizer is not the student's, so its token ids "
                "mean other text. Choose a student of the teacher's family."
            )

    def check_signal(self, tokens: int) -> None:
        """See the teacher behind it."""
        if self.on_miss == "fill":
            self.of.check_signal(tokens)

    def _own(self, form: Form, teacher: AnyTeacher, vocab: int) -> tuple[Path, dict[str, Any]]:
        """The folder of the store of a teacher that is at hand, made if it is not there."""
        digest = self.of.fingerprint(self.folder)
        place = self.folder / f"{digest}-{form.name}"
        if (place / FACTS).is_file():
            with contextlib.suppress(TeacherError):  # is written anew
                return place, care.read_facts(place)
            logger.warning("%s: was damaged or of another version; it is written anew.", place / FACTS)
        head = teacher.head if isinstance(teacher, Teacher) else None
        width = None if head is None else int(head.weight.shape[1])
        named = self.of.model_to_load()
        facts = {
            "shards": {"form": form.name, "teacher": digest, "width": width},
            "teacher": {name: getattr(self.of, name, None) for name in ("kind", "path", "adapter", "url")},
            "tokenizer": None if named is None else tokenizer_digest(load_tokenizer(named).get_vocab()),
            "vocab": vocab,
            "head": None if head is None else {"scale": head.scale, "softcap": head.softcap},
        }
        if head is not None and isinstance(form, HiddenForm):
            facts["head_digest"] = _save_head(place, head)
        care.write_facts(place, facts)
        return place, facts

    def _existing(self, form: Form) -> tuple[Path, dict[str, Any]]:
        """The folder of a store that another machine or run has filled.

        Raises:
            TeacherError: there is none for this teacher and form, or more than one.
        """
        named = getattr(self.of, "path", None)
        stores, damaged = dict[Path, dict[str, Any]](), list[TeacherError]()
        for path in sorted(self.folder.glob(f"*/{FACTS}")):
            try:
                stores[path.parent] = care.read_facts(path.parent)
            except TeacherError as error:
                damaged.append(error)
        wanted = [form.name]
        if self.store == "hidden" and self.dtype == "auto":
            wanted = [HiddenForm(dtype).name for dtype in DTYPES]
        fitting = {place: facts for place, facts in stores.items() if facts["shards"]["form"] in wanted}
        try:
            digest = self.of.fingerprint(self.folder)
            fitting = {p: facts for p, facts in fitting.items() if facts["shards"]["teacher"] == digest}
        except ModelError:  # the weights are on another machine: the name that they had there decides
            fitting = {p: facts for p, facts in fitting.items() if facts["teacher"]["path"] == named}
        if len(fitting) == 1:
            return next(iter(fitting.items()))
        if damaged and not fitting:
            raise damaged[0]
        there = ", ".join(place.name for place in fitting or stores) or "nothing"
        raise TeacherError(
            f"{self.folder}: holds {len(fitting) or 'no'} stores of {' or '.join(wanted)} for teacher.of "
            f"{named}; there: {there}. "
            + (
                "Name one of them by teacher.dtype or remove the others (stillhouse cache prune --teacher)."
                if fitting
                else "Build one where the teacher is: stillhouse cache build RUN.YAML."
            )
        )


def _dtype_of(model: nn.Module) -> str:
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _save_head(place: Path, head: ModelHead) -> str:
    """Write the head; a digest of what was written."""
    from safetensors.torch import save

    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    data = save(tensors)
    with atomic(place / HEAD, "wb") as handle:
        handle.write(data)
    return care.digest_of(data)


def _load_head(place: Path, facts: dict[str, Any], vocab: int) -> ModelHead:
    from safetensors.torch import load

    device = own_device()
    tensors = {name: one.to(device) for name, one in load(care.read_head(place, facts)).items()}
    extras = facts["head"] or {}
    return ModelHead(tensors["weight"], tensors.get("bias"), extras["scale"], extras["softcap"], vocab)
