"""Loading image processors of vision-language models, with or without torchvision."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.models.paths import foreign_files

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_processor(
    folder: str, config_class: type, tokenizer: Any = None, trust_remote_code: bool = False
) -> Any:
    """The processor in a folder: torchvision's where that is installed, else the one on PIL.

    Args:
        folder: local folder or hub name.
        config_class: of the configs of its model.
        tokenizer: of the model that it reads for, in place of the one in the folder; None: that one.
        trust_remote_code: run code that comes with it.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    kind: Any = PROCESSOR_MAPPING.get(config_class, None)
    if kind is None:
        kind, tokenizer = AutoProcessor, None  # code of its own, which is in its folder
    elif "video_processor" in kind.get_attributes() and not is_torchvision_available():
        kind = _of_images_alone(kind)
    with _quiet(), foreign_files(f"{folder}: no image processor could be loaded from there"):
        if tokenizer is None:
            processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            with TemporaryDirectory() as both:
                copy_processor(folder, Path(both))
                tokenizer.save_pretrained(both)
                processor = kind.from_pretrained(both)
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{folder}: has no image processor (preprocessor_config.json or processor_config.json), without "
            "which its model cannot read images. Copy these files from where the model came from, or name a "
            "folder that has them: processor."
        )
    return processor


def copy_processor(folder: str, target: Path) -> None:
    """Copy the files of a processor as they are, with what they say of videos, which may not load here.

    Args:
        folder: local folder or hub name; files that it has not are passed over.
        target: a folder.
    """
    for name in PROCESSOR_FILES:
        found: str | Path | None = Path(folder) / name
        if not Path(folder).is_dir():
            with suppress(OSError):
                from transformers.utils import cached_file

                found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
        if found is not None and Path(found).is_file():
            shutil.copyfile(found, target / name)


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
