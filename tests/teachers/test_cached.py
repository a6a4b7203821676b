"""A cached teacher says what the live one says, runs once for each text, and knows a text by its content."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import children, tiny
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.core.types import Response
from stillhouse.data.collate import collate
from stillhouse.errors import EnvironmentFault, TeacherError
from stillhouse.fused import fused_loss
from stillhouse.models import fingerprint_of_files
from stillhouse.objectives import build
from stillhouse.sandbox.confine import _drop_capabilities
from stillhouse.teachers import SparseTeacher, Teacher
from stillhouse.teachers.cached import CacheTeacherConfig
from stillhouse.teachers.cached_teachers import CachedTeacher
from stillhouse.teachers.live import LiveTeacher, LiveTeacherConfig
from stillhouse.teachers.store import find_stores, maintenance


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A teacher on disk, its head three rows taller than the tokenizer, which is never asked to encode."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path / "teacher"
    tiny.model(7, width=24, vocab_size=tiny.VOCAB + 3).save_pretrained(folder)
    words = WordLevel({f"t{index}": index for index in range(tiny.VOCAB)}, unk_token="t2")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t0", unk_token="t2"
    ).save_pretrained(folder)
    return str(folder)


def model(path: str) -> nn.Module:
    from stillhouse.models import TeacherModel, load_teacher

    return load_teacher(TeacherModel(path=path))


def tensors(responses: Sequence[Response], length: int | None = None) -> TokenBatch:
    return collate(responses, tiny.PAD, length)


class Counted(LiveTeacher):
    sequences = 0

    def hidden(self, batch: TokenBatch) -> Tensor:
        self.sequences += len(batch)
        return super().hidden(batch)


def over(config: CacheTeacherConfig, path: str) -> tuple[Teacher, Counted]:
    """A cached teacher, and the live one behind it, counted."""
    cached = config.build(model(path), tiny.VOCAB)
    assert isinstance(cached, CachedTeacher)
    live = Counted(model(path), tiny.VOCAB)
    cached.teacher = live
    return cached, live


def test_a_text_is_known_by_its_content_in_any_batch_order_and_process(path: str, tmp_path: Path) -> None:
    config = CacheTeacherConfig(of=path, folder=tmp_path / "cache")  # type: ignore[arg-type]
    responses = tiny.responses(8)
    cached, live = over(config, path)
    wanted = LiveTeacher(model(path), tiny.VOCAB).hidden(tensors(responses))
    first = cached.hidden(tensors(responses))
    assert torch.equal(first, wanted), "bit for bit, as the same batch gives it"
    assert cached.pop_metrics()["cache/hits"] == (0, 8)
    again = cached.hidden(tensors(responses[::-1][:5], length=40))
    parts = first.split([len(r.token_ids) for r in responses])
    assert torch.equal(again, torch.cat(parts[::-1][:5]))
    assert live.sequences == 8
    assert cached.pop_metrics()["cache/hits"] == (5, 5)
    line = cached.close()
    assert line is not None
    assert "38.5% of 13 sequences" in line
    other, live = over(config, path)
    assert torch.equal(other.hidden(tensors(responses)), wanted)
    assert live.sequences == 0, "another process and run"
    more = tiny.responses(10, seed=1)
    other.hidden(tensors([*responses[:3], *more]))
    assert live.sequences == 10, "only what is new"


def test_where_the_response_begins_is_part_of_the_content(path: str, tmp_path: Path) -> None:
    config = CacheTeacherConfig(of=path, folder=tmp_path / "cache")  # type: ignore[arg-type]
    cached, live = over(config, path)
    batch = tensors(tiny.responses(1))
    cached.hidden(batch)
    shorter = TokenBatch.of(batch.token_ids, [start + 1 for start in batch.prompt_lengths], tiny.PAD)
    assert cached.hidden(shorter).shape[0] == batch.num_rows - 1
    assert live.sequences == 2


def test_a_teacher_alone_with_each_text_is_bit_equal_in_every_batch(path: str, tmp_path: Path) -> None:
    config = CacheTeacherConfig(
        of={"kind": "live", "path": path, "batch_invariant": True}, folder=tmp_path / "cache"
    )  # type: ignore[arg-type]
    cached = config.build(model(path), tiny.VOCAB)
    assert isinstance(cached, Teacher)
    responses = tiny.responses(12)
    for start in range(0, 12, 5):
        cached.hidden(tensors(responses[start : start + 5]))
    alone = LiveTeacher(model(path), tiny.VOCAB, batch_invariant=True).hidden(tensors(responses))
    assert torch.equal(cached.hidden(tensors(responses)), alone)
    together = LiveTeacher(model(path), tiny.VOCAB).hidden(tensors(responses))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"dtype": "bfloat16"}, 0.02), ({"dtype": "int8"}, 0.05), ({"store": "topk", "k": 45}, 0.1)],
)
def test_smaller_stores_change_the_loss_a_little(
    path: str, tmp_path: Path, options: dict[str, Any], most: float
) -> None:
    config = CacheTeacherConfig(of=path, folder=tmp_path / "cache", **options)  # type: ignore[arg-type]
    batch = tensors(tiny.responses(10))
    student = torch.randn(batch.num_rows, 16, generator=torch.Generator().manual_seed(3))
    head = ModelHead(torch.randn(tiny.VOCAB, 16, generator=torch.Generator().manual_seed(4)) / 2)
    live = LiveTeacher(model(path), tiny.VOCAB)
    wanted = fused_loss(build("forward_kl"), student, head, live.hidden(batch), live.head)
    losses = []
    for _ in range(2):  # computed, and read back
        teacher = config.build(model(path), tiny.VOCAB)
        if isinstance(teacher, SparseTeacher):
            losses.append(fused_loss(build("forward_kl"), student, head, teacher.sparse_logprobs(batch)))
        else:
            losses.append(fused_loss(build("forward_kl"), student, head, teacher.hidden(batch), teacher.head))
        teacher.close()
    assert losses[0] == losses[1], "the first epoch sees what later ones see"
    assert 0 < abs(losses[0] - wanted) < most * wanted


def test_the_same_text_always_has_the_same_samples(path: str, tmp_path: Path) -> None:
    found: list[SparseLogprobs] = []
    for folder in ("one", "two"):
        config = CacheTeacherConfig(of=path, folder=tmp_path / folder, store="sampled", samples=6)  # type: ignore[arg-type]
        teacher = config.build(model(path), tiny.VOCAB)
        assert isinstance(teacher, SparseTeacher)
        found.append(teacher.sparse_logprobs(tensors(tiny.responses(3))))
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.allclose(found[0].weights.sum(-1), torch.ones(len(found[0])))  # type: ignore[union-attr]


def test_without_the_teacher_it_reads_what_is_there_and_names_what_is_not(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filling = CacheTeacherConfig(of=path, folder=folder)  # type: ignore[arg-type]
    cached = filling.build(model(path), tiny.VOCAB)
    assert isinstance(cached, Teacher)
    wanted = cached.hidden(tensors(tiny.responses(4)))
    logits = cached.head.logits(wanted)
    cached.close()
    shutil.rmtree(path)
    reading = CacheTeacherConfig(of=path, folder=folder, on_miss="error")  # type: ignore[arg-type]
    assert reading.model_to_load() is None
    assert reading.provides == {"distribution"}
    teacher = reading.build(None, tiny.VOCAB)
    assert isinstance(teacher, Teacher)
    assert torch.equal(teacher.hidden(tensors(tiny.responses(4))), wanted)
    assert torch.equal(teacher.head.logits(wanted), logits)
    assert logits.shape[1] == tiny.VOCAB
    with pytest.raises(TeacherError, match=r"2 of the 6 sequences of a batch are not in the teacher cache"):
        teacher.hidden(tensors([*tiny.responses(4), *tiny.responses(2, seed=5)]))
    missing = CacheTeacherConfig(of=path, folder=folder, on_miss="error", store="topk")  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match=r"holds no stores of topk64-float16-v61.*cache build"):
        missing.build(None, tiny.VOCAB)


def test_a_damaged_record_is_made_anew(path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CacheTeacherConfig(of=path, folder=tmp_path / "cache")  # type: ignore[arg-type]
    cached, _ = over(config, path)
    wanted = cached.hidden(tensors(tiny.responses(3)))
    cached.close()
    (shard,) = (tmp_path / "cache").glob("*/shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-20] ^= 8
    shard.write_bytes(data)
    again, live = over(config, path)
    torch.testing.assert_close(again.hidden(tensors(tiny.responses(3))), wanted, rtol=1e-5, atol=1e-5)
    assert live.sequences == 1
    assert "is damaged and not used" in caplog.text
    assert "1 damaged" in (again.close() or "")


def test_the_fingerprint_follows_the_weights_and_not_the_place(path: str, tmp_path: Path) -> None:
    def digest(where: str, **options: Any) -> str:
        return fingerprint_of_files(LiveTeacherConfig(path=where, **options), tmp_path / "memory")

    first = digest(path)
    copy = shutil.copytree(path, tmp_path / "copy")
    assert digest(str(copy)) == first
    assert digest(path, dtype="bfloat16") != first
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name][0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert digest(str(copy)) != first
    assert digest(path) == first
    assert (tmp_path / "memory" / "fingerprints.json").is_file()


def test_another_teacher_or_codec_has_a_store_of_its_own(path: str, tmp_path: Path) -> None:
    for options in ({}, {"dtype": "int8"}, {"store": "topk", "k": 4}):
        config = CacheTeacherConfig(of=path, folder=tmp_path / "cache", **options)  # type: ignore[arg-type]
        teacher = config.build(model(path), tiny.VOCAB)
        if isinstance(teacher, SparseTeacher):
            teacher.sparse_logprobs(tensors(tiny.responses(2)))
        else:
            teacher.hidden(tensors(tiny.responses(2)))
        teacher.close()
    assert len(find_stores(tmp_path / "cache")) == 3


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_a_damaged_head_is_never_used(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filling = CacheTeacherConfig(of=path, folder=folder)  # type: ignore[arg-type]
    reading = CacheTeacherConfig(of=path, folder=folder, on_miss="error")  # type: ignore[arg-type]
    batch = tensors(tiny.responses(4))

    def fill() -> tuple[Tensor, int]:
        cached, live = over(filling, path)
        hidden = cached.hidden(batch)
        cached.close()
        return hidden, live.sequences

    wanted, _ = fill()
    (head,) = folder.glob("*/head.safetensors")
    for byte in (30, -30):
        flip(head, byte)
        found = [(where, len(damage)) for where, _, damage in maintenance.verify(folder) if damage]
        assert found == [(head, 1)]
        for _ in range(2):
            with pytest.raises(TeacherError, match=r"head.safetensors: is damaged or missing"):
                reading.build(None, tiny.VOCAB)
            maintenance.repair(head)
            assert not head.exists()
        hidden, computed = fill()
        assert computed == 0, "the shards are as they were"
        teacher = reading.build(None, tiny.VOCAB)
        assert isinstance(teacher, Teacher)
        assert torch.equal(teacher.hidden(batch), wanted)
        assert torch.equal(teacher.hidden(batch), hidden)
        teacher.close()


def test_a_shard_with_a_damaged_header_is_made_anew_where_the_teacher_is(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, batch = tmp_path / "cache", tensors(tiny.responses(4))
    filling = CacheTeacherConfig(of=path, folder=folder)  # type: ignore[arg-type]
    reading = CacheTeacherConfig(of=path, folder=folder, on_miss="error")  # type: ignore[arg-type]
    cached, _ = over(filling, path)
    wanted = cached.hidden(batch)
    cached.close()
    (shard,) = folder.glob("*/shard-*.safetensors")
    flip(shard, 200)
    with pytest.raises(TeacherError, match="holds no stores"):
        reading.build(None, tiny.VOCAB)
    again, live = over(filling, path)
    assert torch.equal(again.hidden(batch), wanted)
    assert live.sequences == 4
    assert f"{shard}: its header is damaged" in caplog.text
    again.close()
    teacher = reading.build(None, tiny.VOCAB)
    assert isinstance(teacher, Teacher)
    assert torch.equal(teacher.hidden(batch), wanted)


def test_a_filled_store_is_read_where_it_cannot_be_written(path: str, tmp_path: Path) -> None:
    config = CacheTeacherConfig(of=path, folder=tmp_path / "cache")  # type: ignore[arg-type]
    cached, _ = over(config, path)
    wanted = cached.hidden(tensors(tiny.responses(4)))
    cached.close()
    everything = [place for name in ("cache", "teacher") for place in (tmp_path / name).rglob("*")]
    for place in (*everything, tmp_path / "cache", tmp_path / "teacher"):
        place.chmod(0o555 if place.is_dir() else 0o444)
    assert children.end(children.start(_only_read, path, tmp_path / "cache", wanted.tolist())) == 0


def _only_read(path: str, folder: Path, wanted: list[list[float]]) -> None:
    _drop_capabilities()  # root may write everywhere
    config = CacheTeacherConfig(of=path, folder=folder)  # type: ignore[arg-type]
    cached, live = over(config, path)
    assert torch.equal(cached.hidden(tensors(tiny.responses(4))), torch.tensor(wanted))
    assert live.sequences == 0
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        cached.hidden(tensors(tiny.responses(1, seed=9)))
    cached.close()
    for place in folder.iterdir():
        place.chmod(0o755)  # others' shards remain what they are
    more, live = over(config, path)
    more.hidden(tensors(tiny.responses(1, seed=9)))
    assert len(list(folder.glob("*/shard-*.safetensors"))) == 2
    more.close()
