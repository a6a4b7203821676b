"""Loading students and teachers, and reading hidden states and heads from them."""

from stillhouse.models.config import LoraConfig, Prune, StudentConfig, TeacherModel
from stillhouse.models.device import own_device
from stillhouse.models.fingerprint import fingerprint, fingerprint_of_files
from stillhouse.models.hidden import head_of, hidden_rows, layer_rows, unwrap
from stillhouse.models.load import load_student, load_teacher, load_tokenizer, parameters_of
from stillhouse.models.tokenizers import check_same_tokenizer, difference, tokenizer_digest

__all__ = [
    "LoraConfig",
    "Prune",
    "StudentConfig",
    "TeacherModel",
    "check_same_tokenizer",
    "difference",
    "fingerprint",
    "fingerprint_of_files",
    "head_of",
    "hidden_rows",
    "layer_rows",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "own_device",
    "parameters_of",
    "tokenizer_digest",
    "unwrap",
]
