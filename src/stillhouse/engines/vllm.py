"""Generation with vLLM beside the training, for GPUs.

Written against the offline interface of vLLM 0.33. We have run it up to where a GPU is needed, not further.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.types import Completion
from stillhouse.engines.base import (
    REGISTRY,
    Engine,
    EngineConfig,
    Finished,
    ProgressCall,
    Sampling,
    TokenizerFacts,
)
from stillhouse.engines.server import from_ids, seed_of, unsupported
from stillhouse.engines.transformers import check_prompts
from stillhouse.errors import ConfigError, EnvironmentFault
from stillhouse.remote import CompletionChoice

NAMES = {
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
}
"""The settings beyond temperature, top_p and max_tokens that vLLM has."""


@REGISTRY.register
class VllmConfig(EngineConfig):
    """vLLM beside the training, on the same GPU or on others. Linux with CUDA; needs the extra [vllm].

    Weights go to vLLM as a saved model: when the engine starts, and again before it writes whenever training
    has changed them (`reload_weights`). That is cheap for a round of thousands of responses and dear for a
    few at each step; there kind: transformers is the better one.

    Example: `engine: {kind: vllm, memory: 0.4, sampling: {temperature: 0.8, top_p: 0.95}}`
    """

    kind: Literal["vllm"] = "vllm"
    memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU's memory for vLLM (gpu_memory_utilization); training has the rest."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """GPUs that one copy of the model is spread over (tensor_parallel_size)."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and response together (max_model_len); default: the model's own context."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format that vLLM computes in; "auto" is that of the weights, so a student trained in float32 is
    written with in float32."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments of `vllm.LLM`, such as {enforce_eager: true}."""

    def build(self, model: Any, facts: TokenizerFacts) -> Engine:
        """The engine over a model in this process; vLLM starts at the first text.

        Raises:
            EnvironmentFault: vLLM is not installed, or there is no GPU.
        """
        import torch

        require_vllm()
        if not torch.cuda.is_available():
            raise EnvironmentFault(
                "engine: kind vllm needs a CUDA GPU, and torch sees none. Use engine: {kind: "
                "transformers}, or engine: {kind: server} with a server elsewhere."
            )
        return VllmEngine(model, facts, self)

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The keyword arguments of `vllm.LLM` for a model saved in `folder`."""
        chosen: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "dtype": self.dtype,
            "gpu_memory_utilization": self.memory,
            "tensor_parallel_size": self.gpus,
            "generation_config": "vllm",  # none of the model's own sampling defaults
        }
        if self.max_length is not None:
            chosen["max_model_len"] = self.max_length
        return {**chosen, **self.options}


class VllmEngine:
    """Hands token ids to vLLM and takes token ids back.

    Example:
        >>> engine = VllmConfig().build(model, TokenizerFacts.of(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(self, model: Any, facts: TokenizerFacts, config: VllmConfig) -> None:
        self.model = model
        self.facts = facts
        self.config = config
        self._llm: Any = None
        self._stamp: tuple[Any, ...] = ()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        Raises:
            ConfigError: vLLM has no such setting.
        """
        from vllm import SamplingParams, TokensPrompt

        from stillhouse.models.hidden import unwrap

        check_prompts(prompts, sampling, unwrap(self.model).config)
        if not prompts:
            return []
        height = unwrap(self.model).config.get_text_config(decoder=True).vocab_size
        arguments = sampling_arguments(sampling, self.facts, height)
        seeds = [seed_of(seed, number) for number in numbers or range(len(prompts))]
        llm = self._synchronised()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(seed=one, **arguments) for one in seeds],
            use_tqdm=False,
        )
        finish = Finished(len(prompts), progress)
        for index, output in enumerate(outputs):
            finish(index, completion_of(output, sampling, self.facts))
        return finish.in_order()

    def _synchronised(self) -> Any:
        """vLLM with the model's weights as they are now."""
        stamp = stamp_of(self.model)
        if self._llm is not None and stamp == self._stamp:
            return self._llm
        with saved(self.model) as folder:
            if self._llm is None:
                from vllm import LLM

                self._llm = LLM(**self.config.arguments(folder))
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                self._llm.reset_prefix_cache()  # it holds keys and values of the old weights
        self._stamp = stamp
        return self._llm


def stamp_of(model: Any) -> tuple[Any, ...]:
    """Changes whenever an optimiser has written to a parameter: torch counts writes in place."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())


@contextlib.contextmanager
def saved(model: Any) -> Iterator[Path]:
    """A folder that holds the model as others load it, adapters merged, for as long as the block lasts."""
    from stillhouse.models.hidden import unwrap

    folder = Path(tempfile.mkdtemp(prefix="stillhouse-vllm-"))
    try:
        whole = unwrap(model)
        if hasattr(whole, "merge_and_unload"):
            import copy

            whole = copy.deepcopy(whole).merge_and_unload()
        whole.save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sampling_arguments(sampling: Sampling, facts: TokenizerFacts, height: int) -> dict[str, Any]:
    """The settings as keyword arguments of `vllm.SamplingParams`, without the seed.

    Args:
        sampling: how tokens are drawn.
        facts: of the tokenizer.
        height: rows of the model's head; those beyond the tokenizer's ids are kept from being drawn.

    Raises:
        ConfigError: vLLM has no such setting.
    """
    if faults := unsupported(sampling, NAMES, "vllm"):
        raise ConfigError(*faults)
    padding = range(height if facts.vocab is None else facts.vocab, height)
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **{theirs: getattr(sampling, ours) for ours, theirs in NAMES.items()},
        "stop_token_ids": list(facts.eos_ids),
        "logprobs": 0 if sampling.logprobs else None,  # 0: of the sampled token alone
        "detokenize": False,
        "logit_bias": dict.fromkeys(padding, -100.0) or None,
    }


def completion_of(output: Any, sampling: Sampling, facts: TokenizerFacts) -> Completion:
    """A `vllm.RequestOutput` with one sample.

    Raises:
        EngineError: vLLM ended it for a reason of its own.
    """
    (sample,) = output.outputs
    ids = tuple(int(token) for token in sample.token_ids)
    logprobs = None
    if sampling.logprobs and sample.logprobs is not None:
        logprobs = tuple(
            float(place[token].logprob) for token, place in zip(ids, sample.logprobs, strict=True)
        )
    return from_ids(CompletionChoice("", str(sample.finish_reason), ids, logprobs), sampling, facts)


def require_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        EnvironmentFault: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentFault(
            "engine: kind vllm needs the package vllm, for Linux with CUDA. Install it with: pip install "
            "'stillhouse[vllm]'"
        )
