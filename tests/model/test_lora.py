"""LoRA means and trains what PEFT's means and trains."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import (
    LLAMA_LINEARS,
    LoRAConfig,
    LoRALinear,
    inject_lora,
    merge_lora,
)
from llama_lightning.model.loss import summed_cross_entropy, supervised_positions
from llama_lightning.records import IGNORE_INDEX
from tests.model.oracle import (
    SMALL,
    flat_batch,
    huggingface_twin,
    lora_parameters,
    max_difference,
    padded_batch,
    peft_twin,
    random_records,
    randomise_lora,
    relative_difference,
    small_config,
    small_llama,
    without_fp32_casts,
)

LORA = LoRAConfig(rank=8, alpha=16.0)


def _tokens() -> Tensor:
    return torch.randint(SMALL.vocab_size, (2, 16))


def _copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lora_parameters(model).items()}


def _train(model: Llama, steps: list[list[tuple[int, int]]], *, weight_decay: float) -> None:
    optimizer = torch.optim.AdamW(
        lora_parameters(model).values(), lr=1e-3, weight_decay=weight_decay
    )
    torch.manual_seed(1)
    for shapes in steps:
        batch = flat_batch(random_records(shapes))
        hidden = model.model(batch.tokens, positions=batch.positions, boundaries=batch.boundaries)
        learnt = supervised_positions(batch.labels)
        loss = summed_cross_entropy(hidden[learnt], batch.labels[learnt], model.lm_head)
        (loss / len(learnt)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _train_peft(model: torch.nn.Module, steps: list[list[tuple[int, int]]]) -> None:
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-3, weight_decay=0.01)
    torch.manual_seed(1)
    for shapes in steps:
        batch = padded_batch(random_records(shapes))
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        ).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_ten_steps_equal_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64: AdamW divides by the gradient's own size, so that in fp32 the rounding of a tiny
    # gradient decides the sign of a whole step.
    without_fp32_casts(monkeypatch)
    model = small_llama(std=0.05).double()
    twin = huggingface_twin(model)
    inject_lora(model, LORA, dtype=torch.float64)
    start = _copies(model)
    oracle = peft_twin(twin, LORA, start)
    steps = [[(9 + i, 4), (30 - i, 11), (17, 1 + i)] for i in range(10)]
    _train(model, steps, weight_decay=0.01)
    _train_peft(oracle, steps)
    ours, theirs = _copies(model), _copies(oracle)
    assert ours.keys() == theirs.keys()
    worst = max(relative_difference(ours[name], theirs[name]) for name in ours)
    moved = min((ours[name] - start[name]).abs().max().item() for name in ours)
    print(f"worst of {len(ours)} matrices after 10 steps {worst:.1e} (bound 1e-06)")
    print(f"each matrix has an element that moved by {moved:.1e} or more")
    assert worst <= 1e-6
    assert moved > 5e-3


def test_ten_steps_with_another_decay_fail_the_comparison() -> None:
    models = [small_llama(std=0.05).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, weight_decay in zip(models, (0.01, 0.02), strict=True):
        torch.manual_seed(2)
        inject_lora(model, LORA, dtype=torch.float64)
        _train(model, [[(12, 4)]] * 10, weight_decay=weight_decay)
    one, other = (_copies(model) for model in models)
    worst = max(relative_difference(one[name], other[name]) for name in one)
    print(f"a decay of 0.02 in place of 0.01: {worst:.1e} (bound 1e-06)")
    assert worst > 1e-5


def test_starts_as_the_base() -> None:
    model, tokens = small_llama(), _tokens()
    base = model(tokens)
    inject_lora(model, LORA, dtype=torch.float32)
    assert all((p == 0).all() for n, p in lora_parameters(model).items() if ".lora_B" in n)
    assert all((p != 0).any() for n, p in lora_parameters(model).items() if ".lora_A" in n)
    assert torch.equal(model(tokens), base)
    assert torch.equal(model.train()(tokens), base)


def test_a_step_leaves_the_base_bit_for_bit() -> None:
    model = small_llama(std=0.05)
    inject_lora(model, LORA, dtype=torch.float32)
    trained = {id(p) for p in lora_parameters(model).values()}
    base = {n: p for n, p in model.named_parameters() if id(p) not in trained}
    assert all(not p.requires_grad for p in base.values())
    before = {name: p.detach().clone() for name, p in base.items()}
    lora_before = _copies(model)
    # All parameters are handed over, as a careless caller would.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(_tokens()).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in base.items())
    moved = [n for n, p in lora_parameters(model).items() if not torch.equal(p, lora_before[n])]
    assert any(".lora_B" in name for name in moved)


def test_scale_is_alpha_over_rank_as_in_peft() -> None:
    config = LoRAConfig(rank=4, alpha=32.0, target_modules=list(LLAMA_LINEARS))
    model, tokens = small_llama(std=0.05), _tokens()
    twin = huggingface_twin(model)
    inject_lora(model, config, dtype=torch.float32)
    oracle = peft_twin(twin, config, randomise_lora(model))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear)
    assert layer.scale == 8.0
    with torch.no_grad():
        reference = oracle(tokens, use_cache=False).logits
        difference = max_difference(model(tokens), reference)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.scale = config.alpha  # alpha not divided by the rank
        broken = max_difference(model(tokens), reference)
    print(f"max |logit difference| {difference:.1e} (bound 1e-05); without the rank {broken:.1e}")
    assert difference <= 1e-5 < broken


def test_a_starts_as_in_peft() -> None:
    model = small_llama()
    twin = huggingface_twin(model)
    torch.manual_seed(7)
    inject_lora(model, LORA, dtype=torch.float32)
    torch.manual_seed(7)
    theirs = _copies(peft_twin(twin, LORA))
    ours = _copies(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, values in ours.items():
        if ".lora_A" in name:
            bound = 1 / math.sqrt(values.shape[1])
            assert 0.95 * bound < values.abs().max().item() <= bound


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["down_proj"]])
def test_only_targets_are_wrapped(target_modules: list[str]) -> None:
    model = small_llama()
    inject_lora(model, LoRAConfig(rank=2, target_modules=target_modules), dtype=torch.float32)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == len(target_modules) * SMALL.num_hidden_layers
    assert {name.rpartition(".")[2] for name in wrapped} == set(target_modules)


def test_an_unknown_target_names_the_valid_ones() -> None:
    config = LoRAConfig(rank=2, target_modules=["q_proj", "c_attn"])
    with pytest.raises(ValueError, match="c_attn matches no linear layer") as error:
        inject_lora(small_llama(), config, dtype=torch.float32)
    assert all(name in str(error.value) for name in LLAMA_LINEARS)


def test_a_tied_head_is_refused() -> None:
    config = LoRAConfig(rank=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is tied to the embedding"):
        inject_lora(small_llama(), config, dtype=torch.float32)


def test_an_untied_head_is_wrapped() -> None:
    model = small_llama(small_config(tie_word_embeddings=False))
    inject_lora(model, LoRAConfig(rank=2, target_modules=["lm_head"]), dtype=torch.float32)
    assert isinstance(model.lm_head, LoRALinear)
    assert model(_tokens()).shape[-1] == SMALL.vocab_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 2, "dropout": 1.0}, r"lora.dropout is 1\.0"),
        ({"rank": 2, "target_modules": []}, "lora.target_modules is empty"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)


def test_adapters_are_fp32_around_a_bf16_base() -> None:
    model = small_llama(std=0.05).bfloat16()
    inject_lora(model, LORA, dtype=torch.float32)
    randomise_lora(model)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    logits = model(_tokens())
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    gradients = [p.grad for p in lora_parameters(model).values()]
    assert {g.dtype for g in gradients if g is not None} == {torch.float32}
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


def test_the_update_is_computed_in_fp32() -> None:
    # In bf16 an update is rounded three times on its way; in fp32 once, when it is added.
    base = torch.nn.Linear(192, 64, bias=False).bfloat16()
    layer = LoRALinear(base, LORA, torch.float32)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 192).bfloat16()
    update = (x.float() @ layer.lora_A.weight.T @ layer.lora_B.weight.T) * 2.0
    assert max_difference(layer(x), base(x) + update.bfloat16()) == 0.0


def test_dropout_is_on_the_input_of_the_update() -> None:
    layer = LoRALinear(torch.nn.Linear(192, 64), LoRAConfig(rank=8, dropout=0.5), torch.float32)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 192)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    update = layer.lora_B(layer.lora_A(F.dropout(x, 0.5))) * 2.0
    assert torch.equal(out, layer.base_layer(x) + update)


def test_dropout_is_on_the_update_and_only_in_training() -> None:
    model, tokens = small_llama(std=0.05), _tokens()
    base = model(tokens)
    inject_lora(model, LoRAConfig(rank=8, dropout=0.5), dtype=torch.float32)
    # B is zero, so that a dropout anywhere but on the update would show here.
    assert torch.equal(model.train()(tokens), base)
    lora = randomise_lora(model)
    plain = small_llama(std=0.05)
    plain.load_state_dict(
        {n.replace("base_layer.", ""): t for n, t in model.state_dict().items() if n not in lora}
    )
    inject_lora(plain, LORA, dtype=torch.float32)
    plain.load_state_dict(lora, strict=False)
    assert torch.equal(model.eval()(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), plain(tokens))
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_is_peft_merged(tied: bool) -> None:
    model = small_llama(small_config(tie_word_embeddings=tied), std=0.1)
    twin = huggingface_twin(model)
    inject_lora(model, LORA, dtype=torch.float32)
    lora = randomise_lora(model)
    theirs = peft_twin(twin, LORA, lora).merge_and_unload().eval()
    before, tokens = _copies(model), _tokens()
    merged = merge_lora(model, dtype=torch.float32)
    assert merged.state_dict().keys() == theirs.state_dict().keys()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    with torch.no_grad():
        ours = merged(tokens)
        difference = max_difference(ours, theirs(tokens, use_cache=False).logits)
        unmerged = max_difference(ours, model(tokens))
    print(f"max |logit difference| to PEFT's merged {difference:.1e}, unmerged {unmerged:.1e}")
    assert difference <= 1e-4
    assert unmerged <= 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in _copies(model).items())


def test_merged_in_fp32_then_cast() -> None:
    model = small_llama().bfloat16()
    inject_lora(model, LORA, dtype=torch.float32)
    lora = randomise_lora(model)
    name = "model.layers.1.mlp.up_proj"
    base = model.get_submodule(name).base_layer.weight.detach()
    update = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"] * 2.0
    merged = merge_lora(model, dtype=torch.bfloat16).get_submodule(name).weight
    assert torch.equal(merged, (base.float() + update).bfloat16())
    in_bf16 = base + update.bfloat16()
    rounded = (merged != in_bf16).float().mean().item()
    print(f"added in bf16 instead, {rounded:.1%} of the weights would differ")
    assert rounded > 0.05


def test_a_weight_that_the_type_cannot_hold_is_named() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds .* in float16"):
        merge_lora(model, dtype=torch.float16)
