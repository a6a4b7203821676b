"""Code generation, scored by running tests in the sandbox."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.config import ListOf
from stillhouse.data import DataConfig, DatasetConfig, DatasetField, Encoder
from stillhouse.data.rows import Row
from stillhouse.data.templates import Custom, Plain, Template
from stillhouse.engines.base import Sampling
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, TaskResult
from stillhouse.evaluate.tasks.prompts import EvalExample, EvalSet, FewShotTask, ScoredTask, Scores
from stillhouse.grading import CodeProblem, problem_of, require_sandbox, run_program
from stillhouse.sandbox import ExecutionResult, Limits

STOPPED = frozenset({"timeout", "memory", "disk", "threads", "crashed"})
"""How a program ended that exceeded a limit."""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k) of the chance that one of k programs passes.

    Args:
        samples: n, programs sampled for a problem; at least k.
        passed: c, how many of them passed.
        k: the number of attempts.

    Returns:
        A number between 0 and 1; its mean over problems is pass@k.

    Raises:
        ValueError: there are fewer than k samples.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {passed} of {samples} samples")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


AS_IS = Custom(without_input="{instruction}")
"""The prompt and nothing else, as the public harnesses give it to a model."""


class CodeTask(ScoredTask):
    """Programs that have to pass tests, each in a confined process.

    `pass_at_K` (0 to 1) is the unbiased estimate over all samples of all seeds.
    """

    k: ListOf[Annotated[int, Field(ge=1)]] = (1,)
    """Numbers of attempts to estimate pass@k for; at most `samples` times the number of seeds."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that a program and its tests may take."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Address space of a process."""
    strip_responses: ClassVar[bool] = False
    """Leading white space is part of a program."""

    def encoder(self, template: Template, tokenizer: Any) -> Encoder:
        """As for every task, but `plain` adds no line break: the model continues the text of the task."""
        encoder = super().encoder(template, tokenizer)
        return Encoder(AS_IS, tokenizer) if isinstance(encoder.template, Plain) else encoder

    def check_sampling(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """Refuse fewer samples than `k`, and samples that are all equal."""
        sampling, seeds = self.sampling or sampling, self.seeds or seeds
        attempts = self.samples * len(set(seeds))
        if max(self.k) > attempts:
            raise ValueError(
                f"{self.title}: pass@{max(self.k)} needs as many samples, and there are {attempts} "
                f"(samples times seeds). Set samples: {max(self.k)} and a temperature, or a lower k."
            )
        if (self.samples > 1 or max(self.k) > 1) and (sampling.temperature == 0 or sampling.top_k == 1):
            raise ValueError(
                f"{self.title}: greedy decoding writes {attempts} equal programs for each problem, so that "
                "pass@k for every k is pass@1. Set sampling: {temperature: 0.8, top_p: 0.95} of the task, or "
                "samples: 1 and k: [1]."
            )

    def load(
        self,
        encoder: Encoder,
        limits: DataConfig,
        held_out: DatasetConfig | None = None,
        limit: int | None = None,
    ) -> EvalSet:
        """As that of all tasks, on machines that can confine programs.

        Raises:
            EnvironmentFault: this one cannot.
        """
        require_sandbox()
        return super().load(encoder, limits, held_out, limit)

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Generate programs and run their tests.

        Raises:
            EnvironmentFault: programs cannot be confined on this machine; nothing is generated then.
            ConfigError: there are fewer samples than `k`, or they would all be equal.
        """
        require_sandbox()
        try:
            self.check_sampling(*self.sampling_and_seeds(context))
        except ValueError as error:
            raise ConfigError(Fault("evaluate.tasks", str(error))) from None
        return super().evaluate(context)

    def score(self, example: EvalExample, response: str) -> Scores:
        """1 if the program passes, and how it ended."""
        return self.score_all([example], [response])[0]

    def score_all(self, examples: Sequence[EvalExample], responses: Sequence[str]) -> list[Scores]:
        """Run programs in parallel, equal ones once."""
        jobs: dict[tuple[str, str], CodeProblem] = {}
        keys = []
        for example, response in zip(examples, responses, strict=True):
            problem = problem_of(example.row)
            assert isinstance(problem, CodeProblem)
            key = (problem.program(response), problem.tests.source)
            jobs.setdefault(key, problem)
            keys.append(key)
        limits = Limits(self.timeout, max(1, round(self.timeout)), self.memory_mb << 20)

        def run(key: tuple[str, str]) -> ExecutionResult:
            return run_program(key[0], jobs[key].tests, limits)

        results: dict[tuple[str, str], ExecutionResult] = {}
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            console.progress(f"Running programs of {self.title}", len(jobs)) as bar,
        ):
            for key, result in zip(jobs, pool.map(run, jobs), strict=True):
                results[key] = result
                bar.advance()
        return [
            {"passed": float(result.passed), "status": result.status, "detail": result.detail}
            for result in (results[key] for key in keys)
        ]

    def _require_tests(self, raw: Mapping[str, Any], where: str, wanted: str) -> None:
        if not isinstance(problem_of(raw), CodeProblem):
            raise DataError(f"{where}: has no tests, so any program would pass; {self.kind} needs {wanted}")

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """pass@k over the problems, and the share of programs that exceeded a limit."""
        by_problem: dict[str, list[float]] = {}
        for row in rows:
            by_problem.setdefault(row["id"], []).append(row["passed"])
        metrics = {
            f"pass_at_{k}": sum(pass_at_k(len(p), round(sum(p)), k) for p in by_problem.values())
            / len(by_problem)
            for k in self.k
        }
        stopped = sum(row["status"] in STOPPED for row in rows)
        return {**metrics, "stopped_by_limit": stopped / len(rows)}

    def score_settings(self) -> dict[str, Any]:
        """How programs were run."""
        return {
            "programs": "confined: no network, no child processes, own folder",
            "timeout": self.timeout,
            "memory_mb": self.memory_mb,
        }


