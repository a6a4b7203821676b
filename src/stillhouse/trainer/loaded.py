"""Models, tokenizers and rows that a program holds, as the parts of a run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin, set_seed

from stillhouse.config import StrictConfig
from stillhouse.core.images import with_expander
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt
from stillhouse.data import load_data
from stillhouse.data.datasets.in_memory import InMemory
from stillhouse.data.load import load_prompts, set_warnings
from stillhouse.data.prompt_builder import RESPONSES
from stillhouse.data.templates import with_template
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.models import control_ends, unwrap
from stillhouse.models.hidden import check_head
from stillhouse.models.readers import auto_class
from stillhouse.models.tokenizers import with_padding
from stillhouse.models.vision import ImageReader, attach_reader, reads_images
from stillhouse.runs.build import Parts, pack_where_possible, with_resolved_template
from stillhouse.runs.checks import check_context_lengths, context_length
from stillhouse.runs.config import RunConfig
from stillhouse.runs.resolve import resolve
from stillhouse.runs.tokenizers import Tokenizers, Translation, compared, format_notes
from stillhouse.trainer.config import DistilConfig

logger = logging.getLogger("stillhouse")

Model = str | nn.Module

IN_A_TRAINER = (
    "(In a trainer, teacher is the argument teacher_model; data.train and data.valid are train_dataset and "
    "eval_dataset, which eval_strategy has measured; what else is in data, engine and train are arguments of "
    "DistilConfig.)"
)
"""How the paths of a configuration are to be read."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user gives a `DistilTrainer` besides its arguments.

    Example: `Given(model=student, teacher_model=teacher, train_dataset=rows, processing_class=tokenizer)`
    """

    model: Model
    teacher_model: Model | None
    train_dataset: Any
    eval_dataset: Any = None
    processing_class: Any = None
    teacher_processing_class: Any = None
    method: Mapping[str, Any] = field(default_factory=dict)
    """`objective` and `responses`, where they are given."""
    peft_config: Any = None


def run_config(given: Given, args: DistilConfig) -> RunConfig:
    """The configuration of the same run, checked as that of a YAML file is.

    Raises:
        ConfigError: the method does not fit what there is; with everything that is wrong, at once.
    """
    method = args.method
    own = {name: part for name, part in given.method.items() if part is not None}
    if own and "objective" in method:
        name = next(iter(own))
        raise ConfigError(
            Fault(
                name, "lmbda and beta are a method already", got=str(own[name])[:80], hint="Give one of them."
            )
        )
    if not method and "objective" not in own:
        method = {"recipe": "kd"}
    limit = args.max_length
    engine = {**args.engine, "sampling": {**args.engine.get("sampling", {}), **args.sampling()}}
    template: Any = args.template
    if args.chat_template_kwargs is not None:
        template = {"kind": "chat", "options": dict(args.chat_template_kwargs)}
    run: dict[str, Any] = {
        "student": {"path": "model"},
        **({} if given.teacher_model is None else {"teacher": {"kind": "live", "path": "teacher_model"}}),
        "data": {
            "train": {"kind": "jsonl", "path": "train_dataset"},
            **({"valid": {"kind": "jsonl", "path": "eval_dataset"}} if _validates(given, args) else {}),
            "template": template,
            "max_prompt": limit or args.max_prompt_length,
            "max_response": limit or args.max_completion_length,
            **args.data,
        },
        "engine": engine,
        "train": args.run_section(),
        **method,
        **{name: _as_mapping(part) for name, part in own.items()},
    }
    try:
        resolved = resolve(run)
    except ConfigError as error:
        raise ConfigError(*error.faults, IN_A_TRAINER) from error
    for note in resolved.notes:
        logger.warning(note)
    rows = InMemory(name="train_dataset", records=given.train_dataset)
    config = resolved.config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"train": rows, "valid": None})}  # read by evaluate
    )


def _validates(given: Given, args: DistilConfig) -> bool:
    """Whether the loss on held-out rows is measured while the student is trained."""
    return given.eval_dataset is not None and args.eval_strategy != "no"


def _as_mapping(part: Any) -> Any:
    """An objective or a response policy, with its parts, as a configuration writes it."""
    if isinstance(part, list | tuple):
        return [_as_mapping(one) for one in part]
    if not isinstance(part, StrictConfig):
        return part
    kind = {"kind": part.kind} if hasattr(part, "kind") else {}
    return {**kind, **{name: _as_mapping(getattr(part, name)) for name in part.model_fields_set}}


def load_parts(given: Given, args: DistilConfig) -> Parts:
    """Everything that a step works with.

    Raises:
        ConfigError: arguments do not fit each other or what is given.
        ModelError: a model or tokenizer cannot be had, or the two do not fit.
        DataError: no row can be used.
    """
    if given.train_dataset is None:
        raise ConfigError(Fault("train_dataset", "is needed: rows with prompts", got="None"))
    config = run_config(given, args)
    set_seed(args.seed)
    student = _model("model", given.model, args.model_init_kwargs, args)
    teacher = None
    if given.teacher_model is not None:
        teacher = _model("teacher_model", given.teacher_model, args.teacher_model_init_kwargs, args)
    found = _tokenizers(given, args, student, teacher)
    if teacher is not None:
        found = compared(config, found)
    data = load_data(
        config.data, found.student, needs=config.responses.requirements().data, teacher=found.reads
    )
    if args.max_length is not None:
        data = replace(data, train=within(tuple(data.train), args.max_length))
    config = with_resolved_template(config, data)
    assert data.encoder is not None
    for note in format_notes(found, data).values():
        logger.warning("teacher: %s", note)
    student = _prepared_student(student, given, args)
    context = None if teacher is None else context_length(unwrap(teacher).config)
    parts = Parts(
        config,
        with_template(found.student, config.data.template),
        found.student_facts(data.encoder),
        student.to(args.device),
        {} if teacher is None else {MAIN: teacher.to(args.device)},
        found.ids,
        data,
        Translation.of(found, data, context),
    )
    limited = config.data.model_copy(update={"max_response": args.max_completion_length})
    check_context_lengths(config.model_copy(update={"data": limited}), data.train, (), parts.contexts)
    pack_where_possible(parts)
    return parts


def eval_prompts(parts: Parts, dataset: Any) -> tuple[Prompt, ...]:
    """The rows of an evaluation set; each needs a response.

    Raises:
        DataError: a row has none, or none can be used.
    """
    data = parts.data
    assert data.encoder is not None
    rows = InMemory(name="eval_dataset", records=dataset)
    found = load_prompts("valid", rows, parts.config.data, data.encoder, needs={RESPONSES})
    for warning in set_warnings(found):
        logger.warning(warning)
    return tuple(found.prompts)


def within(prompts: tuple[Prompt, ...], limit: int) -> tuple[Prompt, ...]:
    """Prompts that are with their response at most `limit` tokens long: the oldest tokens of the prompt go.

    Raises:
        DataError: no prompt is left.
    """
    kept, cut = [], 0
    for prompt in prompts:
        over = max(0, len(prompt.token_ids) + len(prompt.response_ids or ()) - limit)
        if over >= len(prompt.token_ids):
            continue
        cut += over > 0
        kept.append(replace(prompt, token_ids=prompt.token_ids[over:]) if over else prompt)
    dropped = len(prompts) - len(kept)
    if not kept:
        raise DataError(f"max_length: every response alone takes {limit} tokens or more. Raise max_length.")
    if cut or dropped:
        logger.warning(
            "max_length: of %d rows %d lose the oldest tokens of their prompt, %d are dropped because their "
            "response alone takes %d tokens or more", len(prompts), cut, dropped, limit,
        )  # fmt: skip
    return tuple(kept)


def _model(argument: str, model: Model, options: Mapping[str, Any] | None, args: DistilConfig) -> nn.Module:
    """A model that is given, or loaded by its name."""
    if not isinstance(model, str):
        if options is not None:
            path = f"{'teacher_' if argument == 'teacher_model' else ''}model_init_kwargs"
            raise ConfigError(Fault(path, f"has no effect: {argument} is loaded already", got=str(options)))
        return model
    try:
        code = {"trust_remote_code": args.trust_remote_code}
        kind = auto_class(AutoConfig.from_pretrained(model, **code))
        loaded: nn.Module = kind.from_pretrained(model, **{**code, **(options or {})})
    except (OSError, ValueError) as error:
        raise ModelError(f"{argument}: {model}: no model could be loaded from there ({error})") from error
    return loaded


def _tokenizer(given: Given, args: DistilConfig) -> Any:
    """The student's tokenizer, with something to pad with."""
    tokenizer = given.processing_class
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if tokenizer is None:
        name = given.model if isinstance(given.model, str) else unwrap(given.model).config.name_or_path
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelError(f"processing_class: none is given, and {name!r} has no tokenizer") from error
    return with_padding(tokenizer, "processing_class")


