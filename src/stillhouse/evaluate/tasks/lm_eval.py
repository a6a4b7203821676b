"""Tasks of EleutherAI's lm-eval harness."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import FilePath, ListOf, nearest
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.evaluate.generation import Share
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, EvalTask, TaskResult

BOOTSTRAPS = 100_000
"""Samples of the standard error of a metric that has no formula for it; lm-eval's own."""


@REGISTRY.register
class LmEvalHarness(EvalTask):
    """Tasks of the lm-eval harness on the model in memory, with its numbers (extra [eval]).

    Metrics keep lm-eval's names (`acc`, `acc_norm`, `exact_match`, ... mostly 0 to 1) and units; `NAME_se`
    is the standard error. Each of `tasks` has a result of its own. Those that come with lm-eval load their
    data from the hub; `folder` holds your own (YAML), whose data may be local:

    `{kind: lm_eval, tasks: [arc_easy, hellaswag], limit: 500}`, `{kind: lm_eval, tasks: [mine], folder: own}`
    """

    kind: Literal["lm_eval"] = "lm_eval"
    tasks: Annotated[ListOf[str], Field(min_length=1)]
    """Names of tasks or groups."""
    folder: FilePath | None = None
    """A folder with your own tasks, one YAML file each; then names are looked up there only."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Number of solved examples before each prompt; default: that of the task."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many prompts per task."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to the prompts."""

    @property
    def title(self) -> str:
        """The name, or lm-eval's where it is one task."""
        return self.name or (self.tasks[0] if len(self.tasks) == 1 else self.kind)

    def expanded(self) -> Sequence[EvalTask]:
        """One for each of lm-eval's tasks."""
        if len(self.tasks) == 1:
            return (self,)
        names = [self.name and f"{self.name}-{task}" for task in self.tasks]
        return [
            self.model_copy(update={"tasks": (task,), "name": name})
            for task, name in zip(self.tasks, names, strict=True)
        ]

    def dependencies(self, context: EvalContext) -> dict[str, Any]:
        """What the result depends on; of your own tasks also their files."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()] if self.folder else []
        content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {**super().dependencies(context), "files": content}

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Let the harness prompt the model and score its answers.

        Raises:
            EnvironmentFault: lm-eval is not installed.
            ConfigError: lm-eval has no such task, or the task needs something that is not supported.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager

            from stillhouse.evaluate.lm_eval_model import HarnessModel
        except ImportError as error:
            raise EnvironmentFault(
                "the task lm_eval needs the package lm-eval. Install it with: pip install 'stillhouse[eval]'"
            ) from error
        (task,) = self.tasks
        folder = None if self.folder is None else str(self.folder)
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if task not in manager.all_tasks:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title}).tasks",
                    f"lm-eval has no task {task!r}{nearest(task, list(manager.all_tasks))}",
                    hint="Your own tasks need folder: FOLDER.",
                )
            )
        journal = context.open_journal({"task": task, "weights": context.fingerprint(context.model)}, "")
        results: Any = lm_eval.simple_evaluate(
            HarnessModel(context, journal),
            tasks=[task],
            num_fewshot=self.few_shot,
            limit=self.limit,
            apply_chat_template=self.chat_template,
            task_manager=manager,
            verbosity="ERROR",
            bootstrap_iters=BOOTSTRAPS if context.world.rank == 0 else 0,
        )
        results = Share(context.world).of_first(results)  # the harness gives them to one process of a machine
        settings = {
            "lm_eval": lm_eval.__version__,
            "task_version": results["versions"].get(task),
            "few_shot": results["n-shot"].get(task),
            "prompts": results["n-samples"].get(task, {}).get("effective"),
            "chat_template": self.chat_template,
        }
        return TaskResult(_metrics(task, results["results"]), settings, _rows(results.get("samples", {})))


def _metrics(task: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`acc,none` of the task as `acc`, of a member of a group as `MEMBER.acc`."""
    metrics: dict[str, float] = {}
    for member, values in results.items():
        prefix = "" if member == task else f"{member}."
        for key, value in values.items():
            name, comma, filter_name = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            name = f"{name.removesuffix('_stderr')}_se" if name.endswith("_stderr") else name
            suffix = "" if filter_name == "none" else f".{filter_name}"
            metrics[f"{prefix}{name}{suffix}"] = float(value)
    return metrics


def _rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for task, task_samples in samples.items():
        for sample in task_samples:
            scores = {
                name: value
                for name in sample.get("metrics", ())
                if isinstance(value := sample.get(name), int | float)
            }
            arguments = next(iter(sample.get("arguments", [])), ("",))
            responses = sample.get("filtered_resps") or [""]
            rows.append(
                {
                    "id": f"{task}:{sample['doc_id']}",
                    "prompt": str(arguments[0]),
                    "references": [str(sample.get("target", ""))],
                    "response": responses[0] if isinstance(responses[0], str) else str(responses),
                    **scores,
                }
            )
    return rows
