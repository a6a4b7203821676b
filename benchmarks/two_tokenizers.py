"""What a teacher with another tokenizer costs: time of a training step against distillation over shared ids.

The same student and texts of the demonstration throughout, under two byte-level tokenizers that are trained
here, one on the texts, one on the texts in capitals too, and filled up with words that do not occur to 8,192
and 12,288 ids. Teacher and student are random Llamas; time does not depend on what they know. Every method
takes its turn in each round; the table has medians of processor seconds.

    python benchmarks/two_tokenizers.py --output benchmarks/results/two_tokenizers.json
    python benchmarks/two_tokenizers.py --small
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _result import result, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.data.token_bytes import TokenBytes
from stillhouse.data.translate import Translator
from stillhouse.files import locate
from stillhouse.objectives.registry import parse_objective
from stillhouse.rollouts.base import StatelessPolicy
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

METHODS: dict[str, Any] = {
    "forward_kl, one tokenizer": "forward_kl",
    "jsd, one tokenizer": "jsd",
    "uld, one tokenizer": "uld",
    "uld": "uld",
    "span": "span",
    "span, forward_kl": {"kind": "span", "compare": "forward_kl"},
    "transport": "transport",
    "transport, 2 layers": {"kind": "transport", "layers": [0.5, 1.0]},
}
ONE = "one tokenizer"


def bpe(texts: Sequence[str], size: int) -> Any:
    """A byte-level tokenizer trained on some texts, filled up to `size` ids with words that do not occur."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    tree = json.loads(made.to_str())
    vocab = tree["model"]["vocab"]
    vocab |= {f"filler{number}": number for number in range(len(vocab), size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token="<end>", pad_token="<pad>"
    )


def llama(vocab: int, width: int, layers: int, seed: int) -> Any:
    """Random weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=4 * width, max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


class Given(StatelessPolicy):
    """The same responses at every step."""

    def __init__(self, responses: list[Response]) -> None:
        self.responses = responses

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One each."""
        return [[response] for response in self.responses]


def rows(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of the demonstration, several to a row so that responses are of some length."""
    path = locate("package:stillhouse/demo/data/train.jsonl")
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for start in range(0, 4 * count, 4):
        some = read[start : start + 4]
        found.append((some[0]["prompt"], " ".join(str(row["outputs"][0]) for row in some)))
    return found


class Bench:
    """Steps of all methods over the same texts."""

    def __init__(self, small: bool) -> None:
        count, self.width = (2, 32) if small else (4, 64)
        sizes = (1024, 1536) if small else (8192, 12288)
        texts = rows(count)
        corpus = [text for pair in rows(200 if small else 500) for text in pair]
        self.ours, self.theirs = bpe(corpus, sizes[0]), bpe([t.upper() + t for t in corpus], sizes[1])
        self.responses = [self._response(number, *pair) for number, pair in enumerate(texts)]
        self.student = llama(len(self.ours), self.width, 2, 1)
        self.teachers = {
            tokenizer: LiveTeacher(llama(len(one), 2 * self.width, 4, 2).requires_grad_(False), len(one))
            for tokenizer, one in ((ONE, self.ours), ("two", self.theirs))
        }
        ends = (self.ours.eos_token_id, self.theirs.eos_token_id)
        self.translator = Translator(TokenBytes(self.ours), TokenBytes(self.theirs), ends, pad_id=0)

    def _response(self, number: int, asked: str, answer: str) -> Response:
        ids = [tuple(one(asked)["input_ids"]) for one in (self.ours, self.theirs)]
        prompt = Prompt(f"train:{number}", ids[0], asked, teacher_ids=ids[1])
        return Response(prompt, (*self.ours(answer)["input_ids"], self.ours.eos_token_id), "fixed")

    def step(self, name: str) -> dict[str, float]:
        """Processor seconds of one step, and of its parts."""
        alone = name.endswith(ONE)
        method = Method(FixedConfig(), parse_objective(METHODS[name]), "token")
        teachers = {"main": self.teachers[ONE if alone else "two"]}
        translator = None if alone else self.translator
        step = Step(method, Given(self.responses), teachers, 0, len(self.ours), translator=translator)
        self.student.zero_grad()
        start = time.process_time()
        [micro] = step.prepare([], Progress(0, 1, 0.0, 1.0), 1).micro_batches
        prepared = time.process_time()
        step.loss(self.student, micro).loss.backward()
        end = time.process_time()
        return {"seconds": end - start, "prepare": prepared - start}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="only see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.small)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for number in range(1 + (1 if options.small else options.rounds)):
        for name in METHODS:
            taken = bench.step(name)
            if number:  # the first round warms up
                found[name].append(taken)
    medians = {name: statistics.median(one["seconds"] for one in taken) for name, taken in found.items()}
    base = medians[f"forward_kl, {ONE}"]
    tokens = sum(len(response.token_ids) for response in bench.responses)
    bench.translator.metrics()  # of the steps
    bench.translator.teacher_batch(bench.responses)
    facts = bench.translator.metrics()
    single, groups = facts["alignment/one_to_one"]
    table = [
        {
            "method": name,
            "cpu_seconds": round(seconds, 4),
            "times_forward_kl": round(seconds / base, 2),
            "translate_seconds": round(statistics.median(one["prepare"] for one in found[name]), 4),
        }
        for name, seconds in medians.items()
    ]
    matching = bench.translator.vocabulary_match
    sizes = {"student": len(bench.ours), "teacher": len(bench.theirs), "shared": len(matching.student)}
    found = result(table, response_tokens=tokens, vocabularies=sizes, one_to_one=round(single / groups, 3))
    for row in table:
        print(row)
    save(options.output, found)


if __name__ == "__main__":
    main()
