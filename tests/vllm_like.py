"""A small HTTP server that answers as vLLM's does, around the embedded demo teacher in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.models import TeacherModel, load_teacher, load_tokenizer
from tests.servers import Answer, Service, serving

TEACHER = "package:stillhouse/demo/teacher"


class DemoTeacher:
    """What the server knows, and how it answers.

    Args:
        path: the model.
        prompt_logprobs: whether it gives log-probabilities of prompts.
        token_ids: whether it takes and returns token ids; without, it is as plain as OpenAI's.
        echo: whether it repeats a prompt with its tokens' log-probabilities, as text, without others.
        most: the largest number of log-probabilities for a position, as vLLM's --max-logprobs.
        context: tokens of prompt and response together, as vLLM's --max-model-len.
    """

    def __init__(
        self,
        path: str = TEACHER,
        *,
        prompt_logprobs: bool = True,
        token_ids: bool = True,
        echo: bool = False,
        most: int = 20,
        context: int = 256,
    ) -> None:
        model = TeacherModel(path=path)
        self.tokenizer = load_tokenizer(model)
        self.model = load_teacher(model)
        self.facts = TokenizerInfo.from_tokenizer(self.tokenizer)
        self.engine = TransformersConfig().build(self.model, self.facts)
        self.prompt_logprobs, self.token_ids, self.most = prompt_logprobs, token_ids, most
        self.context, self.echo = context, echo

    def __call__(self, path: str, body: Any) -> Answer:
        """Answer a request."""
        if path == "/v1/models":
            known = {
                "id": "demo",
                "owned_by": "vllm" if self.token_ids else "somebody",
                "max_model_len": self.context,
            }
            return 200, {"data": [known]}
        if path == "/tokenize" and self.token_ids:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> Answer:
        """/v1/completions for one prompt."""
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        elif not self.token_ids:
            return 400, {"error": {"message": "prompt must be a string"}}
        if (body.get("prompt_logprobs") or 0) > self.most:
            return 400, {"error": {"message": f"more than --max-logprobs={self.most} requested"}}
        sampling = Sampling(
            max_tokens=body["max_tokens"], temperature=body.get("temperature", 1.0), logprobs=True
        )
        (done,) = self.engine.generate([prompt], sampling, body.get("seed", 0))
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.tokenizer.decode(list(done.token_ids), skip_special_tokens=True),
            "finish_reason": "stop" if done.finished else "length",
            "stop_reason": None,
        }
        if body.get("return_token_ids") and self.token_ids:
            choice |= {"token_ids": list(done.token_ids), "prompt_token_ids": list(prompt)}
        if body.get("logprobs") is not None and self.token_ids:
            choice["logprobs"] = {"token_logprobs": list(done.logprobs or ())}
        if body.get("prompt_logprobs") is not None and self.prompt_logprobs and self.token_ids:
            choice["prompt_logprobs"] = self.scores(prompt, body["prompt_logprobs"])
        if body.get("echo") and self.echo:
            scores = self.scores(prompt, 1)
            own = [one and one[str(token)]["logprob"] for one, token in zip(scores, prompt, strict=True)]
            tokens = [self.tokenizer.decode([token]) for token in [*prompt, *done.token_ids]]
            values = [*own, *(done.logprobs or ())]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(done.token_ids)}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}

    @torch.no_grad()
    def scores(self, prompt: Sequence[int], top: int) -> list[dict[str, Any] | None]:
        """The `top` most likely tokens at each place, and the prompt's own token, as vLLM gives them."""
        logprobs = self.model(torch.tensor([list(prompt)])).logits[0].float().log_softmax(-1)
        found: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(prompt[1:]):
            row = logprobs[place]
            values, ids = row.topk(top)
            there = dict(zip(ids.tolist(), values.tolist(), strict=True))
            entries = {token: row[token].item(), **there}
            ranks = {other: int((row > value).sum()) + 1 for other, value in entries.items()}
            found.append(
                {
                    str(other): {"logprob": value, "rank": ranks[other], "decoded_token": ""}
                    for other, value in entries.items()
                }
            )
        return found


@contextlib.contextmanager
def demo_server(**options: Any) -> Iterator[Service]:
    """The demo teacher behind vLLM's interface."""
    with serving(DemoTeacher(**options)) as service:
        yield service
