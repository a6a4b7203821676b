"""CUDA graphs of decoding steps: captured at the first step of a shape, replayed at every other.

All that runs on a GPU only is in `CudaGraphs`; the steps themselves are plain functions over buffers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger("stillhouse")


class Replay(Protocol):
    """Runs steps that do the same to the same buffers whenever their key is the same."""

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step once."""
        ...

    def forget(self) -> None:
        """Buffers or weights have moved: what is known of earlier steps no longer holds."""
        ...


class EagerSteps:
    """Runs each step as it is, on any device."""

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step once."""
        step()

    def forget(self) -> None:
        """Nothing is kept."""


class CudaGraphs:
    """Replays steps as CUDA graphs, which share one memory pool: no two of them run at once.

    A step must not read anything from the device. One that does is run as it is, and a line says so.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.refused = False

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step once: the first time of a key as it is, then as a graph."""
        graph = self.graphs.get(key)
        if graph is not None:
            graph.replay()
        elif self.refused:
            step()
        else:
            self._first(key, step)

    def _first(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step on a side stream, where libraries make their workspaces, and capture it for later."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that prefetch batches may call CUDA meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                step()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused = True
            cause = str(error.__context__ or error).strip().splitlines()[0]
            logger.warning("engine: decoding steps run without CUDA graphs, as capturing failed: %s", cause)
        else:
            self.graphs[key] = graph

    def forget(self) -> None:
        """Drop all graphs."""
        self.graphs.clear()


class CastWeights:
    """Lasting copies of the weights that autocast casts at each call, so that a graph has none of the casts.

    Autocast keeps such copies itself, but only until it is left, and makes new ones for the next text.
    Embeddings are not cast, also where they share their weight with the head.

    Example:
        >>> weights = CastWeights(model)
        >>> with torch.autocast("cuda", torch.bfloat16), weights.recorded():
        ...     model(ids)
        >>> weights.refresh()
        >>> with weights.in_place():
        ...     model(ids)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copies: dict[int, tuple[Tensor, nn.Parameter]] = {}
        """By the address of a weight: the weight and its copy."""

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Note which weights are cast within."""
        weights = {weight.data_ptr(): weight for weight in self.model.parameters()}
        torch.clear_autocast_cache()  # what it holds would not be cast again
        with _CastsOf(weights) as seen:
            yield
        for address, dtype in seen.dtypes.items():
            copy = weights[address].detach().to(dtype)
            self.copies[address] = (weights[address], nn.Parameter(copy, requires_grad=False))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date, in place."""
        if self.copies:
            weights, copies = zip(*self.copies.values(), strict=True)
            torch._foreach_copy_(list(copies), list(weights))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the copies."""
        replaced = [
            (module, name, weight)
            for module in self.model.modules()
            if not isinstance(module, nn.Embedding)
            for name, weight in module._parameters.items()
            if weight is not None and weight.data_ptr() in self.copies
        ]
        for module, name, weight in replaced:
            module._parameters[name] = self.copies[weight.data_ptr()][1]
        try:
            yield
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight


class _CastsOf(TorchDispatchMode):
    """Notes to which dtype each of some weights is cast."""

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.dtypes: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            weight = self.weights.get(args[0].data_ptr())
            if weight is not None and weight.shape == result.shape:
                self.dtypes[weight.data_ptr()] = result.dtype
        return result


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where weights and buffers lie: a graph reads them there, whatever training has written."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
