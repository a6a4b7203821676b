"""What docs/ship.md says of chains is true: its file and its commands run, in order."""

from __future__ import annotations

import json
import re
import shlex

from stillhouse.runs.chains.resolve import resolve_chain
from tests.conftest import ROOT
from tests.workshop import Workshop

PAGE = (ROOT / "docs" / "ship.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Chains\n")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, flags=re.DOTALL)


def test_the_commands_run_in_order(workshop: Workshop) -> None:
    for yaml in blocks("yaml"):
        text = yaml.replace("limit: 64", "limit: 16").replace("max_steps: 8", "max_steps: 2")
        text = text.replace("limit: 8, before", "limit: 2, teacher: false, before")
        text = text.replace("{to: safetensors}", "{to: safetensors, smoke_test: false}")
        text = text.replace("samples: 4", "samples: 2")
        name = yaml.splitlines()[0].removeprefix("# ")
        (workshop.folder / name).write_text(text, encoding="utf-8")
    said = {}
    for command in (line for block in blocks("console") for line in block.splitlines()):
        said[command] = workshop.stillhouse(*shlex.split(command)[1:])
        assert said[command].code == 0, said[command].err
    chain = json.loads((workshop.folder / "runs" / "ship" / "chain.json").read_text(encoding="utf-8"))
    assert chain["state"] == "done"
    resumed = said["stillhouse run chain.yaml --resume"].err
    assert "Stage 2 of 5, distil (kd): finished before" in resumed
    assert "prefer: deleted, to be made anew" in said[blocks("console")[0].splitlines()[3]].err
    stages = [
        line.split()[0] for line in said["stillhouse runs runs/ship"].out.splitlines() if "runs/ship/" in line
    ]
    names = ("warm", "distil", "prefer", "int4", "exported")
    assert stages == [f"runs/ship/{name}" for name in names]
    shown = said["stillhouse show stages runs/written"]
    assert re.search(r"kept +curate +texts +done +– +\d+ rows of 32 ", shown.out)
    assert "runs/written: the chain written is done" in shown.err
    assert workshop.stillhouse("show", "runs/written").out == shown.out
    assert "stillhouse show responses runs/written/kept" in workshop.refused("show", "runs/written/kept")
    assert "show rows: needs a run's folder, or files" in workshop.refused("show", "rows")
    chain = workshop.refused("show", "rows", "runs/written")
    assert "runs/written: is a chain of runs" in chain
    assert "stillhouse show rows: runs/written/texts, runs/written/kept" in chain
    assert "is a stage that made data, and no run" in workshop.refused("show", "rows", "runs/written/kept")
    assert "has no student" in workshop.refused("quantise", "runs/written/kept", "-o", "q")
    assert "is not the folder of a chain" in workshop.refused("show", "stages", "runs/written/kept")
    assert "--from: is for a single run" in workshop.refused("run", "chain.yaml", "--from", "runs/ship/warm")
    assert "--redo: is for a chain" in workshop.refused("run", "run.yaml", "--redo", "warm")
    assert "this file is a chain" in workshop.refused("generate", "chain.yaml", "-o", "out.jsonl")


def test_init_writes_a_chain_that_resolves(workshop: Workshop) -> None:
    assert workshop.stillhouse("init", "dckd", "--chain", "-o", "made.yaml").code == 0
    chain = resolve_chain("made.yaml")
    assert [(stage.name, stage.after) for stage in chain.stages] == [
        ("warm", ()), ("distil", ("warm",)), ("int4", ("distil",)), ("exported", ("distil",)),
    ]  # fmt: skip


def test_init_writes_a_chain_with_a_training_on_pairs_behind_the_method(workshop: Workshop) -> None:
    assert workshop.stillhouse("init", "kd", "--chain", "--then", "dpo", "-o", "made.yaml").code == 0
    chain = resolve_chain("made.yaml")
    assert [(stage.name, stage.after) for stage in chain.stages] == [
        ("warm", ()), ("distil", ("warm",)), ("dpo", ("distil",)), ("int4", ("dpo",)), ("exported", ("dpo",)),
    ]  # fmt: skip
    trained = {stage.name: stage.config for stage in chain.stages if stage.config is not None}
    assert str(trained["distil"].data.train.path) == "train.jsonl"
    assert str(trained["dpo"].data.train.path) == "pairs.jsonl"
    assert trained["dpo"].all_teachers["reference"].path == str(chain.folder_of("distil"))
    assert "no method" in workshop.refused("init", "kd", "--chain", "--then", "dop")
    assert "--then: is a stage of a chain" in workshop.refused("init", "kd", "--then", "dpo")
