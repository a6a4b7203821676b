"""The size of models from their configurations alone: parameters, widths, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.errors import ModelError
from stillhouse.models.adapters import add_lora
from stillhouse.models.config import StudentConfig, TeacherModel
from stillhouse.models.from_config import config_from_options
from stillhouse.models.hidden import unwrap
from stillhouse.models.load import parameter_counts
from stillhouse.models.parts import freeze_tower
from stillhouse.models.paths import model_files
from stillhouse.models.pruning.plan import pruned_without_weights
from stillhouse.models.quantise import bits_per_weight, quantisable_layers
from stillhouse.models.readers import auto_class, model_reader
from stillhouse.models.vision import ImageReader
from stillhouse.runs.checks import context_length
from stillhouse.runs.towers import TowerSize, tower_size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model's configuration says about its size.

    Example: `ModelSize(134_515_008, layers=30, hidden_size=576, vocab=49_152, dtype_bytes=2, context=8192)`
    """

    parameters: int
    layers: int
    hidden_size: int
    vocab: int
    dtype_bytes: int
    context: int | None
    """The most tokens that it takes; None if its configuration does not say."""
    key_value_size: int | None = None
    """Numbers in the keys of one token and layer; None: as many as `hidden_size`."""
    trainable: int | None = None
    """How many parameters are trained, those of adapters included; None: all."""
    adapter: int = 0
    """Parameters of LoRA adapters, which `parameters` leaves out."""
    quantised: int = 0
    """How many parameters are quantised, or rounded in the forward pass (QAT)."""
    quantised_bits: float | None = None
    """What a quantised parameter takes; None where a rounded copy is made in each pass."""

    tower: TowerSize | None = None
    """Of a vision-language model whose rows have images."""
    sharded: bool = False
    """Whether the processes of a run share its weights; of a teacher."""

    @property
    def key_value_bytes(self) -> int:
        """Of the keys and values of one token."""
        return self.layers * 2 * (self.key_value_size or self.hidden_size) * self.dtype_bytes

    @property
    def bytes(self) -> int:
        """Of the weights."""
        whole = (self.parameters + self.adapter) * self.dtype_bytes
        if self.quantised_bits is None:
            return whole
        return whole - int(self.quantised * (self.dtype_bytes - self.quantised_bits / 8))


def model_size(model: Any, prompts: Sequence[Prompt] = ()) -> ModelSize:
    """The size of a model from its configuration alone.

    Args:
        model: where it is.
        prompts: of the training, which may have images.

    Raises:
        ModelError: there is no causal language model.
    """
    empty = without_weights(model)
    tower = tower_size(empty.requires_grad_(False), model_reader(model) if prompts else None, prompts)
    return replace(_size_of(empty, model.dtype), tower=tower)


def student_size(
    student: StudentConfig,
    teacher: TeacherModel | None,
    vocab: int,
    reader: ImageReader | None = None,
    prompts: Sequence[Prompt] = (),
) -> ModelSize:
    """The size of the student, however it is initialised, with its adapters.

    Args:
        student: how it is initialised.
        teacher: what it may start from.
        vocab: of its tokenizer.
        reader: what reads images for it.
        prompts: of the training, which may have images.
    """
    empty, dtype = empty_student(student, teacher, vocab)
    freeze_tower(empty, student)
    counts = parameter_counts(empty)
    size = replace(_size_of(empty, dtype), tower=tower_size(empty, reader, prompts))
    if counts["trainable"] < counts["parameters"]:
        size = replace(size, trainable=counts["trainable"])
    if (quantise := student.quantise) is not None:
        layers = quantisable_layers(empty, quantise, "student.quantise").values()
        quantised = sum(layer.weight.numel() for layer in layers)
        bits = None if quantise.qat else bits_per_weight(quantise)
        size = replace(size, quantised=quantised, quantised_bits=bits)
    if student.lora is None:
        return size
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        empty = add_lora(empty, student.lora)
        counts = parameter_counts(empty)
    tower = size.tower and tower_size(unwrap(empty), reader, prompts)
    return replace(size, trainable=counts["trainable"], adapter=counts["adapter"], tower=tower)


def empty_student(student: StudentConfig, teacher: TeacherModel | None, vocab: int) -> tuple[Any, str]:
    """The student with shapes and without weights, and the dtype that it is trained in."""
    if student.path is not None:
        return without_weights(student), student.dtype
    if student.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        dtype = teacher.dtype if student.dtype == "auto" else student.dtype
        return pruned_without_weights(student.from_teacher, without_weights(teacher), vocab), dtype
    return _empty(config_from_options(student.from_config or {}, vocab)), student.dtype


def without_weights(model: Any) -> Any:
    from transformers import AutoConfig

    options = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    folder = model_files(model.path).model
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **options)
        return _empty(found, trust_remote_code=model.trust_remote_code)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model.path}: no causal language model could be read from there. ({error})"
        ) from error


def _empty(config: Any, **options: Any) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, **options)
    model.tie_weights()  # init_empty_weights has untied them
    return model


def _size_of(model: Any, dtype: str) -> ModelSize:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else text.hidden_size)
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab=text.vocab_size,
        dtype_bytes=BYTES.get(stored if dtype == "auto" else dtype, 4),
        context=context_length(config),
        key_value_size=width * (getattr(text, "num_key_value_heads", None) or heads or 1),
    )
