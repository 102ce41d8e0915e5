"""A captured decode step does what the step itself does, on whatever its memory holds by then.

No CUDA graph is captured on a CPU. `traced` stands in: it notes down every operation of the step
and replays them on the same tensors, without the Python around them. What a CUDA graph would not
see change, it does not see change either: numbers, shapes, tensors made outside, casts kept by
autocast. tests/test_gpu.py has the graphs themselves.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_lightning.model import decode_step, kv_cache
from llama_lightning.model.continuous_batch import ContinuousBatch
from llama_lightning.model.decode_step import Capture, DecodeStep, Step
from llama_lightning.model.kv_cache import KVCache
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import PromptBatch
from tests.model.oracle import SMALL, max_difference, randomise_lora, small_config, small_llama
from tests.model.test_generate import _batch

CPU = torch.device("cpu")
Texts = dict[int, list[int]]


def traced(step: Step) -> Step:
    return make_fx(step, tracing_mode="real")()


class Captures:
    """Captures by a given function, and keeps what was captured."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.steps: list[tuple[Step, Step]] = []
        self.replays = self.times_made = 0

    def __call__(self, step: Step) -> Step:
        captured = self.capture(step)
        self.steps.append((step, captured))

        def replay() -> Tensor:
            self.replays += 1
            return captured()

        return replay

    def new(self, device: torch.device) -> Capture:
        """Be what a batch makes its captures with."""
        self.times_made += 1
        return self


def _fill(cache: KVCache, lengths: Sequence[int]) -> None:
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache.lengths_B.copy_(torch.tensor(lengths))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "autocast and LoRA"])
@torch.no_grad()  # torch.inference_mode would keep no casts, in torch 2.13
def test_a_replay_equals_the_step_bit_for_bit_after_all_has_changed(kind: str) -> None:
    model = small_llama()
    if kind in ("bfloat16", "autocast and LoRA"):
        model.bfloat16()
    if kind == "autocast and LoRA":
        inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
        randomise_lora(model)
    weight = model.model.embed_tokens.weight
    cache = KVCache.allocate(model.config, 6, 256, dtype=weight.dtype, device=CPU)
    captures = Captures(traced)
    decode = DecodeStep(model.model, cache, captures)
    lengths = [200, 3, 41, 0, 17, 5]
    _fill(cache, lengths)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind.startswith("autocast")):
        for _ in range(decode_step.CAPTURE_AT):
            model(torch.zeros(1, 1, dtype=torch.int64))  # autocast now keeps casts of the weights
            decode(torch.randint(SMALL.vocab_size, (5,)), lengths)
            lengths[:5] = [n + 1 for n in lengths[:5]]
            assert cache.lengths_B.tolist() == lengths
    [(step, replay)] = captures.steps
    for parameter in model.parameters():
        parameter.mul_(1.01)
    seen, kept = [], []
    for run in (step, replay):
        torch.manual_seed(1)
        _fill(cache, [7, 254, 0, 100, 31, 2])
        decode._tokens_B.copy_(torch.randint(SMALL.vocab_size, (6,)))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.startswith("autocast")):
            seen.append(run().clone())
        kept.append([tensor.clone() for tensor in (*cache.keys, *cache.values)])
    print(f"{kind}: hidden states of {seen[0].dtype} up to {seen[0].abs().max():.1f}, all equal")
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert captures.replays == 1  # at the step that captured it


class OnTheDevice(TorchDispatchMode):
    """Counts operations, none of which may meet a tensor of the host or wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, func
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        self.count += 1
        return out


@torch.inference_mode()
def test_the_host_has_no_part_in_a_step() -> None:
    meta = torch.device("meta")
    with meta:
        model = Llama(small_config(qkv_bias=True)).eval()
        tokens = torch.zeros(4, 1, dtype=torch.int64)
    cache = KVCache.allocate(model.config, 4, 256, dtype=torch.float32, device=meta)
    with OnTheDevice() as watched:
        model(tokens, cache=cache)
    print(f"{watched.count} operations, all of them on the device")
    assert watched.count > 100


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots grow in small pieces, and what comes back soon is captured."""
    for module in (decode_step, kv_cache):
        monkeypatch.setattr(module, "GROWTH", 16)
    monkeypatch.setattr(decode_step, "CAPTURE_AT", 2)


@pytest.fixture
def true_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Check that what a step is told is what the cache holds; count the rows behind it."""
    behind: list[int] = []
    call = DecodeStep.__call__

    def checked(self: DecodeStep, tokens_B: Tensor, lengths: Sequence[int]) -> Tensor:
        assert self._cache.lengths_B.tolist() == lengths
        behind.append(sum(length > 0 for length in lengths[len(tokens_B) :]))
        return call(self, tokens_B, lengths)

    monkeypatch.setattr(DecodeStep, "__call__", checked)
    return behind


def _uneven() -> list[PromptBatch]:
    """Prompts that share beginnings, of uneven answers; the second batch's are longer."""
    torch.manual_seed(0)
    beginnings = torch.randint(300, (2, 24)).tolist()
    batches = []
    for first, longest in ((0, 14), (20, 45)):
        prompts, limits, stops = [], [], []
        for n in range(first, first + 20):
            own = torch.randint(300, (1 + 5 * n % longest,)).tolist()
            prompts.append(beginnings[n % 3 == 0][: 24 - n % 5] + own)
            limits.append(1 + 7 * n % 20)
            stops.append([n, 100 + n])
        batch = _batch(prompts, stops, range(first, first + 20))
        batches.append(batch._replace(max_new_tokens=torch.tensor(limits)))
    return batches


