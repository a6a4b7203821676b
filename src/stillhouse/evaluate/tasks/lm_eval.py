"""Tasks of EleutherAI's lm-eval harness."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import FilePath, ListOf, nearest
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome, Probe


@REGISTRY.register
class LmEvalProbe(Probe):
    """Tasks of the lm-eval harness on the model in memory (extra [eval]); the numbers are lm-eval's own.

    Metrics keep lm-eval's names (`acc`, `acc_norm`, `exact_match`, ... mostly 0 to 1) and units; `NAME_se` is
    its standard error. Every task named is a task of its own. Those that come with lm-eval load their data
    from the hub; `folder` holds tasks of your own (YAML), whose data may be local:

    `{kind: lm_eval, tasks: [arc_easy, hellaswag], limit: 500}`, `{kind: lm_eval, tasks: [mine], folder: own}`
    """

    kind: Literal["lm_eval"] = "lm_eval"
    tasks: Annotated[ListOf[str], Field(min_length=1)]
    """Names of tasks or groups."""
    folder: FilePath | None = None
    """A folder with tasks of your own, one YAML file each; then all names are looked for there alone."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question; default: what the task says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many questions of each task."""
    chat: bool = False
    """Put the tokenizer's chat template around the questions."""

    @property
    def title(self) -> str:
        """The name, or the harness's where it is one task."""
        return self.name or (self.tasks[0] if len(self.tasks) == 1 else self.kind)

    def expanded(self) -> Sequence[Probe]:
        """One measurement for each task."""
        if len(self.tasks) == 1:
            return (self,)
        names = [self.name and f"{self.name}-{task}" for task in self.tasks]
        return [
            self.model_copy(update={"tasks": (task,), "name": name})
            for task, name in zip(self.tasks, names, strict=True)
        ]

    def header(self, bench: Bench) -> dict[str, Any]:
        """What a result depends on; of tasks of one's own also their text."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()] if self.folder else []
        content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {**super().header(bench), "files": content}

    def measure(self, bench: Bench) -> Outcome:
        """Let the harness ask and score.

        Raises:
            EnvironmentFault: lm-eval is not installed.
            ConfigError: it knows no such task, or the task wants something that is not supported.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager

            from stillhouse.evaluate.harness import HarnessModel
        except ImportError as error:
            raise EnvironmentFault(
                "the task lm_eval needs the package lm-eval. Install it with: pip install 'stillhouse[eval]'"
            ) from error
        (task,) = self.tasks
        own = None if self.folder is None else str(self.folder)
        manager = TaskManager(include_path=own, include_defaults=own is None)
        if task not in manager.all_tasks:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title}).tasks",
                    f"lm-eval knows no task {task!r}{nearest(task, list(manager.all_tasks))}",
                    hint="Tasks of your own need folder: FOLDER.",
                )
            )
        journal = bench.open_journal({"task": task, "weights": bench.weights_of(bench.model)}, "")
        found: Any = lm_eval.simple_evaluate(
            HarnessModel(bench, journal),
            tasks=[task],
            num_fewshot=self.few_shot,
            limit=self.limit,
            apply_chat_template=self.chat,
            task_manager=manager,
            verbosity="ERROR",
        )
        settings = {
            "lm_eval": lm_eval.__version__,
            "task_version": found["versions"].get(task),
            "few_shot": found["n-shot"].get(task),
            "questions": found["n-samples"].get(task, {}).get("effective"),
            "chat": self.chat,
        }
        return Outcome(_metrics(task, found["results"]), settings, _rows(found.get("samples", {})))


def _metrics(task: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`acc,none` of the task as `acc`, of a part of a group as `PART.acc`."""
    metrics: dict[str, float] = {}
    for part, values in results.items():
        prefix = "" if part == task else f"{part}."
        for key, value in values.items():
            name, comma, rule = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            name = f"{name.removesuffix('_stderr')}_se" if name.endswith("_stderr") else name
            metrics[f"{prefix}{name}" + ("" if rule == "none" else f".{rule}")] = float(value)
    return metrics


def _rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for task, asked in samples.items():
        for sample in asked:
            scores = {
                name: value
                for name in sample.get("metrics", ())
                if isinstance(value := sample.get(name), int | float)
            }
            first = next(iter(sample.get("arguments", [])), ("",))
            answers = sample.get("filtered_resps") or [""]
            rows.append(
                {
                    "id": f"{task}:{sample['doc_id']}",
                    "prompt": str(first[0]),
                    "references": [str(sample.get("target", ""))],
                    "response": answers[0] if isinstance(answers[0], str) else str(answers),
                    **scores,
                }
            )
    return rows
