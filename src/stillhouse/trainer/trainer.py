"""A Trainer for any method, over models and rows that a program holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import speed_metrics

from stillhouse.core.distributed import Ranks
from stillhouse.errors import ConfigError, Fault, TrainingError
from stillhouse.evaluate.likelihood import likelihood, references_of
from stillhouse.files import follow_umask
from stillhouse.models import image_reader
from stillhouse.runs.export.weights import name_ends
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.train import checkpoints
from stillhouse.train.callbacks import StepStateSaver, measured
from stillhouse.train.driver import progress_of
from stillhouse.train.trainer import StepTrainer, steps_in_all, steps_in_epoch
from stillhouse.trainer.arguments import OF_TRAINERS, refuse_foreign
from stillhouse.trainer.config import DistilConfig
from stillhouse.trainer.loaded import Given, Model, eval_prompts, load_parts


class DistilTrainer(StepTrainer):
    """Hugging Face's Trainer with any objective and any responses of Stillhouse.

    The arguments are named as TRL's trainers name them. The loss is that of `stillhouse run`: fused with the
    head, divided once by the response tokens of the whole step. Checkpoints hold the state of schedules,
    replay buffers and curricula, so that `train(resume_from_checkpoint=True)` equals a straight run.

    Example:
        >>> trainer = DistilTrainer(student, teacher, DistilConfig("out", recipe="skl"), rows)
        >>> trainer.train()
        >>> trainer.save_model()
    """

    config_class: type[DistilConfig] = DistilConfig
    """What `args` is made of where it is not given."""
    processing_class: Any
    """The student's tokenizer, with the run's template in it."""

    def __init__(
        self,
        model: Model,
        teacher_model: Model | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        objective: Any = None,
        responses: Any = None,
        teacher_processing_class: Any = None,
        **foreign: Any,
    ) -> None:
        """Check everything, tokenise the rows, wire the step; nothing is trained yet.

        Args:
            model: the student, or its name; it is trained in place.
            teacher_model: the teacher, or its name; none for supervised fine-tuning.
            args: how it is trained, and the method by name or as GKD's numbers.
            train_dataset: a `datasets.Dataset` or a list of rows in any format of docs/data.md.
            eval_dataset: rows with responses for `evaluate`, or several by name.
            processing_class: the student's tokenizer; default: that of the model's name.
            callbacks: they see finished steps.
            optimizers: an optimiser and its scheduler, in place of those of `args`.
            peft_config: adapters to train instead of the weights.
            objective: what is compared: a name, a dictionary as in YAML, or `objectives.build(...)`.
            responses: whose text is trained on, likewise.
            teacher_processing_class: the teacher's tokenizer or its name, where it is another one.
            **foreign: arguments of other trainers, which are refused with a word on what to do.

        Raises:
            StillhouseError: what is given does not fit together; with everything that is wrong.
        """
        args = self._arguments(args, foreign)
        given = Given(
            model=model,
            teacher_model=args.teacher_model_name_or_path if teacher_model is None else teacher_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            teacher_processing_class=teacher_processing_class,
            method={"objective": objective, "responses": responses},
            peft_config=peft_config,
        )
        self.parts = load_parts(given, args)
        self.step = make_step(self.parts, RunFolder(args.folder), Ranks.of(args))
        super().__init__(
            step=self.step,
            model=self.parts.student,
            args=args,
            train_dataset=list(self.parts.data.train),
            eval_dataset=self._evaluated(eval_dataset),
            processing_class=self.parts.tokenizer,
            callbacks=[StepStateSaver(self.step, args.folder), *(callbacks or [])],
            optimizers=optimizers,
        )

    def _arguments(self, args: TrainingArguments | None, foreign: Mapping[str, Any]) -> DistilConfig:
        """The arguments, once those of other trainers are refused."""
        refuse_foreign(foreign, OF_TRAINERS, [], type(self).__name__)
        if args is None:
            return self.config_class()
        if isinstance(args, DistilConfig):
            return args
        problem = "must be a DistilConfig, or a GKDConfig or DistillationConfig of stillhouse.trl"
        raise ConfigError(Fault("args", problem, got=f"{type(args).__module__}.{type(args).__name__}"))

    def _evaluated(self, dataset: Any) -> Any:
        """The prompts of an evaluation set, or of several by name."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {name: list(eval_prompts(self.parts, rows)) for name, rows in dataset.items()}
        return list(eval_prompts(self.parts, dataset))

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a folder, or True for the newest whole one below `output_dir`.
            **options: passed on.

        Raises:
            TrainingError: a loss is not finite, or the checkpoint cannot be used.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self.load_step(checkpoint)
        elif "dev_loss" in self.parts.config.requirements.measured:
            self.evaluate()  # schedules that follow the loss compare with that of the start
        try:
            return super().train(None if checkpoint is None else str(checkpoint), **options)
        finally:
            self.driver.release()

    def _checkpoint(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is not True:
            return Path(asked)
        found = checkpoints.newest_whole(Path(self.args.output_dir))
        if found is None:
            raise TrainingError(f"{self.args.output_dir}: there is no whole checkpoint to go on from")
        return found

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The student on held-out responses.

        Args:
            eval_dataset: rows, or the name of one of several sets; default: those of the trainer.
            ignore_keys: has no effect.
            metric_key_prefix: begins the names of the metrics.

        Returns:
            `eval_loss`, -log q of the rows' responses in nats per token, whatever the objective; with a
            teacher of the same tokens also `eval_kl_to_teacher`, `eval_top1_agreement` and more.

        Raises:
            ConfigError: there is nothing to evaluate on.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            assert isinstance(self.eval_dataset, dict)
            rows = self.eval_dataset[rows]
        elif eval_dataset is not None:
            rows = self._evaluated(eval_dataset)
        if rows is None:
            raise ConfigError(Fault("eval_dataset", "there is nothing to evaluate on", got="None"))
        if isinstance(rows, Mapping):
            found: dict[str, float] = {}
            for name, prompts in rows.items():
                found |= self._measure(prompts, f"{metric_key_prefix}_{name}")
        else:
            found = self._measure(rows, metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _measure(self, prompts: Any, prefix: str) -> dict[str, float]:
        began = time.time()
        parts = self.parts
        with self.student.gathered():
            measures = likelihood(
                self.student.model,
                references_of(prompts),
                parts.facts.pad_id,
                teacher=parts.comparable,
                vocab_size=parts.vocab,
                batch_size=self.args.per_device_eval_batch_size,
                world=self.step.world,
            )
        values = {"loss": measures.loss, "calibration_error": measures.calibration_error}
        if measures.fidelity is not None:
            values |= measures.fidelity.as_metrics()
        found = {f"{prefix}_{name}": value for name, value in values.items()}
        found |= speed_metrics(prefix, began, num_samples=len(prompts))
        self.log(found)
        prompts = len(parts.data.train)
        per_epoch, in_all = steps_in_epoch(self.args, prompts), steps_in_all(self.args, prompts)
        self.step.observe("dev_loss", measures.loss, progress_of(self.state, per_epoch, in_all))
        return found

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not here: no logits of whole batches are made.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(
            "predict: no logits of whole batches are made. Use evaluate, or `stillhouse eval`."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's row with what the step has measured: tokens, responses, schedules, seconds."""
        if "learning_rate" in logs:
            logs.update(measured(self.step))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student with its tokenizer, the run's template in it, and every end token in its generation
        config."""
        name_ends(self.parts)
        tokenizer = self.processing_class
        if (
            reader := image_reader(self.model)
        ) is not None:  # its processor is saved with the tokenizer in it
            processor = copy.copy(reader.processor)
            processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
            self.processing_class = processor
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.processing_class = tokenizer
        if self.args.should_save:
            follow_umask(Path(output_dir or self.args.output_dir))
