"""How each codec of the teacher cache biases loss and gradient, against the live teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stillhouse import console
from stillhouse.errors import ConfigError, Fault
from stillhouse.teachers.base import AnyTeacher, Teacher, TeacherConfig
from stillhouse.teachers.cached import CacheTeacherConfig, require_cache
from stillhouse.teachers.cached_teachers import CachedSparseTeacher, CachedTeacher
from stillhouse.teachers.live import LiveTeacherConfig
from stillhouse.teachers.store import Manifest, Store
from stillhouse.teachers.store.codecs import Codec, HiddenCodec, SampledCodec, SparseCodec, TopkCodec

REPEATS = 4
"""How often tokens are sampled anew to tell bias from noise."""

Measure = Callable[[AnyTeacher], tuple[float, Tensor]]
"""A teacher -> the loss of some fixed batches against it, and its gradient as one vector."""


@dataclass(frozen=True, slots=True)
class CodecBias:
    """How loss and gradient of a sample over a codec differ from those of the live teacher."""

    name: str
    bytes_per_token: float
    loss: float
    loss_error: float
    """Loss minus that of the live teacher, nats per token; the mean over repeats of sampling."""
    loss_noise: float
    """Standard deviation over repeats of sampling; 0 for what is not random."""
    cosine: float
    """Between the gradients."""
    gradient_error: float
    """|g - g_live| / |g_live|."""
    mean_gradient_error: float
    """The same for the mean gradient of the repeats: what is left of it is bias."""


def codecs_to_compare(config: CacheTeacherConfig, vocab: int, dtype: str) -> list[Codec]:
    """The run's own codec first, then others of each kind."""
    own = config.codec(vocab, dtype)
    others: list[Codec] = [
        HiddenCodec(dtype),
        *(HiddenCodec(other) for other in ("bfloat16", "int8")),
        *(TopkCodec(count, "float16", vocab) for count in (8, 32, 128)),
        TopkCodec(32, "uint8", vocab),
        *(SampledCodec(count, 1.0, "float16", vocab) for count in (16, 64)),
        SampledCodec(64, 1.5, "float16", vocab),
    ]
    return list({codec.name: codec for codec in (own, *others)}.values())


def live_teacher_of(config: TeacherConfig | None, path: str = "teacher") -> TeacherConfig:
    """The live teacher behind a cached one.

    Args:
        config: of a teacher.
        path: where it stands in the configuration of the run.

    Raises:
        ConfigError: the teacher is not cached, or not live.
    """
    cached = require_cache(config, path)
    if not isinstance(cached.of, LiveTeacherConfig):
        raise ConfigError(Fault(f"{path}.of", "only a live teacher can be compared with", got=cached.of.kind))
    return cached.of


def compare_codecs(
    config: TeacherConfig | None,
    live: AnyTeacher,
    vocab: int,
    forms: frozenset[str],
    measure: Measure,
    num_rows: int,
    folder: Path,
) -> tuple[float, list[CodecBias], list[str]]:
    """Loss and gradient over each codec, against the live teacher.

    Args:
        config: the cached teacher, whose codec comes first.
        live: the running teacher behind it.
        vocab: number of token ids that student and teacher share.
        forms: from which the objective can be computed.
        measure: the loss of some batches against a teacher, with its gradient.
        num_rows: response tokens of these batches.
        folder: where stores may be made.

    Returns:
        The live loss, a row for each codec, and the names of codecs that the objective cannot be computed
        from.
    """
    assert isinstance(live, Teacher)
    dtype = str(live.head.weight.dtype).removeprefix("torch.")
    # So that the model itself runs only once.
    exact = CachedTeacher(Store(folder / "exact", Manifest("exact", "")), HiddenCodec(dtype), live.head, live)
    loss, slope = measure(exact)
    rows, refused = [], []
    with console.progress("Comparing codecs") as bar:
        for codec in codecs_to_compare(require_cache(config), vocab, dtype):
            form = codec.form if isinstance(codec, SparseCodec) else "distribution"
            if form not in forms:
                refused.append(codec.name)
                continue
            found = []
            for seed in range(REPEATS if form == "sampled" else 1):
                over, store = _over(codec, exact, folder / f"{codec.name}-{seed}", seed)
                found.append(measure(over))
                size = store.size
                store.close()
            rows.append(_row(codec.name, size / num_rows, found, loss, slope))
            bar.advance(1)
    return loss, rows, refused


def _over(codec: Codec, live: Teacher, folder: Path, seed: int) -> tuple[AnyTeacher, Store]:
    """A teacher over an empty store."""
    store = Store(folder, Manifest(codec.name, ""))
    if isinstance(codec, SparseCodec):
        return CachedSparseTeacher(store, codec, live, seed), store
    assert isinstance(codec, HiddenCodec)
    return CachedTeacher(store, codec, live.head, live), store


def _row(
    name: str, size: float, found: Sequence[tuple[float, Tensor]], loss: float, slope: Tensor
) -> CodecBias:
    losses = torch.tensor([one for one, _ in found], dtype=torch.float64)
    mean = torch.stack([one for _, one in found]).mean(0)
    cosines = [
        torch.nn.functional.cosine_similarity(one.double(), slope.double(), dim=0).item() for _, one in found
    ]
    errors = [((one - slope).norm() / slope.norm()).item() for _, one in found]
    return CodecBias(
        name=name,
        bytes_per_token=size,
        loss=losses.mean().item(),
        loss_error=losses.mean().item() - loss,
        loss_noise=losses.std().item() if len(found) > 1 else 0.0,
        cosine=sum(cosines) / len(cosines),
        gradient_error=sum(errors) / len(errors),
        mean_gradient_error=((mean - slope).norm() / slope.norm()).item(),
    )
