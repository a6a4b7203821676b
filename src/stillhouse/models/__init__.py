"""Loading students, teachers and tokenizers, and reading hidden states and heads from them."""

from stillhouse.models.choose_packing import PackingMode, choose_packing
from stillhouse.models.compiling import compile_layers
from stillhouse.models.config import (
    Dtype,
    LoraConfig,
    ModelConfig,
    Prune,
    QuantiseConfig,
    StudentConfig,
    StudentQuantisation,
    TeacherModel,
)
from stillhouse.models.fingerprint import fingerprint, fingerprint_of_files, weights_digest
from stillhouse.models.hidden import (
    copy_processor_of,
    head_of,
    hidden_rows,
    image_reader,
    layer_rows,
    unwrap,
)
from stillhouse.models.load import (
    load_student,
    load_teacher,
    local_device,
    parameter_counts,
)
from stillhouse.models.parts import vision_facts
from stillhouse.models.readers import model_reader, student_reader
from stillhouse.models.reward import load_reward_model, rewards
from stillhouse.models.tokenizers import (
    check_same_tokenizer,
    control_ends,
    generation_ends,
    load_tokenizer,
    shared_ids,
    tokenizer_difference,
    vocab_digest,
)
from stillhouse.models.vision import ImageReader, image_arguments

__all__ = [
    "Dtype",
    "ImageReader",
    "LoraConfig",
    "ModelConfig",
    "PackingMode",
    "Prune",
    "QuantiseConfig",
    "StudentConfig",
    "StudentQuantisation",
    "TeacherModel",
    "check_same_tokenizer",
    "choose_packing",
    "compile_layers",
    "control_ends",
    "copy_processor_of",
    "fingerprint",
    "fingerprint_of_files",
    "generation_ends",
    "head_of",
    "hidden_rows",
    "image_arguments",
    "image_reader",
    "layer_rows",
    "load_reward_model",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "local_device",
    "model_reader",
    "parameter_counts",
    "rewards",
    "shared_ids",
    "student_reader",
    "tokenizer_difference",
    "unwrap",
    "vision_facts",
    "vocab_digest",
    "weights_digest",
]
