"""Generation with vLLM in the training process, for GPUs.

Written against the offline API of vLLM 0.33: `LLM`, its sleep mode, `reload_weights`, `multi_modal_data`. Not
yet run on a GPU by us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config import because
from stillhouse.core.images import ImageRef
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
from stillhouse.errors import ConfigError, EngineError, EnvironmentFault
from stillhouse.remote import CompletionChoice

if TYPE_CHECKING:
    from torch import Tensor

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

    Before it generates, vLLM gets the weights of now (`reload_weights`), unless they are those that it has.

    Example: `engine: {kind: vllm, mode: colocate, gpu_memory_utilization: 0.4}`
    """

    kind: Literal["vllm"] = "vllm"
    mode: Literal["saved", "colocate"] = "saved"
    """How vLLM gets the weights. `saved`: through a saved copy, cheap for a round of thousands of responses
    and expensive for a few at each step. `colocate`: in memory, on the GPU that trains; between calls vLLM
    sleeps."""
    sleep: bool = True
    """Between calls give vLLM's memory, of weights and KV cache, to training; with `mode: colocate`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Fraction of a GPU's memory for vLLM; the rest is left to training, and while vLLM sleeps all of it."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs that the model is sharded over."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens of prompt and response together; default: the model's context."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype in which vLLM runs the model; "auto" is that of the weights, so float32 for a student trained
    in float32."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of `vllm.LLM`, such as {enforce_eager: true}."""

    @model_validator(mode="after")
    def _one_gpu_if_colocated(self) -> VllmConfig:
        if self.mode == "colocate" and self.tensor_parallel_size > 1:
            raise ValueError(
                "mode: colocate hands weights over within one process, so tensor_parallel_size must be 1; "
                "with more GPUs use mode: saved"
            )
        return self

    @property
    def gpus(self) -> int:
        return self.tensor_parallel_size * int(self.options.get("pipeline_parallel_size", 1))

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.mode == "colocate" else because("mode: saved keeps vLLM awake", "sleep")

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
        if self.gpus > 1:
            # vLLM's own choice on one machine, but for a process in a placement group of Ray: there it would
            # ask Ray for GPUs that this process holds already, and wait for them.
            arguments["distributed_executor_backend"] = "mp"
        if self.max_model_len is not None:
            arguments["max_model_len"] = self.max_model_len
        if self.mode == "colocate":
            import torch

            arguments["enable_sleep_mode"] = self.sleep
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # One vLLM for each process of the launcher, within the groups that there are.
                arguments["distributed_executor_backend"] = "external_launcher"
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
        self._asleep = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
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
        inputs = self._inputs(prompts, images)
        llm = self._up_to_date()
        try:
            outputs = llm.generate(
                [TokensPrompt(**one) for one in inputs],
                [SamplingParams(seed=one, **arguments) for one in seeds],
                use_tqdm=False,
            )
        finally:
            self._fall_asleep()
        completions = CompletionCollector(len(prompts), progress)
        for index, output in enumerate(outputs):
            completions(index, to_completion(output, sampling, self.tokenizer_info))
        return completions.in_order()

    def _inputs(
        self, prompts: Sequence[Sequence[int]], images: Sequence[tuple[ImageRef, ...]]
    ) -> list[dict[str, Any]]:
        """The fields of a `vllm.TokensPrompt` for each prompt; vLLM writes the tokens of images itself.

        Raises:
            EngineError: the model reads no images.
        """
        if not any(images):
            return [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        from stillhouse.models.hidden import image_reader

        reader = image_reader(self.model)
        if reader is None:
            raise EngineError("the model of engine vllm reads no images, and the prompts have some.")
        return [
            {
                "prompt_token_ids": reader.collapse(prompt, shown),
                "multi_modal_data": {"image": [one.open() for one in shown]},
            }
            if shown
            else {"prompt_token_ids": list(prompt)}
            for prompt, shown in zip(prompts, images, strict=True)
        ]

    def _up_to_date(self) -> Any:
        """vLLM, awake, with the model's current weights."""
        version = weights_version(self.model)
        if self._llm is None:
            self._llm = self._start()
        elif self._asleep:
            import torch

            # Asleep it has no weights; its KV cache comes last, so that both never need room at once.
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
            self._hand_over()
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        elif version != self._version:
            self._hand_over()
        self._version = version
        return self._llm

    def _start(self) -> Any:
        if self.config.mode == "colocate":
            # Its engine then runs in this process, where it can be given weights by reference.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from stillhouse.models.hidden import image_reader

        with saved_model(self.model) as folder:
            arguments = self.config.arguments(folder)
            if image_reader(self.model) is not None:
                arguments["skip_tokenizer_init"] = False  # vLLM's processor of images has a tokenizer
            return LLM(**arguments)

    def _hand_over(self) -> None:
        if self.config.mode == "colocate":
            weights = checkpoint_weights(self.model)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        else:
            with saved_model(self.model) as folder:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()  # it has keys and values of the old weights

    def _fall_asleep(self) -> None:
        if self.config.mode == "colocate" and self.config.sleep:
            self._llm.sleep(level=2)  # nothing is kept: the next call brings other weights
            self._asleep = True


def weights_version(model: Any) -> tuple[Any, ...]:
    """Changes whenever a parameter was written in place, as by an optimiser; torch counts such writes."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """The weights under the names that they have in a checkpoint, adapters merged."""
    from transformers.core_model_loading import revert_weight_conversion

    from stillhouse.models.adapters import merged_weights
    from stillhouse.models.hidden import unwrap

    weights: dict[str, Tensor] = revert_weight_conversion(unwrap(model), dict(merged_weights(model)))
    return weights


@contextlib.contextmanager
def saved_model(model: Any) -> Iterator[Path]:
    """A temporary folder with the saved model, adapters merged; deleted on exit."""
    from stillhouse.models.adapters import merged_weights
    from stillhouse.models.hidden import image_reader, unwrap

    reader = image_reader(model)
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-vllm-"))
    try:
        unwrap(model).save_pretrained(folder, state_dict=dict(merged_weights(model)))
        if reader is not None:
            reader.processor.save_pretrained(folder)
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
