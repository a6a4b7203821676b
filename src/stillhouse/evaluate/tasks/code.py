"""Problems of programming, scored by running tests in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse import console
from stillhouse.config import ListOf
from stillhouse.data import DatasetConfig
from stillhouse.data.rows import Row
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.metrics.pass_at_k import pass_at_k
from stillhouse.evaluate.tasks.base import REGISTRY, Question, Scores, Task
from stillhouse.evaluate.tasks.probe import Bench, Outcome
from stillhouse.evaluate.tasks.shots import WithShots
from stillhouse.grading import CodeProblem, problem_of, require_sandbox, run_program
from stillhouse.sandbox import ExecutionResult, Limits


class _Programs(Task):
    """Programs that have to pass tests, each in a confined process of its own.

    `pass_at_K` (0 to 1) is the unbiased estimate over all samples of all seeds.
    """

    k: ListOf[Annotated[int, Field(ge=1)]] = (1,)
    """For which numbers of tries; at most `samples` times the number of seeds."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Time that a program and its tests may take."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Address space of its process."""

    def decoded(self, tokenizer: Any, ids: Sequence[int]) -> str:
        """The text as it is: white space at its beginning is part of a program."""
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def measure(self, bench: Bench) -> Outcome:
        """Write programs, run them, count.

        Raises:
            EnvironmentFault: programs cannot be confined on this machine; nothing is written then.
            ConfigError: fewer samples than `k`.
        """
        require_sandbox()
        tries = self.samples * len(self.settled(bench)[1])
        if max(self.k) > tries:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title}).k",
                    "needs as many samples",
                    got=str(max(self.k)),
                    allowed=f"at most {tries} (samples times seeds)",
                )
            )
        return super().measure(bench)

    def score(self, question: Question, text: str) -> Scores:
        """1 if the program passes, and why not."""
        return self.scores([question], [text])[0]

    def scores(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Scores]:
        """Programs run side by side, the same one once."""
        jobs: dict[tuple[str, str], CodeProblem] = {}
        keys = []
        for question, text in zip(questions, texts, strict=True):
            problem = problem_of(question.facts)
            assert isinstance(problem, CodeProblem)
            key = (problem.program(text), problem.tests.source)
            jobs.setdefault(key, problem)
            keys.append(key)
        limits = Limits(self.seconds, max(1, round(self.seconds)), self.memory_mb << 20)

        def run(key: tuple[str, str]) -> ExecutionResult:
            return run_program(key[0], jobs[key].tests, limits)

        found: dict[tuple[str, str], ExecutionResult] = {}
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            console.progress(f"Running programs of {self.title}", len(jobs)) as bar,
        ):
            for key, result in zip(jobs, pool.map(run, jobs), strict=True):
                found[key] = result
                bar.advance()
        return [
            {"passed": float(found[key].passed), "status": found[key].status, "detail": found[key].detail}
            for key in keys
        ]

    def _check_tests(self, raw: Mapping[str, Any], where: str, wanted: str) -> None:
        if not isinstance(problem_of(raw), CodeProblem):
            raise DataError(f"{where}: has no tests, so any program would pass; {self.kind} needs {wanted}")

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """pass@k over the questions, and the share of programs that ended by a limit."""
        by_question: dict[str, list[float]] = {}
        for row in rows:
            by_question.setdefault(row["id"], []).append(row["passed"])
        metrics = {
            f"pass_at_{k}": sum(pass_at_k(len(p), round(sum(p)), k) for p in by_question.values())
            / len(by_question)
            for k in self.k
        }
        stopped = sum(row["status"] in ("timeout", "memory", "disk", "crashed") for row in rows)
        return {**metrics, "stopped_by_limit": stopped / len(rows)}

    def about(self) -> dict[str, Any]:
        """How programs were run."""
        return {
            "programs": "confined: no network, no other process, own folder",
            "seconds": self.seconds,
            "memory_mb": self.memory_mb,
        }


@REGISTRY.register
class HumanEval(_Programs):
    """Functions to complete from signature and docstring (Chen et al. 2021, arXiv 2107.03374).

    Example: `evaluate: {tasks: [{kind: humaneval, data: humaneval.jsonl, samples: 10, k: [1, 10]}]}`
    """

    kind: Literal["humaneval"] = "humaneval"
    ask: str = "{prompt}"
    """The instruction; `{prompt}` stands for signature and docstring. For chat models add words before it."""

    def row(self, raw: Mapping[str, Any], where: str, source: DatasetConfig) -> Row:
        """The prompt; the reference is the authors' solution."""
        if not {"prompt", "entry_point", "test"} <= raw.keys():
            raise DataError(f"{where}: humaneval needs prompt, entry_point and test; got {', '.join(raw)}")
        self._check_tests(raw, where, "a function check(candidate) in test")
        solution = str(raw.get("canonical_solution", ""))
        return Row(where, self.ask.replace("{prompt}", str(raw["prompt"])), references=(solution,))


@REGISTRY.register
class MBPP(_Programs, WithShots):
    """Short functions to write from a sentence and tests (Austin et al. 2021, arXiv 2108.07732)."""

    kind: Literal["mbpp"] = "mbpp"

    def row(self, raw: Mapping[str, Any], where: str, source: DatasetConfig) -> Row:
        """The task with its tests, after the worked examples; the reference is the authors' solution."""
        if not {"text", "test_list"} <= raw.keys():
            raise DataError(f"{where}: mbpp needs text and test_list; got {', '.join(raw)}")
        self._check_tests(raw, where, "at least one test in test_list")
        asked = self._examples + self._asking(raw)
        return Row(where, asked, references=(str(raw.get("code", "")),))

    @cached_property
    def _examples(self) -> str:
        return "".join(f"{self._asking(raw)}{raw['code']}\n[DONE]\n\n" for raw in self.worked())

    def _asking(self, raw: Mapping[str, Any]) -> str:
        tests = "\n".join(map(str, raw["test_list"]))
        begin = "[BEGIN]\n" if self.shots else ""
        return f"Write a Python function.\n{raw['text']}\nIt has to pass these tests:\n{tests}\n{begin}"