@REGISTRY.register
class HumanEval(CodeTask):
    """Functions to complete from signature and docstring (Chen et al. 2021, arXiv 2107.03374).

    Example: `evaluate: {tasks: [{kind: humaneval, data: humaneval.jsonl}]}`; for pass@10
    `{kind: humaneval, data: humaneval.jsonl, samples: 10, k: [1, 10], sampling: {temperature: 0.8}}`
    """

    kind: Literal["humaneval"] = "humaneval"
    prompt_format: str = "{prompt}"
    """The instruction, with `{prompt}` for signature and docstring; a chat model needs words before it."""

    def parse_row(self, raw: Mapping[str, Any], where: str, dataset: DatasetConfig) -> Row:
        """The prompt; the reference is the authors' solution."""
        if not {"prompt", "entry_point", "test"} <= raw.keys():
            raise DataError(f"{where}: humaneval needs prompt, entry_point and test; got {', '.join(raw)}")
        self._require_tests(raw, where, "a function check(candidate) in test")
        solution = str(raw.get("canonical_solution", ""))
        return Row(where, self.prompt_format.replace("{prompt}", str(raw["prompt"])), references=(solution,))


@REGISTRY.register
class MBPP(CodeTask, FewShotTask):
    """Short functions to write from a sentence and tests (Austin et al. 2021, arXiv 2108.07732).

    Prompted as the public harnesses do: the authors' words and marks, after three solved examples, the
    tasks 2, 3 and 4 of the data set. With `few_shot: 0` there are no examples and no marks, for chat models.
    """

    kind: Literal["mbpp"] = "mbpp"
    few_shot: Annotated[int, Field(ge=0)] = 3
    """Number of solved examples before each prompt."""
    few_shot_data: DatasetField | None = Field(
        "package:stillhouse/evaluate/tasks/mbpp_examples.jsonl", validate_default=True
    )
    """Rows of the solved examples; default: the three of the public harnesses."""
    max_prompt: Annotated[int, Field(ge=1)] | None = 2048
    """Maximum tokens of a prompt: three examples are longer than most prompts. null: `data.max_prompt`."""
    prompt_format: str = (
        "You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n{tests}\n"
    )
    """The instruction, with `{text}` for the task's sentence and `{tests}` for its tests, one a line."""

    def parse_row(self, raw: Mapping[str, Any], where: str, dataset: DatasetConfig) -> Row:
        """The task with its tests, after the few-shot examples; the reference is the authors' solution."""
        if not {"text", "test_list"} <= raw.keys():
            raise DataError(f"{where}: mbpp needs text and test_list; got {', '.join(raw)}")
        self._require_tests(raw, where, "at least one test in test_list")
        return Row(where, self._examples + self._instruction(raw), references=(str(raw.get("code", "")),))

    @cached_property
    def _examples(self) -> str:
        rows = self.few_shot_rows()
        return "".join(f"{self._instruction(raw)}{raw['code']}\n[DONE]\n\n" for raw in rows)

    def _instruction(self, raw: Mapping[str, Any]) -> str:
        values = {"{text}": str(raw["text"]), "{tests}": "\n".join(map(str, raw["test_list"]))}
        words = re.sub(r"\{text\}|\{tests\}", lambda match: values[match[0]], self.prompt_format)
        return words + ("[BEGIN]\n" if self.few_shot else "")
