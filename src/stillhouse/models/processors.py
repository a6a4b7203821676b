"""Loading image processors of vision-language models, with or without torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.models.paths import foreign_files


def load_processor(folder: str, config_class: type, trust_remote_code: bool = False) -> Any:
    """The processor in a folder: torchvision's where that is installed, else the one on PIL.

    Args:
        folder: local folder or hub name.
        config_class: of the configs of its model.
        trust_remote_code: run code that comes with it.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    kind = PROCESSOR_MAPPING.get(config_class, None)
    if kind is not None and "video_processor" in kind.get_attributes() and not is_torchvision_available():
        kind = _of_images_alone(kind)
    else:
        kind = AutoProcessor
    with _quiet(), foreign_files(f"{folder}: no image processor could be loaded from there"):
        processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{folder}: has no image processor (preprocessor_config.json or processor_config.json), without "
            "which its model cannot read images. Copy these files from where the model came from, or name a "
            "folder that has them: processor."
        )
    return processor


def _of_images_alone(kind: Any) -> Any:
    """A class of processors without its video processor, for which transformers needs torchvision."""
    from transformers import Idefics3Processor

    if kind.__name__ == "SmolVLMProcessor":  # the same with images, and words for numbers are for videos
        return Idefics3Processor
    attributes = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _kind: attributes)})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warning that a processor on PIL stands in for torchvision's."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
