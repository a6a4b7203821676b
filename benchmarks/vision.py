"""What distillation adds to a vision-language student with few labels: accuracy on held-out pictures.

A LLaVA-type teacher (CLIP tower, projector, Llama) is trained by `sft` on drawn scenes and handwritten digits
(`_vision_data.py`). A student of a quarter of its size is trained on few labels; from there each method
trains it on more pictures without labels, for as many steps. A further method is one entry of `METHODS`.

    python benchmarks/vision.py            # about 40 minutes on one thread
    python benchmarks/vision.py --small    # a check that it runs; writes nothing

Writes benchmarks/results/vision.json and vision.svg.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _vision_data as pictures
from preferences import mean_and_error, measure

from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve

RESULT = Path(__file__).parent / "results" / "vision.json"
PATCH = 8
FROM_TEACHER = {"kind": "generated", "by": "teacher"}
METHODS: dict[str, dict[str, Any]] = {
    "SFT, as many steps more": {"recipe": "sft", "data.no_response": "drop"},
    "seqkd": {"recipe": "seqkd"},
    "kd": {"recipe": "kd", "responses": FROM_TEACHER},
    "csd": {"recipe": "csd", "responses": FROM_TEACHER},
    "gkd": {"recipe": "gkd", "responses.base": FROM_TEACHER},
    "distillm2": {"recipe": "distillm2", "engine.sampling.temperature": 1.0},
}
"""By name: what is set beside the common settings."""
SIZES = {"teacher": (96, 3, 64, 2), "student": (56, 2, 40, 1)}
"""Width and layers of the language model, then of the tower."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pictures: Mapping[str, int]
    teacher_steps: int
    labelled: int
    start_steps: int
    steps: int
    batch: int = 64
    seeds: tuple[int, ...] = (1, 2, 3)
    methods: tuple[str, ...] = tuple(METHODS)


FULL = Size({"teacher": 10000, "train": 2400, "eval": 500}, 1600, 300, 200, 150)
SMALL = Size(
    {"teacher": 10, "train": 10, "eval": 5}, 2, 10, 2, 4, batch=5, seeds=(1,), methods=("kd", "distillm2")
)


def processor(folder: Path) -> Path:
    """A folder with a tokenizer of whole words and an image processor, as a model's has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<image>", "<unk>"]
    vocab = {word: index for index, word in enumerate([*special, *pictures.words()])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)
    side = {"height": pictures.SIDE, "width": pictures.SIDE}
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": pictures.SIDE},
        "crop_size": side,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    whole = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_processor": images,
    }
    (folder / "processor_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def model(name: str, folder: Path) -> dict[str, Any]:
    """The `student` section of a model from random weights."""
    width, layers, tower, tower_layers = SIZES[name]
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "initializer_range": 0.08, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": tower, "intermediate_size": 2 * tower,
        "num_hidden_layers": tower_layers, "num_attention_heads": 4, "image_size": pictures.SIDE,
        "patch_size": PATCH,
    }  # fmt: skip
    config = {
        "model_type": "llava", "text_config": text, "vision_config": vision, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    return {"tokenizer": str(folder), "processor": str(folder), "from_config": config}


def run(folder: Path, data: Path, train: str, size: Size, **changes: Any) -> Path:
    """One run; nothing if it is there already."""
    if (folder / "student").is_dir():
        return folder
    values = {
        "data": {
            "train": {"kind": "jsonl", "path": str(data / f"{train}.jsonl")}, "ignore": ["kind"],
            "template": {"kind": "plain"}, "max_prompt": 64, "max_response": 20,
        },
        "train": {
            "batch_size": size.batch, "micro_batch_size": size.batch, "warmup": 0.05, "lr": 2e-3,
            "validate_every": "never", "save_every": "never", "log_every": 20,
        },
        "evaluate": {
            "data": str(data / "eval.jsonl"),
            "before": False, "teacher": False, "sampling": {"temperature": 0.0, "max_tokens": 20},
        },
        "output": {"folder": str(folder), "report": False},
    }  # fmt: skip
    execute(resolve(nested(values, changes)))
    return folder


def nested(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with changes by dotted path."""
    for path, value in changes.items():
        *above, last = path.split(".")
        place = values
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(folder: Path, data: Path, system: str = "student-after") -> dict[str, float]:
    """Share (0 to 100) of the held-out questions whose answer is right, of all and of each kind."""
    kinds = {f"eval:{n}": row["kind"] for n, row in enumerate(read_rows(data / "eval.jsonl"), start=1)}
    right: dict[str, list[bool]] = {"all": [], **{kind: [] for kind in pictures.KINDS}}
    for row, kind in zip(read_rows(folder / "evaluation" / f"{system}.jsonl"), kinds.values(), strict=True):
        found = row["response"].split() == row["references"][0].split()
        right["all"].append(found)
        right[kind].append(found)
    return {name: 100 * statistics.fmean(values) for name, values in right.items()}


def table(folder: Path, small: bool) -> list[dict[str, Any]]:
    """All rows: the teacher, the student after few labels, and that after each method."""
    size = SMALL if small else FULL
    data, files = folder / "data", processor(folder / "processor")
    if not (data / "eval.jsonl").exists():
        pictures.write(data, dict(size.pictures))
    steps = {"train.max_steps": size.teacher_steps, "student": model("teacher", files)}
    teacher = run(folder / "teacher", data, "teacher", size, recipe="sft", **steps)
    found = {"teacher": [measured(teacher, data)]}
    print("teacher", found["teacher"], flush=True)
    for seed in size.seeds:
        few = {"data.train.labelled": size.labelled, "train.seed": seed}
        start = run(
            folder / f"few-labels-{seed}", data, "train", size,
            **{**few, "recipe": "sft", "data.no_response": "drop", "student": model("student", files)},
            **{"train.max_steps": size.start_steps},
        )  # fmt: skip
        found.setdefault("student, few labels", []).append(measured(start, data))
        for name in size.methods:
            changes = METHODS[name]
            place = folder / f"{changes['recipe']}-{seed}"
            more = {"train.max_steps": size.steps, "student": {"path": str(start / "student")}}
            if changes["recipe"] != "sft":
                more["teacher"] = {"kind": "live", "path": str(teacher / "student")}
            run(place, data, "train", size, **few, **more, **changes)
            found.setdefault(name, []).append(measured(place, data))
            print(name, seed, found[name][-1], flush=True)
    rows = [row(name, values) for name, values in found.items()]
    if not small:
        plot(rows)
    return rows


def row(name: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table: the mean over seeds and its standard error."""
    means: dict[str, Any] = {"system": name, "seeds": len(found)}
    for kind in found[0]:
        means[kind], means[f"{kind}_se"] = mean_and_error([one[kind] for one in found])
    return means


def plot(rows: list[dict[str, Any]]) -> None:
    """Accuracy of each system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    names = [one["system"] for one in rows]
    colours = [
        "#888888" if name == "teacher" else "#c0504d" if "SFT" in name or "few" in name else "#4472c4"
        for name in names
    ]
    axes.barh(names, [one["all"] for one in rows], xerr=[one["all_se"] for one in rows], color=colours)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 100), xlabel="right answers on held-out pictures (%), mean and standard error over seeds"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULT.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    measure(table, RESULT, __doc__, sizes=SIZES)
