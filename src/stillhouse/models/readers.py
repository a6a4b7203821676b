"""Which models read images, and through what: known by their configs, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.models.config import ModelConfig, StudentConfig
from stillhouse.models.from_config import SPECIAL_TOKENS, config_from_options
from stillhouse.models.paths import model_files, resolve_path
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.models.vision import ImageReader, name_image_tokens, reads_images


def config_of(config: ModelConfig, folder: str) -> Any:
    """The transformers config in a folder, or at a hub name."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def auto_class(config: Any) -> Any:
    """The class of transformers that makes or loads the model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def model_reader(config: ModelConfig, tokenizer: Any = None) -> ImageReader | None:
    """What reads images for a model at a path; None: it reads text alone.

    Reads its config and no weights; what cannot be read is told where the model is loaded.

    Args:
        config: the model.
        tokenizer: its tokenizer; None: loaded once an image comes.
    """
    if config.path is None or config.gguf_file:
        return None
    folder = model_files(config.path).model
    try:
        found = config_of(config, folder)
    except (OSError, ValueError, KeyError):
        return None
    if not reads_images(found):
        return None
    processor = folder if config.processor is None else resolve_path(config.processor)
    load = partial(load_tokenizer, config) if tokenizer is None else lambda: tokenizer
    return ImageReader(processor, found, load, config.trust_remote_code)


def student_reader(config: StudentConfig, tokenizer: Any, teacher: ImageReader | None) -> ImageReader | None:
    """What reads images for the student; None: it reads text alone.

    Args:
        config: the student.
        tokenizer: its tokenizer.
        teacher: what reads images for the teacher, whose processor a student without one of its own has.

    Raises:
        ModelError: a student from random weights is to read images, and has no processor.
    """
    if config.path is not None:
        return model_reader(config, tokenizer)
    if config.from_config is None and teacher is None:
        return None
    built = teacher.config if config.from_config is None else new_config(config.from_config, tokenizer)  # type: ignore[union-attr]
    if not reads_images(built):
        return None
    if config.processor is None and teacher is None:
        raise ModelError(
            "student.processor: a vision-language student from random weights needs the folder of an image "
            "processor, as there is no teacher that reads images."
        )
    folder = teacher.folder if config.processor is None else resolve_path(config.processor)  # type: ignore[union-attr]
    reader = ImageReader(folder, built, lambda: tokenizer, config.trust_remote_code)
    if config.from_config is not None:
        name_image_tokens(built, reader, config.from_config)
    return reader


def new_config(options: Mapping[str, Any], tokenizer: Any) -> Any:
    """The transformers config of `student.from_config`, with the special tokens of its tokenizer.

    Raises:
        ModelError: see `config_from_options`.
    """
    special = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return config_from_options(options, len(tokenizer), **special)
