"""What a teacher on a server says is what the same model says in this process, whatever lies between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.servers import Service, broken
from tests.vllm_like import TEACHER, DemoTeacher, demo_server
from torch import Tensor

from stillhouse import objectives
from stillhouse.core.batch import TokenBatch
from stillhouse.core.sparse import topk_of
from stillhouse.core.types import Prompt
from stillhouse.data.collate import collate
from stillhouse.errors import ModelError, TeacherError
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.remote.answers import InvalidAnswer
from stillhouse.remote.completions import parse_prompt_logprobs
from stillhouse.rollouts.fixed import reference_response
from stillhouse.teachers import PrefetchingTeacher, SparseTeacher
from stillhouse.teachers.cached import CacheTeacherConfig
from stillhouse.teachers.live import LiveTeacherConfig
from stillhouse.teachers.server import ServerTeacherConfig, topk_rows

TOP = 20


@pytest.fixture(scope="module")
def demo() -> DemoTeacher:
    return DemoTeacher()


@pytest.fixture
def service() -> Iterator[Service]:
    with demo_server() as running:
        yield running


def batch(demo: DemoTeacher, *pairs: tuple[str, str]) -> TokenBatch:
    """Some prompts with answers, as a teacher gets them."""
    prompts = []
    for number, (prompt, answer) in enumerate(pairs):
        ids = [
            tuple(demo.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
        ]
        prompts.append(Prompt(str(number), ids[0], prompt, (*ids[1], demo.facts.eos_ids[0])))
    return collate([reference_response(prompt) for prompt in prompts], 0)


PAIRS = (
    ("name[Blue Spice], eatType[pub]\n", "Blue Spice is a pub."),
    ("name[Zizzi], food[Indian], near[Avalon]\n", "Zizzi serves Indian food near Avalon, cheaply."),
    ("name[Blue Spice], eatType[pub]\n", "Blue Spice is a pub."),
)


def running(url: str, **options: Any) -> SparseTeacher:
    config = ServerTeacherConfig(url=url, k=TOP, backoff=0.001, **{"cache": None, **options})
    built = config.build(None, 1024)
    assert isinstance(built, SparseTeacher)
    return built


def scored(service: Service) -> list[Any]:
    """The questions about sequences, without the probes of abilities."""
    bodies = service.bodies("/v1/completions")
    return [b for b in bodies if b.get("prompt_logprobs") == TOP and len(b["prompt"]) > 3]


def test_its_rows_are_the_models_own(service: Service, demo: DemoTeacher) -> None:
    part = batch(demo, *PAIRS)
    live = LiveTeacherConfig(path=TEACHER).build(demo.model, 1024)
    exact = torch.log_softmax(live.head.logits(live.hidden(part)), -1)
    expected = topk_of(exact, TOP, part.row_labels())
    said = running(service.url).sparse_logprobs(part)
    torch.testing.assert_close(said.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(said.labels, expected.labels, atol=2e-5, rtol=0)
    torch.testing.assert_close(said.tail, expected.tail, atol=2e-3, rtol=0)
    assert (said.ids == expected.ids).float().mean() > 0.99  # ties may change places
    assert len(scored(service)) == 2  # equal sequences are one question


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": False, "echo": True}], ids=["vllm", "echo"])
def test_the_labels_alone_are_the_models_own(
    demo: DemoTeacher, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of servers that give nothing else too, and from the store without a second question."""
    part = batch(demo, *PAIRS)
    live = LiveTeacherConfig(path=TEACHER).build(demo.model, 1024)
    exact = torch.log_softmax(live.head.logits(live.hidden(part)), -1)
    expected = exact.gather(1, part.row_labels()[:, None]).squeeze(1)
    with demo_server(**options) as service:
        config = ServerTeacherConfig(url=service.url, k=0, backoff=0.001, cache=tmp_path)
        assert config.signals == {"text", "labels"}
        config.check_signal(64)
        for _ in range(2):
            teacher = config.build(None, 1024)
            assert isinstance(teacher, SparseTeacher)
            said = teacher.sparse_logprobs(part)
            torch.testing.assert_close(said.labels, expected, atol=2e-5, rtol=0)
            assert said.form == teacher.form == "labels"
            assert said.ids.shape == (part.num_rows, 0)
            teacher.close()
        bodies = [b for b in service.bodies("/v1/completions") if b["prompt"] in map(list, part.token_ids)]
        assert len(bodies) == 2, "two different texts, asked once"
        assert all(b.get("prompt_logprobs") == 0 or b.get("echo") for b in bodies)
        (record,) = tmp_path.glob("*/shard-*.safetensors")
        assert "labels-float32" in str(record)