def _texts(model: Llama, size: int, captures: Captures | None = None) -> Texts:
    keys = {} if captures is None else {"new_capture": captures.new}
    batch = ContinuousBatch(model, GenerationConfig(), size, **keys)
    texts: Texts = {}
    for number, prompts in enumerate(_uneven()):
        batch.add(prompts)
        texts |= {a.row_id: a.tokens for a in batch.run(drain=number == 1)}
    assert len(texts) == 40
    return texts


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("size", [1, 5, 20])
def test_texts_of_a_data_set_are_the_same_with_replays(size: int, true_lengths: list[int]) -> None:
    # In float64: the network rounds differently in each shape.
    model = small_llama(small_config(num_hidden_layers=1)).double()
    plain = _texts(model, size)
    steps = len(true_lengths)
    captures = Captures(traced)
    assert _texts(model, size, captures) == plain
    said = sum(map(len, plain.values()))
    print(
        f"size {size}: 40 texts of {said} tokens equal; {captures.replays} of {steps} steps were "
        f"replays of {len(captures.steps)} captures; the cache grew {captures.times_made} times; "
        f"up to {max(true_lengths)} rows behind the running ones"
    )
    assert len({token for text in plain.values() for token in text}) > 50
    assert captures.replays > steps / 3
    assert captures.times_made >= 2


@pytest.mark.usefixtures("small_shapes")
def test_rows_behind_keep_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Answers of short prompts go on when those of long ones, in the rows behind, are finished.
    model = small_llama(small_config(num_hidden_layers=1)).double()
    prompts = [torch.randint(300, (70 if n % 2 else 5,)).tolist() for n in range(48)]
    limits = torch.tensor([2 if n % 2 else 20 + n % 9 for n in range(48)])
    prefill, errors = ContinuousBatch._prefill, []

    def checked(self: ContinuousBatch, *given: Any) -> None:
        for row, prompt in enumerate(self._cached):
            if prompt:
                alone = KVCache.allocate(
                    model.config, 1, len(prompt), dtype=torch.float64, device=CPU
                )
                model(torch.tensor([prompt]), cache=alone)
                mine = self._cache.view(row, row + 1, len(prompt))
                errors.append(max_difference(mine.keys[0], alone.keys[0]))
        prefill(self, *given)

    monkeypatch.setattr(ContinuousBatch, "_prefill", checked)
    captures = Captures(lambda step: step)
    batch = ContinuousBatch(model, GenerationConfig(), 20, new_capture=captures.new)
    batch.add(_batch(prompts)._replace(max_new_tokens=limits))
    assert len(list(batch.run())) == 48
    print(f"keys of {len(errors)} prompts in the cache: off by up to {max(errors):.1e}")
    assert len(errors) > 40
    assert max(errors) < 1e-12


@pytest.mark.usefixtures("true_lengths")
def test_few_shapes_are_captured_and_none_of_a_short_answer() -> None:
    model = small_llama(small_config(num_hidden_layers=1))
    captures = Captures(lambda step: step)
    prompts = [torch.randint(300, (1 + n % 70,)).tolist() for n in range(60)]
    limits = torch.tensor([2 + 37 * n % 300 for n in range(60)])
    batch = ContinuousBatch(model, GenerationConfig(), 32, new_capture=captures.new)
    batch.add(_batch(prompts)._replace(max_new_tokens=limits))
    assert len(list(batch.run())) == 60
    print(f"{len(captures.steps)} captures for up to 32 rows and 370 tokens")
    assert 4 <= len(captures.steps) <= 8 * 2
    short = Captures(lambda step: step)
    batch = ContinuousBatch(model, GenerationConfig(max_new_tokens=8), 2, new_capture=short.new)
    batch.add(_batch(prompts[:2]))
    assert len(list(batch.run())) == 2
    assert short.times_made == 1
    assert not short.steps


@pytest.mark.usefixtures("small_shapes")
def test_where_a_step_cannot_be_captured_it_runs_as_it_is() -> None:
    model = small_llama(small_config(num_hidden_layers=1)).double()
    tried: list[Step] = []

    def fails(step: Step) -> Step:
        step()
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    with pytest.warns(
        UserWarning, match="no CUDA graph .*is capturing\\); the steps go on"
    ) as said:
        texts = _texts(model, 5, Captures(fails))
    print(said[0].message)
    assert texts == _texts(model, 5)
    assert 1 <= len(tried) == len(said) <= 4  # once for each place of the cache
