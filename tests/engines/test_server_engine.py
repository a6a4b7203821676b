"""Text from servers: the tokens that were sampled, each asked for once, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.servers import Service, broken, smollm2
from tests.vllm_like import TEACHER, DemoTeacher, demo_server

from stillhouse.engines import Sampling, ServerConfig, TokenizerInfo
from stillhouse.engines.server import ServerEngine, from_ids, request_seed
from stillhouse.errors import ConfigError, EngineError, ModelError, ServerError
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.remote.completions import CompletionChoice, parse_completion, parse_llama_cpp_completion


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_tokenizer(TeacherModel(path=TEACHER))


@pytest.fixture(scope="module")
def smol() -> Any:
    file = smollm2()
    return load_tokenizer(TeacherModel(path=str(file.parent), gguf_file=file.name))


@pytest.fixture
def service() -> Iterator[Service]:
    with demo_server() as running:
        yield running


def engine(url: str, tokenizer: Any, **options: Any) -> ServerEngine:
    made = ServerConfig(url=url, backoff=0.001, **options).build(
        None, TokenizerInfo.from_tokenizer(tokenizer)
    )
    assert isinstance(made, ServerEngine)
    return made


def prompts(tokenizer: Any, *texts: str) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_llama_cpp_server_writes_token_ids(llama_server: str, smol: Any) -> None:
    writer = engine(llama_server, smol)
    asked = prompts(smol, "The capital of France is", "1, 2, 3, 4,")
    first, second = writer.generate(asked, Sampling(max_tokens=6, temperature=0), seed=0)
    assert "Paris" in smol.decode(list(first.token_ids))
    assert smol.decode(list(second.token_ids)).startswith(" 5, 6")
    assert len(second.token_ids) == 6
    assert not second.finished
    # Texts of equal prompts differ, and come back with the seed; a prompt's number is what counts.
    warm = Sampling(max_tokens=8, temperature=1.3, top_k=200)
    drawn = writer.generate([asked[0]] * 2, warm, seed=5)
    assert drawn[0].token_ids != drawn[1].token_ids
    assert writer.generate([asked[0]], warm, seed=5, sample_ids=[1]) == drawn[1:]


def test_faults_between_llama_cpp_and_the_engine_change_nothing(llama_server: str, smol: Any) -> None:
    asked = prompts(smol, "One", "Two", "Three", "Four")
    sampling = Sampling(max_tokens=4, temperature=0)
    faults = ["truncate", (503, {}), "drop", "garble", (429, {"Retry-After": "0"}), "lose"]
    expected = engine(llama_server, smol).generate(asked, sampling, seed=0)
    with broken(llama_server, lambda n: faults[n % 6] if n > 8 and n % 2 else None) as proxy:
        writer = engine(proxy.url, smol, concurrency=2)
        assert writer.generate(asked, sampling, seed=0) == expected
        assert writer.served.client.usage.retries > 1


def test_every_setting_reaches_llama_cpp(llama_server: str, smol: Any) -> None:
    # 0.001 of the probability is one token: greedy, but by another way.
    asked = prompts(smol, "The capital of France is")
    writer = engine(llama_server, smol)
    greedy = writer.generate(asked, Sampling(max_tokens=4, temperature=0), seed=0)
    for narrow in ({"top_k": 1}, {"top_p": 0.001}, {"min_p": 0.999}):
        assert writer.generate(asked, Sampling(max_tokens=4, **narrow), seed=3) == greedy
    one = writer.generate(
        prompts(smol, "a a a a a a a a"),
        Sampling(max_tokens=4, temperature=0, repetition_penalty=50.0),
        seed=0,
    )
    assert smol.decode(list(one[0].token_ids)).split() != ["a"] * 4


def test_a_server_with_another_tokenizer_is_refused_and_both_ways_are_shown(
    llama_server: str, demo: Any
) -> None:
    with pytest.raises(ModelError, match="token ids are not the student's") as caught:
        engine(llama_server, demo)
    text = str(caught.value)
    assert "for the student's tokenizer" in text
    assert "on the server" in text
    assert "retokenise" in text


def test_the_same_seed_writes_what_the_model_itself_writes(service: Service, demo: Any) -> None:
    teacher = DemoTeacher()
    asked = prompts(demo, "name: Blue Spice\n", "name: The Punter | food: Fast food\n")
    sampling = Sampling(max_tokens=12, logprobs=True)
    for number, (prompt, got) in enumerate(
        zip(asked, engine(service.url, demo).generate(asked, sampling, seed=4), strict=True)
    ):
        (expected,) = teacher.engine.generate([prompt], sampling, request_seed(4, number))
        assert got.token_ids == expected.token_ids
        assert got.finished == expected.finished
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-6)


def test_answers_are_kept_and_never_asked_for_again(service: Service, demo: Any, tmp_path: Path) -> None:
    asked = prompts(demo, *(f"name: Number {n}\n" for n in range(12)))
    sampling = Sampling(max_tokens=4)
    with broken(service.url, lambda n: None if n < 14 else (500, {})) as proxy:
        writer = engine(proxy.url, demo, retries=0, concurrency=1)
        writer.use_journal(tmp_path / "answers.jsonl")
        with pytest.raises(ServerError, match="not answered"):
            writer.generate(asked, sampling, seed=1)
    done = len(writer.journal or ())
    assert 0 < done < 12
    with open(tmp_path / "answers.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "a line that a kill cut')
    before = (tmp_path / "answers.jsonl").read_bytes()
    again = engine(service.url, demo)
    again.use_journal(tmp_path / "answers.jsonl", share=1)  # another process of the run has its own file
    completions = again.generate(asked, sampling, seed=1)
    assert again.counts()["reused"] == done
    assert completions == engine(service.url, demo).generate(asked, sampling, seed=1)
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    alone = engine(service.url, demo)
    alone.use_journal(tmp_path / "answers.jsonl")
    assert alone.generate(asked, sampling, seed=1) == completions
    assert alone.counts()["reused"] == 12
    asked_for = [str(body["prompt"]) for body in service.bodies("/v1/completions") if "seed" in body]
    assert len(asked_for) == 12 + 12  # once for the two above together, once for the plain one


def test_texts_that_do_not_fit_the_servers_context_are_not_asked_for(demo: Any) -> None:
    with demo_server(context=20) as short:
        writer = engine(short.url, demo)
        before = len(short.seen)
        with pytest.raises(
            ConfigError, match=r"max_tokens.*takes 20 for prompt and response.*allowed: at most 1"
        ):
            writer.generate([[5] * 8], Sampling(max_tokens=30), seed=0)
        assert len(short.seen) == before


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(no_repeat_ngram_size=3), "no_repeat_ngram_size"),
        (Sampling(logprobs=True, temperature=0.7), "logprobs"),
        (Sampling(logprobs=True, top_p=0.9), "logprobs"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(
    service: Service, demo: Any, sampling: Sampling, field: str
) -> None:
    writer = engine(service.url, demo)
    before = len(service.seen)
    with pytest.raises(ConfigError, match=rf"engine\.sampling\.{field}"):
        writer.generate(prompts(demo, "a"), sampling, seed=0)
    assert len(service.seen) == before


def test_a_server_without_ids_needs_retokenise(demo: Any) -> None:
    with demo_server(token_ids=False) as plain:
        with pytest.raises(
            EngineError, match=r"takes no token ids as prompts and does not return.*retokenise"
        ):
            engine(plain.url, demo)
        writer = engine(plain.url, demo, retokenise=True)
        asked = prompts(demo, "name: Blue Spice\n", "name: The Punter\n")
        texts = writer.generate(asked, Sampling(max_tokens=30, temperature=0), seed=0)
        assert writer.counts()["retokenised"] == 2
        own = DemoTeacher().engine.generate(asked, Sampling(max_tokens=30, temperature=0), seed=0)
        for got, expected in zip(texts, own, strict=True):
            assert got.finished == expected.finished
            assert demo.decode(list(got.token_ids)) == demo.decode(list(expected.token_ids))


def test_an_end_token_of_the_servers_own_becomes_the_students() -> None:
    tokenizer_info = TokenizerInfo((2,), 0)
    sampling = Sampling(max_tokens=5)
    assert from_ids(CompletionChoice("x", "stop", (7, 9)), sampling, tokenizer_info).token_ids == (7, 2)
    ended = from_ids(CompletionChoice("x", "length", (7, 2, 8, 8, 8)), sampling, tokenizer_info)
    assert (ended.token_ids, ended.finished) == ((7, 2), True)
    with pytest.raises(EngineError, match="fills the server's context"):
        from_ids(CompletionChoice("x", "length", (7, 9)), sampling, tokenizer_info)
    with pytest.raises(EngineError, match="content_filter"):
        from_ids(CompletionChoice("x", "content_filter", (7, 9)), sampling, tokenizer_info)


def test_answers_of_both_kinds_are_understood() -> None:
    choice = {
        "text": "a",
        "finish_reason": "stop",
        "token_ids": [5, 2],
        "logprobs": {"token_logprobs": [-1, -2]},
    }
    assert parse_completion({"choices": [choice]}) == CompletionChoice("a", "stop", (5, 2), (-1.0, -2.0))
    native = {
        "content": "a",
        "stop_type": "limit",
        "tokens": [5],
        "completion_probabilities": [{"logprob": -1}],
    }
    assert parse_llama_cpp_completion(native) == CompletionChoice("a", "length", (5,), (-1.0,))
