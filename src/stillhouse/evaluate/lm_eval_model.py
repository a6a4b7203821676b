"""The model in memory as a language model of the lm-eval harness; needs the package lm-eval."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from stillhouse import console
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.data.text_tokens import response_text
from stillhouse.engines.base import Engine, Sampling
from stillhouse.errors import ConfigError, Fault
from stillhouse.evaluate.generation import Share
from stillhouse.evaluate.tasks.base import EvalContext
from stillhouse.models import head_of, hidden_rows

MAX_NEW_TOKENS = 256
"""Length limit where a task sets none; lm-eval's own."""

LikelihoodRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts (unused), context ids, continuation ids."""


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests with the model and engine of an `EvalContext`.

    Tokenisation, windows and truncation are those of lm-eval's own HFLM, and so are the results. Finished
    batches are kept in `journal`. Of several processes each answers every n-th batch, and all get the whole:
    to the harness each is the only one, so that its numbers are those of one process.
    """

    def __init__(self, context: EvalContext, journal: Journal) -> None:
        super().__init__()
        self.tokenizer = context.tokenizer
        self._context = context
        self._journal = journal
        self._context_length = context.context_length or 2048
        self._device = next(context.model.parameters()).device
        self._share = Share.of(context.world, context.model)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the caches of the harness."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text starts with BOS already."""
        options: dict[str, Any] = {}
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[LikelihoodRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding generates it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batches = _batches(order, self._context.batch_size)
        asked = [[requests[index] for index in batch] for batch in batches]
        found = self._answers(
            "likelihoods",
            [content_digest(["likelihood", [request[1:] for request in batch]]) for batch in asked],
            [partial(self._likelihoods, batch) for batch in asked],
        )
        results = dict(zip(order, itertools.chain.from_iterable(found), strict=True))
        return [(value, greedy) for value, greedy in map(results.__getitem__, range(len(requests)))]

    def _answers(
        self, what: str, keys: Sequence[str], compute: Sequence[Callable[[], list[Any]]]
    ) -> list[list[Any]]:
        """What each batch comes to: from the journal of the first process, or computed by one of them."""
        found = self._share.of_first([self._journal.get(key) for key in keys])
        missing = [place for place, piece in enumerate(found) if piece is None]
        with console.progress(f"{self._context.title or 'lm-eval'}, {what}", total=len(found)) as bar:
            bar.advance(len(found) - len(missing))
            for some in _batches(missing, self._context.world.size):
                mine = [compute[some[own]]() for own in self._share.local_indices(len(some))]
                for place, piece in zip(some, self._share.of_all(mine, len(some)), strict=True):
                    found[place] = piece
                    if self._context.world.rank == 0:
                        self._journal.put(keys[place], piece)
                bar.advance(len(some))
        return found

    @torch.no_grad()
    def _likelihoods(self, requests: Sequence[LikelihoodRequest]) -> list[tuple[float, bool]]:
        responses = []
        for _, context, continuation in requests:
            room = self._context_length + 1 - len(continuation)  # the last token is predicted, not read
            prompt = Prompt("", tuple(context[-room:]), "")
            responses.append(Response(prompt, tuple(continuation), "fixed"))
        batch = collate(responses, self._context.tokenizer_info.pad_id).to(self._device)
        hidden = hidden_rows(self._context.model, batch)
        labels = batch.row_labels()
        head = head_of(self._context.model, self._context.vocab_size)
        values: list[tuple[float, bool]] = []
        for rows in torch.arange(len(labels)).split([len(response.token_ids) for response in responses]):
            logits = head.logits(hidden[rows])
            logprobs = logits.log_softmax(-1).gather(1, labels[rows, None])
            values.append((float(logprobs.sum()), bool((logits.argmax(-1) == labels[rows]).all())))
        return values

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability (nats) of whole texts, in windows of the model's context."""
        windows: list[LikelihoodRequest] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Responses, cut at the first stop sequence of the task."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(content_digest(request.args[1]), []).append(index)
        order, keys, compute = list[int](), list[str](), list[Callable[[], list[str]]]()
        stops_of: dict[int, list[str]] = {}
        for indices in groups.values():
            sampling, stops = self._sampling(dict(requests[indices[0]].args[1]))
            stops_of |= dict.fromkeys(indices, stops)
            for batch in _batches(indices, self._context.batch_size):
                contexts = [requests[index].args[0] for index in batch]
                order += batch
                keys.append(content_digest(["responses", contexts, sampling.model_dump(), stops]))
                compute.append(partial(self._responses, contexts, sampling))
        texts = itertools.chain.from_iterable(self._answers("responses", keys, compute))
        responses = dict(zip(order, texts, strict=True))
        return [_cut(responses[index], stops_of[index]) for index in range(len(requests))]

    def _responses(self, contexts: list[str], sampling: Sampling) -> list[str]:
        room = self._context_length - sampling.max_tokens
        ids = [self.tok_encode(context)[-room:] for context in contexts]
        facts = self._context.tokenizer_info.ended_by([self.eot_token_id])
        engine: Engine = self._context.engine.build(self._context.model, facts)
        completions = engine.generate(ids, sampling, self._context.seeds[0])
        return [response_text(self.tokenizer, one.token_ids) for one in completions]

    def _sampling(self, given: dict[str, Any]) -> tuple[Sampling, list[str]]:
        options = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
        until: Any = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        max_tokens, sample = int(options.pop("max_gen_toks")), bool(options.pop("do_sample"))
        temperature = float(options.pop("temperature", 0.0))
        values = {name: options.pop(name) for name in ("top_p", "top_k") if name in options}
        if options or max_tokens >= self._context_length:
            name = next(iter(options), "max_gen_toks")
            raise ConfigError(
                Fault(
                    f"lm-eval generation_kwargs.{name}",
                    "is not supported" if options else "leaves no room for the prompt",
                    got=str(options.get(name, max_tokens)),
                    allowed="until, max_gen_toks, do_sample, temperature, top_p, top_k"
                    if options
                    else f"less than {self._context_length}, the model's context length",
                )
            )
        settings = {"temperature": temperature, **values} if sample else {"temperature": 0.0}
        sampling = Sampling.model_validate({**settings, "max_tokens": max_tokens}, strict=False)
        return sampling, [stop for stop in stops if stop]


def _batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