def _tokenizers(
    given: Given, args: DistilConfig, student: nn.Module, teacher: nn.Module | None
) -> Tokenizers:
    """Both; the teacher's is the student's unless another one is given."""
    ours = _with_reader(_tokenizer(given, args), student, given.processing_class)
    if teacher is None:
        return Tokenizers(ours, student_ends=_ends(student, ours))
    processor = given.teacher_processing_class
    theirs = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if isinstance(theirs, str):
        theirs = AutoTokenizer.from_pretrained(theirs, trust_remote_code=args.trust_remote_code)
    if theirs is None:
        theirs = ours
        ids = unwrap(teacher).get_input_embeddings().weight.shape[0]
        if ids < len(ours):
            raise ModelError(
                f"teacher_model: it has {ids:,} ids and the tokenizer {len(ours):,}. A teacher with another "
                "tokenizer needs that: teacher_processing_class=..., and an objective such as uld or span."
            )
        theirs = copy.copy(ours)  # the two may write images into a prompt in other ways
    theirs = _with_reader(theirs, teacher, processor)
    return Tokenizers(
        ours,
        theirs,
        student_ends=_ends(student, ours),
        teacher_ends=_ends(teacher, theirs),
        context=context_length(unwrap(teacher).config),
    )


def _with_reader(tokenizer: Any, model: nn.Module, processor: Any) -> Any:
    """The tokenizer of a model, told how images are written for it; the model reads them through the one
    processor that is given, or else that in its folder. Nothing changes for a model of text alone."""
    inner = unwrap(model)
    if not reads_images(inner.config):
        return tokenizer
    reader = ImageReader(inner.config.name_or_path, inner.config, lambda: tokenizer)
    if isinstance(processor, ProcessorMixin):
        reader.processor = processor
    attach_reader(inner, reader)
    return with_expander(tokenizer, reader)


def _ends(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    config = getattr(unwrap(model), "generation_config", None)
    return control_ends(getattr(config, "eos_token_id", None), tokenizer)


def _prepared_student(student: nn.Module, given: Given, args: DistilConfig) -> nn.Module:
    """The student with its adapters and without dropout, where that is asked for."""
    if given.peft_config is not None:
        from peft import PeftModel, get_peft_model

        if isinstance(student, PeftModel):
            raise ConfigError(
                Fault("peft_config", "the model has adapters already", hint="Give one of them.")
            )
        student = get_peft_model(student, given.peft_config)
        if args.gradient_checkpointing:
            student.enable_input_require_grads()  # type: ignore[operator]
    if args.disable_dropout:
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    check_head(student)
    return student