def test_a_server_that_gives_the_texts_own_tokens_only_says_so() -> None:
    told = pytest.raises(TeacherError, match=r"none of other tokens .* Set teacher\.k: 0")
    with demo_server(prompt_logprobs=False, echo=True) as plain, told:
        ServerTeacherConfig(url=plain.url).check_signal(64)


def test_faults_on_the_way_change_nothing(service: Service, demo: DemoTeacher, tmp_path: Path) -> None:
    part = batch(demo, *(("name[Fitzbillies]\n", f"Fitzbillies, number {n}.") for n in range(12)))
    expected = running(service.url).sparse_logprobs(part)
    faults = ["drop", "truncate", (429, {}), "garble", (502, {}), "lose"]
    with broken(service.url, lambda n: faults[n // 2 % 6] if n > 3 and n % 2 else None) as proxy:
        teacher = running(proxy.url, cache=tmp_path, concurrency=3, retries=20)
        first = teacher.sparse_logprobs(part)
        asked = sum(proxy.done.values())
        again = teacher.sparse_logprobs(part)
        teacher.close()
    assert sum(proxy.done.values()) == asked > 12 + 6
    for said in (first, again):
        assert torch.equal(said.ids, expected.ids)
        assert torch.equal(said.logprobs, expected.logprobs)
        assert said.tail is not None
        assert expected.tail is not None
        assert torch.equal(said.tail, expected.tail)


def test_the_store_belongs_to_an_address_or_to_an_identity(
    service: Service, demo: DemoTeacher, tmp_path: Path
) -> None:
    part = batch(demo, *PAIRS)
    with demo_server() as other:
        for options, asked in (({}, 2), ({"identity": "demo, revision 3"}, 0)):
            running(service.url, cache=tmp_path, **options).sparse_logprobs(part)
            running(other.url, cache=tmp_path, **options).sparse_logprobs(part)
            assert len(scored(other)) == asked
            other.seen.clear()


def test_autocast_around_it_changes_no_question(service: Service, demo: DemoTeacher, tmp_path: Path) -> None:
    teacher, part = running(service.url, cache=tmp_path), batch(demo, *PAIRS)
    assert isinstance(teacher, PrefetchingTeacher)
    teacher.prefetch([part])  # as a step asks, before the trainer's autocast
    with torch.autocast("cpu", torch.bfloat16):
        teacher.sparse_logprobs(part)
    assert len(scored(service)) == 2


def test_what_finds_no_room_in_the_store_is_not_asked_for_twice_in_a_step(
    service: Service, demo: DemoTeacher, tmp_path: Path
) -> None:
    of = ServerTeacherConfig(url=service.url, k=TOP)
    cache = CacheTeacherConfig(of=of, store="topk", k=TOP, folder=tmp_path, limit=1)
    teacher = cache.build(None, 1024)
    assert isinstance(teacher, SparseTeacher)
    assert isinstance(teacher, PrefetchingTeacher)
    parts = [batch(demo, pair) for pair in PAIRS[:2]]
    teacher.prefetch(parts)
    for part in parts:
        teacher.sparse_logprobs(part)
    assert len(scored(service)) == 2
    assert teacher.pop_metrics()["cache/hits"] == (0, 2)
    teacher.prefetch(parts[:1])
    teacher.sparse_logprobs(parts[0])
    assert len(scored(service)) == 3, "the step after it asks again, for nothing was kept"
    assert "2 were not stored" in (teacher.close() or "")


def test_a_cache_around_a_server_keeps_once(service: Service, demo: DemoTeacher, tmp_path: Path) -> None:
    of = ServerTeacherConfig(url=service.url, k=TOP, cache=tmp_path / "not here")
    cache = CacheTeacherConfig(of=of, store="topk", k=TOP, folder=tmp_path / "here")
    built = cache.build(None, 1024)
    assert isinstance(built, SparseTeacher)
    built.sparse_logprobs(batch(demo, *PAIRS))
    built.close()
    assert not (tmp_path / "not here").exists()
    assert list((tmp_path / "here").glob("*/shard-*.safetensors"))


def test_what_top_k_leaves_out_of_the_forward_kl_is_the_divergence_within_the_tail() -> None:
    """The identity in docs/servers.md."""
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 50, generator=rng, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
    loss = objectives.build("forward_kl")
    top = topk_of(p, 8)
    assert top.tail is not None
    rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, top.ids, False)
    within = [one.masked_fill(~rest, -torch.inf).log_softmax(-1) for one in (p, q)]
    left_out = (within[0].exp() * (within[0] - within[1]).masked_fill(~rest, 0.0)).sum(-1)
    torch.testing.assert_close(loss(q, p), loss(q, top) + top.tail.exp() * left_out)


@pytest.mark.parametrize("more", [0, 1], ids=["prompt alone", "and the token that was written"])
def test_echoed_scores_are_understood_too(more: int) -> None:
    logprobs = {
        "tokens": ["token_id:5", "token_id:7"] + ["token_id:8"] * more,
        "token_logprobs": [None, -3.0] + [-0.5] * more,
        "top_logprobs": [None, {"token_id:9": -0.1}] + [{"token_id:8": -0.5}] * more,
    }
    reply = {"choices": [{"logprobs": logprobs}]}
    assert parse_prompt_logprobs(reply, "echo", (5, 7), k=1) == [{}, {7: -3.0, 9: -0.1}]
    texts = {"tokens": ["a", "b"] + ["c"] * more, "token_logprobs": [None, -3.0] + [-0.5] * more}
    assert parse_prompt_logprobs({"choices": [{"logprobs": texts}]}, "echo", (5, 7), k=0) == [{}, {7: -3.0}]
    with pytest.raises(InvalidAnswer, match=r"for \d tokens sent"):
        parse_prompt_logprobs({"choices": [{"logprobs": texts}]}, "echo", (5, 7, 9, 9)[: 3 + more], k=0)
    logprobs["tokens"][1] = "token_id:6"
    with pytest.raises(InvalidAnswer, match=r"\[1\]: leaves out token 7"):
        parse_prompt_logprobs(reply, "echo", (5, 7), k=0)
    vllm = {"prompt_logprobs": [None, {"7": {"logprob": -3.0}, "9": {"logprob": -0.1}}]}
    assert parse_prompt_logprobs({"choices": [vllm]}, "prompt_logprobs", (5, 7), k=1) == [
        {},
        {7: -3.0, 9: -0.1},
    ]


def test_tokens_of_probability_0_and_padding_rows_of_a_head_are_part_of_the_tail() -> None:
    entries = {"7": -0.1, "9": float("-inf"), "4": -9999.0, "13": -12.0, "5": -3.0}
    choice = {"prompt_logprobs": [None, {name: {"logprob": value} for name, value in entries.items()}]}
    scores = parse_prompt_logprobs({"choices": [choice]}, "prompt_logprobs", (5, 9), k=4, vocab=12)
    rows = topk_rows(scores, (5, 9), [1], k=4)
    assert rows.ids.tolist() == [[7, 5]]
    assert rows.tail is not None
    assert rows.tail.exp().item() == pytest.approx(1 - math.exp(-0.1) - math.exp(-3.0), rel=1e-4)
    assert rows.labels is not None
    assert rows.labels.tolist() == [-9999.0], "what the response wrote although it had a probability of 0"


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "forward_kl", "tvd"])
def test_rows_of_unequal_width_have_the_gradient_of_each_alone(objective: str) -> None:
    scores: list[dict[int, float]] = [
        {},
        {3: -0.5, 5: -1.5, 7: -math.inf},
        {7: -math.inf, 2: -0.01},
        {1: -1.0, 4: -1.1, 9: -2.0, 7: -9999.0},
    ]
    sequence, loss = (5, 3, 7, 7), objectives.build(objective)
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(3, 12, generator=rng, dtype=torch.float64)

    def gradient(logits: Tensor, positions: list[int]) -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss(leaf, topk_rows(scores, sequence, positions, k=3)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    together = gradient(student, [1, 2, 3])
    assert together.isfinite().all()
    alone = [gradient(student[row : row + 1], [row + 1]) for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_another_tokenizer_is_refused(service: Service) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[UNK]")
    with pytest.raises(ModelError, match="they part at token 0"):
        ServerTeacherConfig(url=service.url).check_tokenizer(other)
    ServerTeacherConfig(url=service.url).check_tokenizer(load_tokenizer(TeacherModel(path=TEACHER)))
    assert ServerTeacherConfig(url=service.url, retokenise=True).provides == {"text"}
