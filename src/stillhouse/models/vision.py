"""How a vision-language model reads images: through its own processor, into its own number of tokens.

A prompt holds the image tokens of the model that reads it already; what the model gets besides the token ids
is made here from references to images, for each batch anew.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from stillhouse.core.images import ImageRef
from stillhouse.errors import ModelError
from stillhouse.models.processors import load_processor

if TYPE_CHECKING:
    from PIL.Image import Image

CACHED_BYTES = 256 * 2**20
"""Of processed images that a reader keeps."""
MARKS = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
"""Fields of configs with the tokens that Qwen-VL's family writes before and after each image."""
VIDEO_TOKEN = "<|video_pad|>"
"""Of the same family."""
_OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""What a processor returns about the text, which a batch has itself."""
_ATTRIBUTE = "stillhouse_image_reader"


def reads_images(config: Any) -> bool:
    """Whether a transformers config is that of a vision-language model."""
    if getattr(config, "vision_config", None) is None:
        return False
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


class ImageReader:
    """Images as one model takes them: as tokens in its prompt, as tensors in its forward pass.

    The processor is loaded when it is first needed, so that a run without images never loads it.

    Example:
        >>> reader = image_reader(model)
        >>> text = f"{reader.image_text}What is it?".replace(reader.image_token, *reader.expand([image]))
        >>> reader.tensors([image])["pixel_values"].shape
    """

    def __init__(
        self, folder: str, config: Any, tokenizer: Callable[[], Any], trust_remote_code: bool = False
    ) -> None:
        """Of the processor in a folder.

        Args:
            folder: local folder or hub name with the processor's files.
            config: the transformers config of the model that reads.
            tokenizer: loads the model's tokenizer, which need not be that of the folder.
            trust_remote_code: run code that comes with the processor.
        """
        self.folder = folder
        self.config = config
        self._tokenizer = tokenizer
        self._trust_remote_code = trust_remote_code
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._kept_bytes = 0
        self._expansions: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """Itself: copies of a model read through one processor."""
        return self

    @cached_property
    def processor(self) -> Any:
        """The processor of transformers: torchvision's where that is installed, else the one on PIL.

        Raises:
            ModelError: there is none in the folder.
        """
        return load_processor(self.folder, type(self.config), self._tokenizer(), self._trust_remote_code)

    @cached_property
    def image_token(self) -> str:
        """What stands in a text for an image until it is expanded."""
        return str(getattr(self.processor, "boi_token", None) or self.processor.image_token)

    @property
    def image_id(self) -> int:
        """The id of the tokens in whose place the model puts what it sees."""
        return int(self.config.image_token_id)

    @cached_property
    def image_text(self) -> str:
        """An image in a prompt without a chat template: its token, with its family's marks around it."""
        if not all(hasattr(self.config, name) for name in MARKS):
            return self.image_token
        start, end = MARKS.values()
        return f"{start}{self.image_token}{end}"

    def expand(self, images: Sequence[ImageRef]) -> list[str]:
        """For each image the text in place of `image_token`: as many image tokens as the model reads for it,
        with the marks of tiles that its family writes between them.

        Args:
            images: of one prompt; only their sizes are looked at.

        Raises:
            ValueError: the processor cannot read an image of this size.
        """
        return [self._expanded(image)[0] for image in images]

    def collapse(self, token_ids: Sequence[int], images: Sequence[ImageRef]) -> list[int]:
        """The prompt with one `image_token` for each image, in place of all that `expand` wrote for it.

        Args:
            token_ids: of a prompt.
            images: of the prompt, in their order.

        Raises:
            ModelError: the prompt has other tokens than its images take.
        """
        found, rest = [], list(token_ids)
        one = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        for image in images:
            expanded = list(self._expanded(image)[1])
            size = len(expanded)
            place = next((at for at in range(len(rest)) if rest[at : at + size] == expanded), None)
            if place is None:
                raise ModelError(f"{self.folder}: a prompt has not the tokens that {image.location} takes.")
            found += [*rest[:place], one]
            rest = rest[place + size :]
        return found + rest

    def tensors(self, images: Sequence[ImageRef]) -> dict[str, Tensor]:
        """What the model takes of images in their order, on the host: pixel_values and what its family adds.

        Args:
            images: at least one.
        """
        parts = [self._processed(image) for image in images]
        # Idefics2 and 3 and SmolVLM take [texts, images of a text, ...]: all of them as those of one text.
        nested = parts[0]["pixel_values"].ndim == 5 and "pixel_attention_mask" in parts[0]
        return {name: _joined([part[name] for part in parts], int(nested)) for name in parts[0]}

    def num_tokens(self, image: ImageRef) -> int:
        """How many of the tokens of an image the model puts what it sees in place of."""
        return self._expanded(image)[1].count(self.image_id)

    def _expanded(self, image: ImageRef) -> tuple[str, tuple[int, ...]]:
        """The text and the token ids of an image of this size."""
        size = image.width, image.height
        if size not in self._expansions:
            from PIL import Image

            words = self.processor.tokenizer
            ids = self._process(Image.new("RGB", size))["input_ids"][0].tolist()
            text = words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if words(text, add_special_tokens=False).input_ids != ids:
                raise ModelError(
                    f"{self.folder}: its tokenizer does not read what its processor writes for an image of "
                    f"{size[0]} x {size[1]} pixels. Are the two of one model?"
                )
            self._expansions[size] = text, tuple(ids)
        return self._expansions[size]

    def _processed(self, image: ImageRef) -> dict[str, Tensor]:
        """The tensors of one image, kept for when it comes again; the longest unused go first."""
        if image.digest in self._kept:
            self._kept.move_to_end(image.digest)
            return self._kept[image.digest]
        made = {name: value for name, value in self._process(image.open()).items() if name not in _OF_TEXT}
        self._kept[image.digest] = made
        self._kept_bytes += _num_bytes(made)
        while self._kept_bytes > CACHED_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return made

    def _process(self, image: Image) -> Mapping[str, Tensor]:
        options = {"return_tensors": "pt", "add_special_tokens": False}
        found: Mapping[str, Tensor] = self.processor(text=[self.image_token], images=[image], **options)
        return found


