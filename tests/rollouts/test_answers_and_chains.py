"""Each row twice, with its chain and with the answer alone, beside which the teacher reads the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_runs import tree, write_data

from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Progress
from stillhouse.errors import ConfigError, DataError
from stillhouse.files import write_jsonl
from stillhouse.objectives.transport import sinkhorn_divergence
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.runs.resolve import resolve
from stillhouse.train.step import Step

DIRECT = {"kind": "transport", "place_weight": 0.0}
RESPONSES = {"kind": "answers_and_chains"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": str(folder / "chains.jsonl"), "max_response": 64, **changes.pop("data", {})}
    objective = {"fixed": "forward_kl", "direct": DIRECT}
    made = tree(folder, "run", **{"responses": RESPONSES, "objective": objective, **changes}, data=data)
    made["teacher"]["dtype"] = "float32"
    return made


def built(folder: Path, **changes: Any) -> tuple[Parts, Step]:
    parts = assemble(resolve(run(folder, **changes)).config)
    return parts, make_step(parts, RunFolder(folder / "run"))


def test_the_answer_alone_meets_the_teachers_chain(folder: Path) -> None:
    parts, step = built(folder)
    prompt = parts.data.train[0]
    assert prompt.response_ids is not None
    chain, direct = parts.decode(prompt.response_ids), parts.decode(prompt.direct_ids or ())
    assert chain.startswith("<think>")
    assert chain.endswith(f"</think>\n\n{direct}")
    assert "think" not in direct

    made = step.prepare([prompt], Progress(0, 9, 0.0, 2.0), 1)
    [micro] = made.micro_batches
    lengths = {"fixed": len(prompt.response_ids), "direct": len(prompt.direct_ids or ())}
    theirs = micro.read_by(MAIN)
    sources = [response.source for response in micro.batch.responses]
    assert dict(zip(sources, micro.batch.row_counts, strict=True)) == lengths
    assert theirs.row_counts == (lengths["fixed"],) * 2

    with torch.no_grad():
        ours, wanted = (
            model(torch.tensor([[*prompt.token_ids, *ids]])).logits[0, len(prompt.token_ids) - 1 : -1]
            for model, ids in (
                (parts.student.eval(), prompt.direct_ids or ()),
                (parts.teacher, prompt.response_ids),
            )
        )
    vocab = parts.vocab
    roots = [(0.5 * one[:, :vocab].log_softmax(-1)).exp() * 0.5**0.5 for one in (ours, wanted)]
    costs = [
        (a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.t()).clamp_min(0)
        for a, b in ((roots[0], roots[1]), (roots[0], roots[0]), (roots[1], roots[1]))
    ]
    expected = sinkhorn_divergence(*costs, 0.1)
    parts.student.eval()
    found = step.loss(parts.student, micro).metrics["loss/direct"]
    torch.testing.assert_close(found.total / found.weight, expected.double(), rtol=1e-4, atol=1e-6)


def test_a_row_without_a_chain_is_named_or_counted(folder: Path) -> None:
    rows = [{"prompt": "a b", "response": "c", "reasoning": "d"}, {"prompt": "a b", "response": "c"}]
    write_jsonl(folder / "mixed.jsonl", rows)
    data = {"train": str(folder / "mixed.jsonl")}
    with pytest.raises(DataError, match=r"mixed.jsonl:2: no reasoning before the answer"):
        built(folder, data=data)
    parts, _ = built(folder, data={**data, "no_response": "drop"})
    assert parts.data.report["sets"][0]["dropped"] == {"no reasoning before the answer": 1}


@pytest.mark.parametrize("direct", ["forward_kl", {"kind": "sum", "terms": [DIRECT, {"kind": "forward_kl"}]}])
def test_token_by_token_such_answers_cannot_be_compared(folder: Path, direct: Any) -> None:
    with pytest.raises(ConfigError, match=r"objective.direct.*only whole texts[\s\S]*allowed: transport"):
        resolve(run(folder, objective={"fixed": "forward_kl", "direct": direct}))
