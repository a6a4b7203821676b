"""Fills a run's teacher cache before training; measures how each codec biases loss and gradient."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stillhouse import console
from stillhouse.core.batch import TokenBatch
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import SOURCES, Progress, Response
from stillhouse.data.collate import collate
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import local_device
from stillhouse.rollouts.fixed import reference_response
from stillhouse.runs.build import Parts, assemble, make_context, make_step
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder, default_folder
from stillhouse.teachers import AnyTeacher, LiveTeacherConfig, SparseTeacher, Teacher
from stillhouse.teachers.cached import CachedSparseTeacher, CachedTeacher, CacheTeacherConfig
from stillhouse.teachers.store import Manifest, Store
from stillhouse.teachers.store.codecs import Codec, HiddenCodec, SampledCodec, SparseCodec, TopkCodec
from stillhouse.train.micro_batch import PreparedStep
from stillhouse.train.step import Step

REPEATS = 4
"""How often tokens are sampled anew to tell bias from noise."""


def cache_of(config: RunConfig) -> CacheTeacherConfig:
    """The run's cached teacher.

    Raises:
        ConfigError: its teacher is of another kind.
    """
    if isinstance(config.teacher, CacheTeacherConfig):
        return config.teacher
    got = "no teacher" if config.teacher is None else f"kind {config.teacher.kind}"
    raise ConfigError(
        Fault("teacher", "is not cached", got=got, hint="Set teacher: {kind: cache, of: FOLDER}.")
    )


def fill_cache(config: RunConfig, batch_size: int | None = None) -> str:
    """Compute the teacher's signal for every text that is known before training: responses of the data set,
    those that the teacher generates once, and plain text, as far as the objective needs it.

    Cache hits are passed over, so an interrupted build continues. Of several processes (RANK,
    WORLD_SIZE) each takes a share.

    Args:
        config: the run.
        batch_size: sequences in one forward pass; default: train.micro_batch_size.

    Returns:
        A line on what was done.

    Raises:
        StillhouseError: no teacher is available, or model or data cannot be used.
    """
    teacher_config = cache_of(config)
    if teacher_config.on_miss == "error":
        raise ConfigError(
            Fault("teacher.on_miss", "a cache is built where the teacher is", got="error", allowed="fill")
        )
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = local_device()
    parts = assemble(config)
    responses = list(_known_responses(parts))
    responses.sort(key=lambda r: len(r.prompt.token_ids) + len(r.token_ids))
    mine = responses[rank::ranks]
    translator = parts.translator
    teacher = teacher_config.build(parts.teacher, len(translator.teacher) if translator else parts.vocab)
    size = batch_size or config.train.micro_batch_size
    with console.progress("Filling the teacher cache", total=sum(len(r.token_ids) for r in mine)) as bar:
        for start in range(0, len(mine), size):
            batch: TokenBatch = collate(mine[start : start + size], parts.facts.pad_id)
            rows = batch.num_rows
            if translator is not None:
                batch, _ = translator.teacher_batch(mine[start : start + size])
            _query(teacher, batch.to(device))
            bar.advance(rows)
    return teacher.close() or "There is nothing to build: the objective needs the teacher for no known text."


def _known_responses(parts: Parts) -> Iterator[Response]:
    """The responses that do not depend on the student, as far as the objective needs the teacher for them."""
    config = parts.config
    needed = {source for source in SOURCES if MAIN in config.objective.teachers_of(source)}
    sources = config.responses.sources() & needed
    if "fixed" in sources:
        yield from (
            reference_response(prompt) for prompt in parts.data.train if prompt.response_ids is not None
        )
    if "teacher" in sources:
        context = make_context(parts, RunFolder(default_folder(config)))
        yield from config.responses.static_teacher_responses(context)
    if "text" in needed and parts.data.text:
        yield from parts.data.text


def _query(teacher: AnyTeacher, batch: TokenBatch) -> None:
    if isinstance(teacher, SparseTeacher):
        teacher.sparse_logprobs(batch)
    else:
        teacher.hidden(batch)


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


def measure_bias(config: RunConfig, prompts: int = 32) -> tuple[float, list[CodecBias], list[str]]:
    """Loss and gradient of the student as it starts, over each codec, against the live teacher.

    Args:
        config: the run; its responses and its objective are used, at step 0.
        prompts: how many prompts are drawn from the training data.

    Returns:
        The live loss, a row for each codec, and the names of codecs that the objective cannot be computed
        from.

    Raises:
        StillhouseError: no teacher is available, or model or data cannot be used.
    """
    cached = cache_of(config)
    if not isinstance(cached.of, LiveTeacherConfig):
        raise ConfigError(Fault("teacher.of", "only a live teacher can be compared with", got=cached.of.kind))
    parts = assemble(config.model_copy(update={"teacher": cached.of}))
    teacher = parts.teacher
    assert teacher is not None
    parts.student.eval()
    parts = replace(parts, data=replace(parts.data, train=parts.data.train[:prompts]))
    with tempfile.TemporaryDirectory() as place:
        step = make_step(parts, RunFolder(Path(place)))
        live = step.teachers[MAIN]
        assert isinstance(live, Teacher)
        dtype = str(next(teacher.parameters()).dtype).removeprefix("torch.")
        store = Store(Path(place) / "exact", Manifest("exact", ""))
        # So that the model itself runs only once.
        exact = CachedTeacher(store, HiddenCodec(dtype), live.head, live)
        count = -(-len(parts.data.train) // config.train.micro_batch_size)
        prepared = step.prepare(list(parts.data.train), Progress(0, 1, 0.0, 1.0), count)
        loss, slope = _gradient(with_main_teacher(step, exact), parts, prepared)
        rows, refused = [], []
        with console.progress("Comparing codecs") as bar:
            for codec in codecs_to_compare(cached, parts.vocab, dtype):
                form = codec.form if isinstance(codec, SparseCodec) else "distribution"
                if form not in config.objective.forms:
                    refused.append(codec.name)
                    continue
                found = []
                for seed in range(REPEATS if form == "sampled" else 1):
                    folder = Path(place) / f"{codec.name}-{seed}"
                    over, store = _over(codec, exact, folder, seed)
                    found.append(_gradient(with_main_teacher(step, over), parts, prepared))
                    size = store.size
                    store.close()
                tokens = sum(micro.batch.num_rows for micro in prepared.micro_batches)
                rows.append(_row(codec.name, size / tokens, found, loss, slope))
                bar.advance(1)
    return loss, rows, refused


def _over(codec: Codec, live: Teacher, folder: Path, seed: int) -> tuple[AnyTeacher, Store]:
    """A teacher over an empty store."""
    store = Store(folder, Manifest(codec.name, ""))
    if isinstance(codec, SparseCodec):
        return CachedSparseTeacher(store, codec, live, seed), store
    assert isinstance(codec, HiddenCodec)
    return CachedTeacher(store, codec, live.head, live), store


def with_main_teacher(step: Step, teacher: AnyTeacher) -> Step:
    """The same step with another main teacher."""
    return replace(step, teachers={**step.teachers, MAIN: teacher})


def _gradient(step: Step, parts: Parts, prepared: PreparedStep) -> tuple[float, Tensor]:
    """The loss of the step, and its gradient as one vector."""
    parts.student.zero_grad(set_to_none=True)
    total = 0.0
    for micro in prepared.micro_batches:
        found = step.loss(parts.student, micro)
        found.loss.backward()
        total += found.value.item()
    trained = [p for p in parts.student.parameters() if p.requires_grad and p.grad is not None]
    return total, torch.cat([p.grad.flatten().float().cpu() for p in trained])  # type: ignore[union-attr]


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
