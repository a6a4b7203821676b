"""A digest of a model's content: its architecture and every weight."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from stillhouse.models.hidden import unwrap

_INCIDENTAL = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype")
"""What a configuration says about how a model was saved or is run, not about what it computes."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A digest of 32 hexadecimal digits that another architecture, data type or weight changes.

    The place that the model was loaded from, its device and the wrappers around it do not change it. It
    reads every weight once, about a second for each gigabyte.
    """
    inner = unwrap(model)
    config = {
        key: value
        for key, value in inner.config.to_dict().items()
        if key not in _INCIDENTAL and not key.startswith("_")
    }
    about = json.dumps([type(inner).__name__, config], sort_keys=True, default=str)
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, tensor in sorted(inner.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
