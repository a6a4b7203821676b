"""Arguments that scripts for other trainers pass: what they are called here, or why they are not."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from stillhouse.config import nearest
from stillhouse.errors import ConfigError, Fault

Kind = TypeVar("Kind", bound=type)


class Foreign(NamedTuple):
    """An argument of TRL's that there is not here. Example: `Foreign("Use data.", accepted=(None,))`"""

    hint: str
    accepted: tuple[Any, ...] = ()
    """Values that ask for what happens here anyway."""


_VLLM = Foreign("Give engine={'kind': 'vllm', 'mode': 'colocate'} (docs/student-text.md).", (False, None))
_TOKENS = Foreign("Set it on the tokenizer that you pass as processing_class.", (None,))
_PACKING = Foreign("Packing is chosen by itself where it changes no hidden state.", (False, None))

OF_TRL: Mapping[str, Foreign] = {
    "packing": _PACKING,
    "padding_free": _PACKING,
    "packing_strategy": _PACKING,
    "eval_packing": _PACKING,
    "completion_only_loss": Foreign("Only responses are trained on.", (True, None)),
    "assistant_only_loss": Foreign("Give data={'train_on': 'all'}.", (False, None)),
    "dataset_text_field": Foreign(
        "Rows are read by the names of their columns; others: data={'fields': {...}}."
    ),
    "dataset_num_proc": Foreign("Rows are tokenised in one process."),
    "dataset_kwargs": Foreign("Rows are tokenised here whatever they say.", (None,)),
    "shuffle_dataset": Foreign("Prompts are in a new order in each epoch.", (True, None)),
    "pad_to_multiple_of": Foreign("Batches are as long as their longest sequence.", ("auto", None)),
    "eos_token": _TOKENS,
    "pad_token": _TOKENS,
    "chat_template_path": Foreign(
        "Give template={'kind': 'custom', ...} or set it on the tokenizer.", (None,)
    ),
    "loss_type": Foreign("Give the trainer's objective, or recipe."),
    "activation_offloading": Foreign("Use gradient_checkpointing.", (False, None)),
    "generation_kwargs": Foreign("Give temperature, top_p, top_k, min_p or repetition_penalty.", (None,)),
    "cache_implementation": Foreign("Give engine={'kv_cache': 'static'}.", (None,)),
    "ds3_gather_for_generation": Foreign("Weights are gathered for generation.", (True, None)),
    "max_tool_calling_iterations": Foreign("Tools are not called while text is generated.", (None,)),
    "teacher_model_revision": Foreign("Give teacher_model_init_kwargs={'revision': ...}.", (None,)),
    "log_completions": Foreign("Ask trainer.step for its responses, or use `stillhouse run`.", (False, None)),
    "num_completions_to_print": Foreign("No completion is printed.", (None,)),
    "log_unique_prompts": Foreign("No completion is printed.", (False, None)),
    "use_vllm": _VLLM,
}
"""Fields of TRL's GKDConfig, SFTConfig and DistillationConfig."""

OF_TRAINERS: Mapping[str, Foreign] = {
    "data_collator": Foreign(
        "Prompts are collated by the step; give rows with prompt and completion, or messages."
    ),
    "compute_metrics": Foreign("No logits of a whole batch are made; use `stillhouse eval`.", (None,)),
    "preprocess_logits_for_metrics": Foreign("No logits of a whole batch are made.", (None,)),
    "formatting_func": Foreign("Map the dataset before: dataset.map(formatting_func).", (None,)),
    "quantization_config": Foreign("Load the model with it and pass the model.", (None,)),
    "tools": Foreign("Give the rows a column tools.", (None,)),
    "tokenizer": Foreign("It is processing_class.", (None,)),
    "ref_model": Foreign("Give the objective's reference by a configuration, stillhouse.run.", (None,)),
}
"""Arguments of the trainers themselves."""


def refuse_foreign(given: Mapping[str, Any], known: Mapping[str, Foreign], names: list[str], of: str) -> None:
    """Refuse arguments that are not there, each with what to do.

    Args:
        given: the arguments, by name; those in `names` are fine.
        known: arguments of other trainers.
        names: the arguments that there are.
        of: what they are arguments of, for the message.

    Raises:
        ConfigError: names all of them.
    """
    if faults := list(_faults(given, known, names, of)):
        raise ConfigError(*faults)


def _faults(
    given: Mapping[str, Any], known: Mapping[str, Foreign], names: list[str], of: str
) -> Iterator[Fault]:
    for name, value in given.items():
        if name in names:
            continue
        foreign = known.get(name) or (_VLLM if name.startswith("vllm_") else None)
        if foreign is None:
            yield Fault(name, f"is no argument of {of}{nearest(name, names)}", got=repr(value)[:80])
        elif value not in foreign.accepted:
            yield Fault(name, "is not taken here", got=repr(value)[:80], hint=foreign.hint)


def with_foreign_refused(kind: Kind) -> Kind:
    """A dataclass whose `__init__` takes TRL's fields that ask for what happens anyway, and refuses others
    in words."""
    generated: Any = kind.__init__  # type: ignore[misc]

    @functools.wraps(generated)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        refuse_foreign(options, OF_TRL, names, kind.__name__)
        generated(self, *args, **{name: value for name, value in options.items() if name in names})

    checked.__signature__ = inspect.signature(generated)  # type: ignore[attr-defined]
    kind.__init__ = checked  # type: ignore[misc]
    return kind
