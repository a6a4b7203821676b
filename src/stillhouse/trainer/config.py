"""The arguments of a `DistilTrainer`: Hugging Face's TrainingArguments, and what distillation adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from stillhouse.errors import ConfigError, Fault
from stillhouse.runs.training_arguments import FIXED
from stillhouse.trainer.arguments import with_foreign_refused

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that are those of `engine.sampling`."""
ANY_VALUE = frozenset({"remove_unused_columns", "disable_tqdm", "label_names", "local_rank", "use_cpu"})
"""Fixed fields of TrainingArguments that a trainer of Python sets itself, or that a user may choose."""


@with_foreign_refused
@dataclass
class DistilConfig(TrainingArguments):
    """TrainingArguments with the options of a distillation; all of them are keywords.

    The method is a `recipe` of `stillhouse methods`, or the trainer's `objective` and `responses`, or GKD's
    three numbers under the names that TRL gives them: `lmbda`, `beta` and `seq_kd`. A batch is
    per_device_train_batch_size x gradient_accumulation_steps x processes prompts; the loss is divided by the
    response tokens of all of it. What TrainingArguments are by default, they are here.

    Raises:
        ConfigError: an argument is unknown, another trainer's, or must keep its value; a `ValueError`.

    Example: `DistilConfig("out", recipe="distillm", learning_rate=1e-4, max_completion_length=256)`
    """

    recipe: str | None = None
    """A method by its name; default: kd, forward KL on the responses of the rows."""
    lmbda: float | None = None
    """GKD's lambda: the share of steps on text that the student writes; 0 to 1."""
    beta: float | None = None
    """GKD's beta, the teacher's weight in the Jensen-Shannon divergence: 0 is forward KL, 1 reverse KL."""
    seq_kd: bool = False
    """With `lmbda`: steps that are not the student's are on text of the teacher instead of the rows'."""
    temperature: float | None = None
    """Of sampling; default: the recipe's, or 1."""
    top_p: float | None = None
    """See `Sampling.top_p`."""
    top_k: int | None = None
    """See `Sampling.top_k`."""
    min_p: float | None = None
    """See `Sampling.min_p`."""
    repetition_penalty: float | None = None
    """See `Sampling.repetition_penalty`."""
    max_prompt_length: int = 512
    """Most tokens of a prompt, template included; `data.max_prompt`."""
    max_completion_length: int = 512
    """Most tokens of a response, its end included; `data.max_response`."""
    max_length: int | None = None
    """Most tokens of prompt and response of a row together: as with TRL the oldest tokens of the prompt go,
    and a row whose response alone fills it is dropped and counted."""
    template: Any = "auto"
    """`data.template`: auto, chat, plain, alpaca, or a dictionary with `kind`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": False}."""
    normalise: str | None = None
    """`train.normalise`: token or sequence; default: the recipe's."""
    disable_dropout: bool = False
    """Set every dropout of the student to 0."""
    model_init_kwargs: dict[str, Any] | None = None
    """Passed to from_pretrained where the model is a name."""
    teacher_model_name_or_path: str | None = None
    """The teacher, where the trainer is given none."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """Passed to from_pretrained where the teacher is a name."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Only for models that you trust."""
    data: dict[str, Any] = field(default_factory=dict)
    """Further options of a run's `data`, such as {"bad_rows": "drop", "train_on": "all"}."""
    engine: dict[str, Any] = field(default_factory=dict)
    """A run's `engine`, which writes text, such as {"kind": "transformers", "batch_size": 64}."""
    train: dict[str, Any] = field(default_factory=dict)
    """Those options of a run's `train` that TrainingArguments do not have: packing, fused,
    micro_batch_tokens."""

    def __post_init__(self) -> None:
        """Set what the step relies on, and refuse what would break it."""
        if faults := list(self._invalid()):
            raise ConfigError(*faults)
        super().__post_init__()
        self.remove_unused_columns = False
        self.label_names: list[str] | None = []
        self.logging_nan_inf_filter = False
        self._n_gpu = min(1, self.n_gpu)  # several processes, not one with all GPUs

    def _invalid(self) -> Iterator[Fault]:
        defaults = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
        for name in sorted(FIXED - ANY_VALUE - {"logging_nan_inf_filter"}):
            if name in defaults and getattr(self, name) != defaults[name]:
                yield Fault(name, "cannot be changed: the step relies on it", got=repr(getattr(self, name)))
        if self.fp16:
            yield Fault(
                "fp16", "is not supported: losses are checked for infinity", got="True", allowed="bf16"
            )
        if self.label_smoothing_factor:
            yield Fault(
                "label_smoothing_factor",
                "has no effect: the objective is the loss",
                got=str(self.label_smoothing_factor),
            )
        if self.use_liger_kernel:
            hint = "Leave it out: the loss is fused with the head anyway."
            yield Fault("use_liger_kernel", "has no effect on the loss", got="True", hint=hint)
        for name in ("lmbda", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                yield Fault(name, "must be from 0 to 1", got=str(value))
        if self.seq_kd and not self.teaches_by_numbers:
            yield Fault("seq_kd", "belongs to lmbda and beta", got="True", hint="Or give recipe='seqkd'.")
        if self.teaches_by_numbers and self.recipe is not None:
            yield Fault(
                "recipe", "lmbda and beta are a method already", got=self.recipe, hint="Give one of them."
            )

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(str(self.output_dir))

    @property
    def teaches_by_numbers(self) -> bool:
        """Whether the method is given as GKD's numbers."""
        return self.lmbda is not None or self.beta is not None

    @property
    def method(self) -> dict[str, Any]:
        """`recipe`, or `objective` and `responses` of GKD's numbers (Agarwal et al. 2024, arXiv 2306.13649).

        beta 0 is forward KL, 1 reverse KL, between them w KL(p || m) + (1 - w) KL(q || m) with
        m = w p + (1 - w) q and w = beta.
        """
        if not self.teaches_by_numbers:
            return {} if self.recipe is None else {"recipe": self.recipe}
        weight = 0.5 if self.beta is None else self.beta
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        objective: dict[str, Any] = (
            {"kind": ends[weight]} if weight in ends else {"kind": "jsd", "teacher_weight": weight}
        )
        return {"objective": objective, "responses": self._responses()}

    def _responses(self) -> dict[str, Any]:
        """Whose responses `lmbda` and `seq_kd` ask for."""
        by_teacher = {"kind": "generated", "by": "teacher", "refresh": "step"}
        others: dict[str, Any] = by_teacher if self.seq_kd else {"kind": "fixed"}
        if not self.lmbda:
            return others
        if self.lmbda == 1:
            return {"kind": "on_policy"}
        return {"kind": "mixed", "student_share": self.lmbda, "base": others}

    @property
    def writes_text(self) -> bool:
        """Whether a model may write responses; False only where GKD's numbers rule it out."""
        return not self.teaches_by_numbers or bool(self.lmbda) or self.seq_kd

    def sampling(self) -> dict[str, Any]:
        """What is set of `engine.sampling`; a default without effect is left out, so that none is told of."""
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        found = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if not self.writes_text:
            return {name: value for name, value in found.items() if value != defaults[name]}
        return found if self.max_length is None else {"max_tokens": self.max_completion_length, **found}

    def run_section(self) -> dict[str, Any]:
        """What TrainingArguments say of a run's `train`."""
        return {
            **(
                {"max_steps": self.max_steps}
                if self.max_steps > 0
                else {"epochs": float(self.num_train_epochs)}
            ),
            "batch_size": self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            * self.world_size,
            "micro_batch_size": self.per_device_train_batch_size,
            "seed": self.seed,
            "precision": "bfloat16" if self.bf16 else "float32",
            **({} if self.normalise is None else {"normalise": self.normalise}),
            **self.train,
        }