def attach_reader(model: nn.Module, reader: ImageReader | None) -> None:
    """Let a transformers model, and copies of it, read images through a reader."""
    if reader is not None:
        inner: Any = model
        reader.config = inner.config
        setattr(model, _ATTRIBUTE, reader)


def reader_of(inner: Any) -> ImageReader | None:
    """The reader of a transformers model without wrappers; None: it reads text alone."""
    found = vars(inner).get(_ATTRIBUTE)
    assert found is None or isinstance(found, ImageReader)
    return found


def name_image_tokens(config: Any, reader: ImageReader, given: Mapping[str, Any]) -> None:
    """Put the ids of a tokenizer's image tokens into a new config, which has those of another one.

    Args:
        config: of a vision-language model.
        reader: what will read images for it.
        given: the fields that a user has set, which stay.
    """
    if not given.keys() & {"image_token_id", "image_token_index"}:
        config.image_token_id = int(reader.processor.image_token_id)
    ids = reader.processor.tokenizer.get_vocab()
    for name, token in (MARKS | {"video_token_id": VIDEO_TOKEN}).items():
        if hasattr(config, name) and name not in given and token in ids:
            setattr(config, name, ids[token])


def image_arguments(
    inner: Any, token_ids: Sequence[Sequence[int]], images: Sequence[Sequence[ImageRef]], width: int
) -> dict[str, Tensor]:
    """What a vision-language model is called with besides the token ids, on the host.

    Multimodal rotary positions (M-RoPE: one for time, row and column of an image patch) are found here, where
    the token ids are known, and not by the model on its device.

    Args:
        inner: a transformers model without wrappers.
        token_ids: of B sequences that are padded on the right.
        images: those of each, in their order.
        width: T, to which the sequences are padded.

    Raises:
        ModelError: the model reads no images, or a sequence has other tokens than its images take.
    """
    reader = reader_of(inner)
    if reader is None:
        raise ModelError(
            f"{type(inner).__name__} reads no images, and the rows have some. Take a vision-language model, "
            "such as of LLaVA's, SmolVLM's or Qwen-VL's family, or rows without images."
        )
    for ids, shown in zip(token_ids, images, strict=True):
        _check_places(reader, ids, shown)
    found = reader.tensors([image for shown in images for image in shown])
    padded = torch.zeros(len(token_ids), width, dtype=torch.int64)
    kinds = torch.zeros_like(padded)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        kinds[row, : len(ids)] = (padded[row, : len(ids)] == reader.image_id).to(torch.int64)
    if hasattr(inner.base_model, "get_rope_index"):
        grids = {name: grid for name, grid in found.items() if name.endswith("grid_thw")}
        found["position_ids"] = inner.base_model.get_rope_index(padded, mm_token_type_ids=kinds, **grids)[0]
    else:
        takes = inspect.signature(inner.forward).parameters
        found |= {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    return found


def check_no_images(reader: ImageReader, token_ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> None:
    """Refuse prompts with image tokens that come without their images, which would be read as mere tokens.

    Args:
        reader: of the model.
        token_ids: prompts and responses.
        prompts: how many tokens of each are its prompt.
    """
    for ids, length in zip(token_ids, prompts, strict=True):
        if reader.image_id in ids[:length]:
            raise ModelError(
                f"{reader.folder}: a prompt has image tokens ({reader.image_token}) and came without image."
            )


def _check_places(reader: ImageReader, token_ids: Sequence[int], images: Sequence[ImageRef]) -> None:
    have = sum(one == reader.image_id for one in token_ids)
    need = sum(map(reader.num_tokens, images))
    if have != need:
        raise ModelError(
            f"{reader.folder}: a sequence has {have} image tokens, and its {len(images)} images take {need} "
            "of this model. The prompt was written for another processor, or was cut."
        )


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors.values())


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One after the other along `dim`; with zeros behind where another is larger in a later dimension."""
    largest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [most - size for most, size in zip(largest, part.shape, strict=True)]
        missing[: dim + 1] = [0] * (dim + 1)
        behind = [count for size in reversed(missing) for count in (0, size)]
        padded.append(nn.functional.pad(part, behind) if any(behind) else part)
    return torch.cat(padded, dim)
