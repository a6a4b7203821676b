"""Cutting layers, width and tokens out of models of several families: laws, choices, sizes, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import ModelError
from stillhouse.models import LoraConfig, Prune, StudentConfig, load_student
from stillhouse.models.pruning.choose import Kept, evenly
from stillhouse.models.pruning.cut import cut
from stillhouse.models.pruning.fit import student_sizes
from stillhouse.models.pruning.importance import measure
from stillhouse.models.pruning.layout import Layout, layout_of, without_weights
from stillhouse.models.pruning.plan import plan_pruning, pruned, pruned_without_weights

WIDE = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": tiny.END,
    "pad_token_id": tiny.PAD,
}
OWN_HEAD = {**WIDE, "head_dim": 8}
MANY_HEADS = {**WIDE, "num_key_value_heads": 6}
EQUAL_HEADS = {name: value for name, value in WIDE.items() if name != "num_key_value_heads"}
OPT = {name: value for name, value in EQUAL_HEADS.items() if name != "intermediate_size"}
OPT |= {"ffn_dim": 40, "init_std": 0.3, "word_embed_proj_dim": 24}
GPT2 = {
    "vocab_size": tiny.VOCAB,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 6,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": tiny.END,
}
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**WIDE, "tie_word_embeddings": True},
    "qwen3": OWN_HEAD,
    "mistral": {**OWN_HEAD, "sliding_window": 4},
    "gemma": OWN_HEAD,
    "gemma2": {**OWN_HEAD, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": {**OWN_HEAD, "sliding_window": 4, "layer_types": SLIDING},
    "phi": MANY_HEADS,
    "phi3": WIDE,
    "starcoder2": WIDE,
    "gpt2": GPT2,
    "gpt_neox": {key: value for key, value in WIDE.items() if key != "num_key_value_heads"},
    "opt": OPT,
}
TIED_HEADS = ("gpt2", "gpt_neox", "opt")
"""Families whose heads together are as wide as their hidden size."""


def made(kind: str, **more: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**FAMILIES[kind], **more})).eval()
    with torch.no_grad():  # norms and biases that are all alike would hide a wrong cut
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape) * 0.5)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.randint(2, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def batches(count: int = 2) -> list[TokenBatch]:
    found = []
    for seed in range(count):
        prompts = [(*one.token_ids, *(one.response_ids or ())) for one in tiny.prompts(3, seed)]
        found.append(TokenBatch.of(prompts, [1] * len(prompts), tiny.PAD))
    return found


def fewer(kind: str) -> Prune:
    if kind in TIED_HEADS:
        return Prune(intermediate_size=20, num_attention_heads=4, rows=4)
    return Prune(intermediate_size=20, hidden_size=16, num_key_value_heads=2, rows=4)


def masked(teacher: Any, layout: Layout, kept: Kept) -> Any:
    """The teacher with what is cut set to zero where it is written, and norms over what is kept."""
    model = copy.deepcopy(teacher)
    for number in range(layout.sizes.layers):
        layer = model.get_submodule(f"{layout.layers}{number}")
        for block, part, unit in (
            ("mlp", "intermediate_size", 1),
            ("attention", "num_attention_heads", layout.head),
        ):
            numbers = kept.numbers(part, number)
            if numbers is not None:
                keep = torch.zeros(getattr(layout.sizes, part))
                keep[list(numbers)] = 1
                module = layer.get_submodule(layout.back[block])
                wide = keep.repeat_interleave(unit)
                module.register_forward_pre_hook(lambda _module, args, mask=wide: (args[0] * mask,))
    if kept.hidden_size is not None:
        mask = torch.zeros(layout.sizes.hidden_size)
        mask[list(kept.hidden_size)] = 1
        zero_written(model, layout, mask)
    return model


def zero_written(model: Any, layout: Layout, mask: Tensor) -> None:
    with torch.no_grad():
        for name, module in model.named_modules():
            axes = layout.axes.get(f"{name}.weight")
            if isinstance(module, nn.Embedding) and axes is not None and axes[1]:
                module.weight.mul_(mask)
            elif name.endswith(tuple(layout.back.values())) and name.startswith(layout.layers):
                conv = type(module).__name__ == "Conv1D"
                module.weight.mul_(mask if conv else mask[:, None])
                if module.bias is not None:
                    module.bias.mul_(mask)
            elif isinstance(module, nn.LayerNorm) and axes == (("hidden_size",),):
                module.forward = kept_norm(module, mask.bool())


def kept_norm(norm: nn.LayerNorm, mask: Tensor) -> Any:
    weight, bias, eps = norm.weight[mask].detach(), norm.bias[mask].detach(), norm.eps

    def forward(states: Tensor) -> Tensor:
        found = torch.zeros_like(states)
        part = states[..., mask]
        found[..., mask] = nn.functional.layer_norm(part, part.shape[-1:], weight, bias, eps)
        return found

    return forward


@pytest.mark.parametrize("kind", FAMILIES)
def test_keeping_everything_is_the_identity(kind: str) -> None:
    teacher = made(kind)
    layout = layout_of(teacher)
    sizes = layout.sizes
    layers = tuple(range(sizes.layers))
    every = Kept(
        sizes,
        layers,
        tuple(range(sizes.hidden_size)),
        (tuple(range(sizes.intermediate_size)),) * 3,
        (tuple(range(sizes.num_attention_heads)),) * 3,
        (tuple(range(sizes.num_key_value_heads)),) * 3,
        tuple(range(sizes.vocabulary)),
    )
    assert torch.equal(logits(cut(teacher, layout, every).eval()), logits(teacher))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_narrower_student_is_the_teacher_with_the_rest_masked(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = made(kind)
    layout = layout_of(teacher)
    kept = plan_pruning(fewer(kind), teacher, batches()).kept
    assert kept.hidden_size is not None
    assert kept.num_attention_heads is not None
    student: Any = pruned(teacher, kept).eval()
    wanted = logits(masked(teacher, layout, kept))
    torch.testing.assert_close(logits(student), wanted, atol=2e-4, rtol=2e-3)
    assert not torch.allclose(logits(teacher), wanted, atol=1e-2)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))


def zero_at(teacher: Any, layout: Layout, layer: int, part: str, numbers: list[int], unit: int) -> None:
    """What these channels or heads of a layer write becomes zero."""
    block = "mlp" if part == "intermediate_size" else "attention"
    weight = teacher.get_submodule(f"{layout.layers}{layer}.{layout.back[block]}").weight
    side = weight if type(teacher).__name__.startswith("GPT2") else weight.T
    for number in numbers:
        side[number * unit : (number + 1) * unit] = 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_cutting_what_is_zero_leaves_outputs_equal(kind: str) -> None:
    teacher = made(kind)
    layout = layout_of(teacher)
    cut_off = {0: [1, 17, 39], 1: [0, 5, 6], 2: [3, 4, 38]}
    with torch.no_grad():
        for layer, numbers in cut_off.items():
            zero_at(teacher, layout, layer, "intermediate_size", numbers, 1)
            up = teacher.get_submodule(f"{layout.layers}{layer}.{layout.into['mlp']}")
            side = up.weight.T if kind == "gpt2" else up.weight
            side[numbers] = 0  # so that its activations are zero too, and importance finds it
            if up.bias is not None:
                up.bias[numbers] = 0
    prune = Prune(intermediate_size=layout.sizes.intermediate_size - 3, rows=4)
    kept = plan_pruning(prune, teacher, batches()).kept
    assert kept.intermediate_size is not None
    for layer, numbers in cut_off.items():
        assert not set(numbers) & set(kept.intermediate_size[layer])
    torch.testing.assert_close(logits(pruned(teacher, kept).eval()), logits(teacher), atol=1e-5, rtol=1e-5)


def test_channels_of_the_residual_stream_that_are_zero_can_go() -> None:
    teacher = made("llama", attention_bias=False, mlp_bias=False)
    layout = layout_of(teacher)
    mask = torch.ones(24)
    mask[[2, 3, 5, 7, 11, 13]] = 0
    zero_written(teacher, layout, mask)
    kept = plan_pruning(Prune(hidden_size=18, rows=4), teacher, batches()).kept
    assert kept.hidden_size == tuple(mask.nonzero().flatten().tolist())
    torch.testing.assert_close(logits(pruned(teacher, kept).eval()), logits(teacher), atol=1e-4, rtol=1e-4)


def test_heads_that_write_nothing_go_first_with_their_group() -> None:
    teacher = made("llama", attention_bias=False)
    layout = layout_of(teacher)
    with torch.no_grad():
        for layer in range(3):
            values = teacher.get_submodule(f"{layout.layers}{layer}.self_attn.v_proj").weight
            values[layer * 4 : (layer + 1) * 4] = 0  # the key-value head with the layer's number
    kept = plan_pruning(Prune(num_key_value_heads=2, rows=4), teacher, batches()).kept
    assert kept.num_key_value_heads == ((1, 2), (0, 2), (0, 1))
    assert kept.num_attention_heads == ((2, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 3))
    torch.testing.assert_close(logits(pruned(teacher, kept).eval()), logits(teacher), atol=1e-5, rtol=1e-5)


def test_a_layer_that_does_nothing_has_no_influence_and_goes_first() -> None:
    teacher = made("mistral")
    with torch.no_grad():
        for name, parameter in teacher.model.layers[1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    plan = plan_pruning(Prune(layers=2, rows=4), teacher, batches())
    assert plan.kept.layers == (0, 2)
    assert plan.facts["block_influence"][1] == 0
    torch.testing.assert_close(logits(pruned(teacher, plan.kept).eval()), logits(teacher))


def test_block_influence_is_one_minus_the_cosine_of_the_states() -> None:
    teacher, inputs = made("gpt2"), batches()
    found = measure(teacher, layout_of(teacher), inputs)
    cosines, tokens = torch.zeros(3), 0
    for batch in inputs:
        states: list[tuple[Tensor, Tensor]] = []

        def hook(_layer: Any, args: Any, output: Any, seen: Any = states) -> None:
            seen.append((args[0], output[0] if isinstance(output, tuple) else output))

        handles = [layer.register_forward_hook(hook) for layer in teacher.transformer.h]
        with torch.no_grad():
            teacher(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for handle in handles:
            handle.remove()
        real = batch.attention_mask.bool()
        tokens += int(real.sum())
        for number, (before, after) in enumerate(states):
            cosines[number] += nn.functional.cosine_similarity(before[real], after[real], dim=-1).sum()
    assert found.tokens == tokens
    torch.testing.assert_close(found.layers.float(), 1 - cosines / tokens, atol=1e-5, rtol=1e-4)


def test_padding_and_the_order_of_batches_have_no_part_in_importance() -> None:
    teacher = made("llama")
    layout = layout_of(teacher)
    together = measure(teacher, layout, batches())
    rows = [(*one.token_ids, *(one.response_ids or ())) for seed in (0, 1) for one in tiny.prompts(3, seed)]
    alone = measure(teacher, layout, [TokenBatch.of([row], [1], tiny.PAD) for row in rows[::-1]])
    for part in ("layers", "intermediate_size", "num_attention_heads", "hidden_size"):
        torch.testing.assert_close(getattr(together, part), getattr(alone, part), atol=1e-5, rtol=1e-4)


def test_even_spacing_keeps_both_ends_and_needs_no_data() -> None:
    assert [evenly(30, 4), evenly(3, 2), evenly(5, 5), evenly(7, 1)] == [
        (0, 10, 19, 29),
        (0, 2),
        (0, 1, 2, 3, 4),
        (0,),
    ]
    kept = plan_pruning(Prune(layers=2, intermediate_size=4, choose="even"), made("llama")).kept
    assert kept.layers == (0, 2)
    assert kept.intermediate_size == ((0, 13, 26, 39),) * 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_sizes_of_a_target_are_counted_before_any_weight_is_there(kind: str) -> None:
    teacher = made(kind)
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    target = int(0.55 * whole)
    prune = Prune(parameters=target, choose="even")
    empty = pruned_without_weights(prune, without_weights(teacher, teacher.config), tiny.VOCAB)
    student = load_student(StudentConfig(from_teacher=prune), None, made(kind), 0)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == sum(parameter.numel() for parameter in empty.parameters())
    assert 0.6 * target < count <= target
    layout = layout_of(made(kind))
    names = frozenset(name for name, _ in made(kind).named_parameters())
    assert layout.parameters(layout_of(student).sizes, names) == count


def test_what_is_given_is_no_part_of_the_search_for_a_target() -> None:
    teacher = made("llama")
    prune = Prune(parameters=9000, hidden_size=24, num_key_value_heads=3)
    sizes = student_sizes(prune, teacher, layout_of(teacher))
    assert (sizes.hidden_size, sizes.num_key_value_heads, sizes.num_attention_heads) == (24, 3, 6)
    assert sizes.layers < 3
    assert sizes.intermediate_size < 40


@pytest.mark.parametrize(
    ("prune", "kind", "message"),
    [
        ({"layers": 4}, "llama", r"from_teacher.layers: the teacher has fewer; got 4; allowed: 1 to 3"),
        ({"hidden_size": 32}, "llama", r"from_teacher.hidden_size: the teacher has fewer"),
        ({"hidden_size": 20}, "llama", r"llama takes no such sizes: .*not a multiple"),
        (
            {"num_attention_heads": 5},
            "llama",
            r"2 heads read one key-value head; got 5; allowed: multiples of 2",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "llama",
            r"each of 3 key-value heads is read by",
        ),
        ({"hidden_size": 18}, "gpt2", r"GPT2LMHeadModel has heads of 4.*allowed: multiples of 4"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "gpt2", r"it is num_attention_heads x 4"),
        ({"parameters": 10**6}, "llama", r"have [0-9,]+ parameters already, no more than 1,000,000"),
        ({"parameters": 100}, "llama", r"100 cannot be reached .* vocabulary: data"),
        ({"layers": 2}, "llama", r"importance is measured on data, and there are none here"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_their_field(prune: Any, kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        plan_pruning(Prune(**prune), made(kind))


def test_a_family_whose_width_is_not_known_is_refused_by_name_and_keeps_its_depth() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(MixtralConfig(**WIDE, num_local_experts=2)).eval()
    with pytest.raises(ModelError, match=r"intermediate_size: MixtralForCausalLM has no mlp .* can be cut"):
        plan_pruning(Prune(intermediate_size=20), teacher, batches())
    student = load_student(StudentConfig(from_teacher=Prune(layers=2, choose="even")), None, teacher, 0)
    assert layout_of(student).sizes.layers == 2


def test_heads_that_are_not_alike_are_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, BloomConfig

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=24, n_layer=2, n_head=6)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    prune = Prune(num_attention_heads=3, choose="even")
    with pytest.raises(
        ModelError, match=r"Bloom.*(than Stillhouse knows|has no|cannot be cut).*ayers can be"
    ):
        load_student(StudentConfig(from_teacher=prune), None, teacher, 0)


def test_adapters_train_on_a_narrower_student() -> None:
    config = StudentConfig(from_teacher=Prune(intermediate_size=20, choose="even"), lora=LoraConfig(rank=2))
    student = load_student(config, None, made("qwen3"), 0)
    student(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(one.grad is not None for one in student.parameters() if one.requires_grad)


def test_what_was_kept_is_read_back_as_it_was() -> None:
    kept = plan_pruning(fewer("llama"), made("llama"), batches()).kept
    assert Kept.from_dict(kept.as_dict()) == kept
    assert Kept.from_dict(kept.as_dict()).digest == kept.digest
