"""`DistilTrainer` and `distil`: any method over models in memory, resumed as straight, faults in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import stillhouse
from stillhouse import DistilConfig, DistilTrainer, objectives
from stillhouse.errors import ConfigError, DataError, ModelError, TrainingError
from stillhouse.trl import DistillationConfig, GKDConfig
from tests.devices import same_tensors
from tests.vision_models import picture, vision_model


def rows_of(models: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (models / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def options(folder: Path, **more: Any) -> DistilConfig:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_completion_length": 16,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistilConfig(str(folder), **{**given, **more})


def trainer_of(models: Path, args: DistilConfig, **more: Any) -> DistilTrainer:
    return DistilTrainer(
        AutoModelForCausalLM.from_pretrained(models / "student"),
        AutoModelForCausalLM.from_pretrained(models / "teacher"),
        args,
        **{
            "train_dataset": rows_of(models),
            "processing_class": AutoTokenizer.from_pretrained(models / "teacher"),
            **more,
        },
    )


def weights(trainer: DistilTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same_weights(one: DistilTrainer, other: DistilTrainer) -> bool:
    found = weights(other)
    return all(same_tensors(value, found[name]) for name, value in weights(one).items())


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("recipe", ["kd", "distillm", "distillm2"])
def test_a_recipe_trains_and_resumes_as_straight(recipe: str, models: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"recipe": recipe, "eval_strategy": "steps", "eval_steps": 1}
    held_out = {"eval_dataset": rows_of(models)[:2]}
    straight = trainer_of(models, options(tmp_path / "straight", **more), **held_out)
    start = weights(straight)
    straight.train()
    broken = trainer_of(models, options(tmp_path / "broken", **more), **held_out, callbacks=[StopAfter(2)])
    broken.train()
    resumed = trainer_of(models, options(tmp_path / "broken", **more), **held_out)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert same_weights(straight, resumed)
    assert any(not torch.equal(value, start[name]) for name, value in weights(straight).items())
    more |= {"gradient_accumulation_steps": 7}
    larger = trainer_of(models, options(tmp_path / "broken", **more), **held_out)
    with pytest.raises(TrainingError, match=r"its steps have \d+ prompts, and now they would have \d+"):
        larger.train(resume_from_checkpoint=True)


def test_it_shadows_five_methods_of_the_trainer() -> None:
    ours = {name for name in vars(DistilTrainer) if not name.startswith("__")}
    assert ours & set(dir(Trainer)) == {"train", "evaluate", "predict", "log", "save_model"}


def test_an_objective_and_responses_are_given_as_in_yaml_or_as_objects(models: Path, tmp_path: Path) -> None:
    ways = (
        {"objective": {"kind": "skew_kl", "alpha": 0.2}, "responses": "on_policy"},
        {"objective": objectives.build("skew_kl", alpha=0.2), "responses": {"kind": "on_policy"}},
    )
    found = []
    for number, way in enumerate(ways):
        trainer = trainer_of(models, options(tmp_path / str(number), max_steps=1), **way)
        trainer.train()
        assert trainer.state.log_history[0]["responses/student"] == 1.0
        found.append(trainer)
    assert same_weights(*found)


def test_evaluate_measures_the_student_on_held_out_rows(models: Path, tmp_path: Path) -> None:
    rows = rows_of(models)
    args = options(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer = trainer_of(models, args, eval_dataset={"a": rows[:3], "b": Dataset.from_list(rows[3:5])})
    trainer.args.metric_for_best_model = "eval_a_loss"
    trainer.args.greater_is_better = False
    trainer.train()
    logged = [row for row in trainer.state.log_history if "eval_a_loss" in row]
    assert len(logged) == 2
    assert logged[0]["eval_a_kl_to_teacher"] > logged[1]["eval_a_kl_to_teacher"] > 0
    assert trainer.state.best_metric == pytest.approx(min(row["eval_a_loss"] for row in logged))
    one = trainer.evaluate(rows[:1], metric_key_prefix="one")
    with torch.no_grad():
        prompt = trainer.parts.data.train[0]
        ids = torch.tensor([[*prompt.token_ids, *(prompt.response_ids or ())]])
        log_q = trainer.model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats = -log_q.gather(1, ids[0, 1:, None])[len(prompt.token_ids) - 1 :].mean()
    assert one["one_loss"] == pytest.approx(nats.item(), rel=1e-5)


def test_distil_saves_a_student_that_answers_by_itself(models: Path, tmp_path: Path) -> None:
    trainer = stillhouse.distil(
        str(models / "student"),
        str(models / "teacher"),
        rows_of(models),
        output_dir=str(tmp_path / "out"),
        recipe="skl",
        max_steps=1,
        use_cpu=True,
        max_completion_length=16,
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_tensors(value, saved.state_dict()[name]) for name, value in weights(trainer).items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert saved.generation_config.eos_token_id == tokenizer.eos_token_id


def test_adapters_alone_are_trained(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = trainer_of(
        models,
        options(tmp_path, max_steps=1, gradient_checkpointing=True),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert {name for name, one in trainer.model.named_parameters() if one.requires_grad} == {
        name for name, _ in trainer.model.named_parameters() if "lora_" in name
    }
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_vision_language_student_learns_from_rows_with_images(tmp_path: Path) -> None:
    student = vision_model(tmp_path / "student", "llava")
    teacher = vision_model(tmp_path / "teacher", "llava", seed=1, size=32)
    picture(3).save(tmp_path / "picture.png")
    file = str(tmp_path / "picture.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "what is it ?", "response": "a dog", "images": [file]},
        {"prompt": "and now ?", "response": "a cat"},
    ]
    args = options(tmp_path / "out", recipe="gkd", max_steps=2, template="plain", max_completion_length=4)
    trainer = stillhouse.DistilTrainer(str(student), str(teacher), args, rows * 4)
    shown = trainer.parts.data.train[0]
    assert len(shown.images) == 1
    assert shown.teacher_ids is not None
    assert len(shown.teacher_ids) > len(shown.token_ids), "the teacher's image has more tokens"
    trainer.train()
    trainer.save_model()
    weights = [*(tmp_path / "out").rglob("*.safetensors")]
    assert len(weights) == 2, "the last checkpoint, and what was saved"
    for path in weights:
        saved = AutoProcessor.from_pretrained(path.parent)
        assert saved.image_token
        assert saved.tokenizer.get_vocab() == trainer.processing_class.get_vocab()
        assert path.stat().st_mode == path.with_name("config.json").stat().st_mode


def test_a_longer_row_loses_the_oldest_tokens_of_its_prompt(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer_of(models, options(tmp_path, max_length=200)).parts.data.train
    lengths = sorted(len(one.token_ids) + len(one.response_ids or ()) for one in whole)
    limit = lengths[len(lengths) // 2]
    cut = trainer_of(models, options(tmp_path, max_length=limit)).parts.data.train
    for before, after in zip(whole, cut, strict=True):
        ids = (*before.token_ids, *(before.response_ids or ()))
        assert (*after.token_ids, *(after.response_ids or ())) == ids[-limit:]
    longer = sum(length > limit for length in lengths)
    assert f"of 16 rows {longer} lose the oldest tokens" in caplog.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DistilConfig("x", lerning_rate=1.0), "lerning_rate: is no argument of DistilConfig"),
        (lambda: GKDConfig("x", packing=True), "packing: is not taken here"),
        (lambda: GKDConfig("x", lmbda=1.5), "lmbda: must be from 0 to 1"),
        (lambda: GKDConfig("x", fp16=True), "fp16: is not supported"),
        (lambda: DistillationConfig("x", use_vllm=True, bf16=False), "'kind': 'vllm'"),
        (lambda: DistillationConfig("x", vllm_server_port=1, bf16=False), "vllm_server_port: is not taken"),
        (lambda: DistillationConfig("x", temperature=2.0, beta=0.5), "only forward and reverse KL"),
        (lambda: DistilConfig("x", recipe="kd", beta=0.5), "a method already"),
        (lambda: DistilConfig("x", seq_kd=True), "seq_kd: belongs to lmbda and beta"),
        (lambda: DistilConfig("x", dataloader_drop_last=True), "dataloader_drop_last: cannot be changed"),
        (lambda: DistilConfig("x", label_smoothing_factor=0.1), "the objective is the loss"),
    ],
)
def test_arguments_that_are_wrong_are_named(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_what_trl_does_by_default_is_taken_without_a_word() -> None:
    made = GKDConfig("x", packing=False, completion_only_loss=True, bf16=False)
    assert (made.lmbda, made.beta, made.learning_rate) == (0.5, 0.5, 2e-5)
    assert made.method["responses"]["student_share"] == 0.5
    assert GKDConfig("x", lmbda=1.0, bf16=False).method["responses"] == {"kind": "on_policy"}
    teacher_text = GKDConfig("x", lmbda=0.0, seq_kd=True, beta=0.0, bf16=False).method
    assert teacher_text["responses"] == {"kind": "generated", "by": "teacher", "refresh": "step"}
    assert teacher_text["objective"] == {"kind": "forward_kl"}


def test_a_trainer_says_what_is_wrong_with_what_it_is_given(models: Path, tmp_path: Path) -> None:
    faults: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data_collator": list}, ConfigError, "data_collator: is not taken here"),
        ({"objective": "skew_lk"}, ConfigError, "skew_kl"),
        ({"train_dataset": None}, ConfigError, "train_dataset: is needed"),
        ({"train_dataset": ["text"]}, DataError, r"train_dataset\[0\]: a row is a str"),
        ({"train_dataset": [{"prompt": "A?"}]}, DataError, r"train_dataset\[0\]: no response"),
        ({"processing_class": None, "train_dataset": [{"prompt": "A?"}]}, DataError, "no response"),
    ]
    for given, kind, words in faults:
        with pytest.raises(kind, match=words):
            trainer_of(models, options(tmp_path), **given)
    plain = TrainingArguments("x", use_cpu=True)
    with pytest.raises(ConfigError, match="args: must be a DistilConfig"):
        DistilTrainer("x", "y", plain)
    with pytest.raises(ModelError, match=r"^model: .*nowhere: no model could be loaded"):
        DistilTrainer(str(tmp_path / "nowhere"), str(models / "teacher"), options(tmp_path), rows_of(models))
    trainer = trainer_of(models, options(tmp_path))
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        trainer.evaluate()
