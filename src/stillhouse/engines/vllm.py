"""Generation with vLLM in the training process, for GPUs.

Written against the offline API of vLLM 0.33; not yet run on a GPU by us.
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
    CompletionCollector,
    Engine,
    EngineConfig,
    ProgressCallback,
    Sampling,
    TokenizerInfo,
)
from stillhouse.engines.server import from_ids, request_seed, unsupported
from stillhouse.engines.transformers import check_prompts
from stillhouse.errors import ConfigError, EnvironmentFault
from stillhouse.remote import CompletionChoice

OPTION_NAMES = {
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
}
"""The sampling settings beyond temperature, top_p and max_tokens that vLLM supports."""


@REGISTRY.register
class VllmConfig(EngineConfig):
    """vLLM in the training process, on the same GPU or on others. Linux with CUDA; needs the extra [vllm].

    vLLM loads the weights from a saved copy, and reloads them (`reload_weights`) before generating whenever
    training has changed them. That is cheap for a round of thousands of responses and expensive for a few at
    each step, for which kind: transformers is better.

    Example: `engine: {kind: vllm, gpu_memory_utilization: 0.4, sampling: {temperature: 0.8, top_p: 0.95}}`
    """

    kind: Literal["vllm"] = "vllm"
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Fraction of a GPU's memory for vLLM; the rest is left to training."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs that the model is sharded over."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens of prompt and response together; default: the model's context."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype in which vLLM runs the model; "auto" is that of the weights, so float32 for a student trained
    in float32."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of `vllm.LLM`, such as {enforce_eager: true}."""

    def build(self, model: Any, tokenizer_info: TokenizerInfo) -> Engine:
        """The engine over a model in this process; vLLM starts at the first call of `generate`.

        Raises:
            EnvironmentFault: vLLM is not installed, or there is no GPU.
        """
        self.check_installed()
        return VllmEngine(model, tokenizer_info, self)

    def check_installed(self) -> None:
        """vLLM and a GPU.

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

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The keyword arguments of `vllm.LLM` for a model saved in `folder`."""
        arguments: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "dtype": self.dtype,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            "generation_config": "vllm",  # not the model's own sampling defaults
        }
        if self.max_model_len is not None:
            arguments["max_model_len"] = self.max_model_len
        return {**arguments, **self.options}


class VllmEngine:
    """Generates with vLLM, which it reloads when the model's weights have changed.

    Example:
        >>> engine = VllmConfig().build(model, TokenizerInfo.from_tokenizer(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(self, model: Any, tokenizer_info: TokenizerInfo, config: VllmConfig) -> None:
        self.model = model
        self.tokenizer_info = tokenizer_info
        self.config = config
        self._llm: Any = None
        self._version: tuple[Any, ...] = ()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        Raises:
            ConfigError: vLLM does not support a sampling setting.
        """
        from vllm import SamplingParams, TokensPrompt

        from stillhouse.models.hidden import unwrap

        check_prompts(prompts, sampling, unwrap(self.model).config)
        if not prompts:
            return []
        head_size = unwrap(self.model).config.get_text_config(decoder=True).vocab_size
        arguments = sampling_arguments(sampling, self.tokenizer_info, head_size)
        seeds = [request_seed(seed, sample_id) for sample_id in sample_ids or range(len(prompts))]
        llm = self._up_to_date()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(seed=one, **arguments) for one in seeds],
            use_tqdm=False,
        )
        completions = CompletionCollector(len(prompts), progress)
        for index, output in enumerate(outputs):
            completions(index, to_completion(output, sampling, self.tokenizer_info))
        return completions.in_order()

    def _up_to_date(self) -> Any:
        """vLLM with the model's current weights."""
        version = weights_version(self.model)
        if self._llm is not None and version == self._version:
            return self._llm
        with saved_model(self.model) as folder:
            if self._llm is None:
                from vllm import LLM

                self._llm = LLM(**self.config.arguments(folder))
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                self._llm.reset_prefix_cache()  # it has keys and values of the old weights
        self._version = version
        return self._llm


def weights_version(model: Any) -> tuple[Any, ...]:
    """Changes whenever a parameter was written in place, as by an optimiser; torch counts such writes."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())


@contextlib.contextmanager
def saved_model(model: Any) -> Iterator[Path]:
    """A temporary folder with the saved model, adapters merged; deleted on exit."""
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


def sampling_arguments(sampling: Sampling, tokenizer_info: TokenizerInfo, head_size: int) -> dict[str, Any]:
    """The sampling settings as keyword arguments of `vllm.SamplingParams`, without the seed.

    Args:
        sampling: how tokens are sampled.
        tokenizer_info: its stop tokens and vocab size.
        head_size: rows of the model's head; those beyond the vocab size are padding and banned.

    Raises:
        ConfigError: vLLM does not support a sampling setting.
    """
    if faults := unsupported(sampling, OPTION_NAMES, "vllm"):
        raise ConfigError(*faults)
    vocab_size = tokenizer_info.vocab_size
    padding = range(head_size if vocab_size is None else vocab_size, head_size)
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **{option: getattr(sampling, name) for name, option in OPTION_NAMES.items()},
        "stop_token_ids": list(tokenizer_info.eos_ids),
        "logprobs": 0 if sampling.logprobs else None,  # 0: of the sampled token alone
        "detokenize": False,
        "logit_bias": dict.fromkeys(padding, -100.0) or None,
    }


def to_completion(output: Any, sampling: Sampling, tokenizer_info: TokenizerInfo) -> Completion:
    """From a `vllm.RequestOutput` with one sample.

    Raises:
        EngineError: vLLM stopped it early.
    """
    (sample,) = output.outputs
    ids = tuple(int(token) for token in sample.token_ids)
    logprobs = None
    if sampling.logprobs and sample.logprobs is not None:
        logprobs = tuple(
            float(candidates[token].logprob) for token, candidates in zip(ids, sample.logprobs, strict=True)
        )
    return from_ids(CompletionChoice("", str(sample.finish_reason), ids, logprobs), sampling, tokenizer_info)


def require_vllm() -> None:
    """Check that vLLM is installed.

    Raises:
        EnvironmentFault: it is not.
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentFault(
            "engine: kind vllm needs the package vllm, for Linux with CUDA. Install it with: pip install "
            "'stillhouse[vllm]'"
        )
