"""On a CUDA device: the same numbers as on the CPU, and the parts that only exist there.

Run with `pytest -m gpu`.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lightning.cli import main
from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model.attention import attention, varlen_kernel
from llama_lightning.model.continuous_batch import ContinuousBatch
from llama_lightning.model.decode_step import Capture, CudaGraphs, Step
from llama_lightning.model.generate import generate
from llama_lightning.model.llama import Llama
from llama_lightning.model.ragged_rows import ragged_rows
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import Generation, Prefixes, PromptBatch
from tests.model.oracle import small_llama
from tests.small import write_byte_tokenizer, write_small_llama
from tests.training.test_two_ranks import arguments
from tests.verb_processes import on_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_flat_logits_equal_the_cpus() -> None:
    model = small_llama()
    lengths = torch.tensor([70, 3, 41])
    tokens = torch.randint(model.config.vocab_size, (int(lengths.sum()),))
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    with torch.no_grad():
        expected = model(tokens, positions=positions, boundaries=boundaries)
        model.cuda()
        found = model(tokens.cuda(), positions=positions.cuda(), boundaries=boundaries.cuda()).cpu()
    error = float((found - expected).abs().max())
    print(f"{torch.cuda.get_device_name()}: largest difference of a logit {error:.1e}")
    assert error <= 1e-3


@pytest.mark.skipif(varlen_kernel() is None, reason="torch has no varlen_attn with enable_gqa")
@pytest.mark.parametrize("shared", [False, True])
def test_rows_end_to_end_by_the_flash_kernel_equal_fp32_grids(shared: bool) -> None:
    tokens = [[1, 2, 3] * 30, [1, 2, 3, 4] * 20, [1, 2], [7] * 300]
    lengths = torch.tensor([len(row) for row in tokens])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).cuda()
    prefixes = Prefixes(*(t.cuda() for t in find_prefixes(tokens))) if shared else None
    rows = ragged_rows(boundaries, prefixes)
    count = int(lengths.sum()) if prefixes is None else len(prefixes.distinct)
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # the kernel; grids
        torch.manual_seed(0)
        q = torch.randn(count, 8, 64).bfloat16().cuda()
        k, v = torch.randn(2, count, 2, 64).bfloat16().cuda()
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, rows=rows)
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    print(f"relative differences of the output and the gradients of q, k, v: {errors}")
    assert max(errors) <= 2e-2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_equals_the_cpus(temperature: float) -> None:
    model = small_llama().double()  # rounding must not move a draw
    prompts = PromptBatch(
        tokens=torch.randint(model.config.vocab_size, (12,)),
        boundaries=torch.tensor([0, 2, 9, 12]),
        row_ids=torch.tensor([0, 1, 2]),
        stop_ids=torch.full((3, 1), -1),
    )
    config = GenerationConfig(max_new_tokens=20, temperature=temperature, top_p=0.9)
    expected = sorted(generate(model, prompts, config))
    on_gpu = PromptBatch(*(None if part is None else part.cuda() for part in prompts))
    assert sorted(generate(model.cuda(), on_gpu, config)) == expected


def _uneven(count: int) -> PromptBatch:
    """Prompts of 1 to 60 tokens whose answers have 2 to 280, on the device."""
    lengths = torch.tensor([1 + 7 * n % 60 for n in range(count)])
    prompts = PromptBatch(
        tokens=torch.randint(300, (int(lengths.sum()),)),
        boundaries=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        row_ids=torch.arange(count),
        stop_ids=torch.full((count, 1), -1),
        max_new_tokens=torch.tensor([2 + 61 * n % 279 for n in range(count)]),
    )
    return PromptBatch(*(None if part is None else part.cuda() for part in prompts))


def _answers(
    model: Llama, prompts: PromptBatch, size: int, capture: Callable[[torch.device], Capture]
) -> list[Generation]:
    batch = ContinuousBatch(model, GenerationConfig(), size, new_capture=capture)
    batch.add(prompts)
    return sorted(batch.run())


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_texts_with_graphs_equal_those_without(kind: str, size: int) -> None:
    model = small_llama().cuda()
    if kind == "bfloat16":
        model.bfloat16()
    captured: list[tuple[int, ...]] = []

    def counted(device: torch.device) -> Capture:
        graphs = CudaGraphs(device)

        def capture(step: Step) -> Step:
            captured.append(tuple(step().shape))
            return graphs(step)

        return capture

    prompts = _uneven(24)
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
        plain = _answers(model, prompts, size, lambda device: lambda step: step)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "generation: no CUDA graph")
            replayed = _answers(model, prompts, size, counted)
    said = sum(len(answer.tokens) for answer in plain)
    print(f"{kind}, size {size}: {said} tokens; captured {captured}")
    assert replayed == plain
    assert 1 <= len(captured) <= 8 * 2


def test_a_step_that_waits_for_the_host_is_not_captured() -> None:
    # In float64: each shape rounds differently.
    model, prompts = small_llama().double().cuda(), _uneven(8)
    plain = _answers(model, prompts, 4, lambda device: lambda step: step)

    def waits(head: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        assert logits.sum().isfinite().item()

    hook = model.lm_head.register_forward_hook(waits)
    with pytest.warns(UserWarning, match="no CUDA graph of a decode step") as said:
        answers = _answers(model, prompts, 4, CudaGraphs)
    hook.remove()
    print(said[0].message)
    assert answers == plain
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert "captur" in str(said[0].message)
    # Nothing is left of the failure.
    torch.cuda.empty_cache()
    assert torch.rand(1, device="cuda").isfinite().item()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "generation: no CUDA graph")
        assert _answers(model, prompts, 4, CudaGraphs) == plain


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_fit_resume_and_predict(tmp_path: Path, optimizer: str, precision: str) -> None:
    write_small_llama(tmp_path / "base", vocab_size=512)
    write_byte_tokenizer(tmp_path / "base")
    records = [{"instruction": f"q{i}", "output": "ab" * (i % 9 + 1)} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    keys = {
        "model.base_model": tmp_path / "base",
        "model.lora.rank": 64,
        "model.optimizer.name": optimizer,
        "model.gradient_checkpointing": "true",
        "data.path": tmp_path / "data.json",
        "data.batch_size": 8,
        "trainer.accelerator": "cuda",
        "trainer.devices": 1,
        "trainer.precision": precision,
        "trainer.accumulate_grad_batches": 2,
        "trainer.default_root_dir": tmp_path,
        "checkpoint.dirpath": tmp_path,
        "samples.every_n_steps": 2,
        "model.generation.max_new_tokens": 24,  # past the capture of a decode step
        "model.generation.cuda_graphs": "true",
    }
    arguments = [f"--{key}={value}" for key, value in keys.items()]
    assert main(["fit", *arguments, "--trainer.max_steps=2"]) == 0
    checkpoint = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    assert main(["fit", *arguments, "--trainer.max_steps=4", checkpoint]) == 0
    assert main(["predict", *arguments, checkpoint]) == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_export_at_the_end_measures_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_lightning import AlpacaDataModule, LlamaModule, LoRAConfig, Trainer
    from llama_lightning.training import export

    write_small_llama(tmp_path / "base", vocab_size=512)
    write_byte_tokenizer(tmp_path / "base")
    records = [{"instruction": f"q{i}", "output": "ab"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    measure, measured = export._validation_loss, []

    def measuring(trainer: Any, module: LlamaModule, data: Any) -> float | None:
        loss = measure(trainer, module, data)
        measured.append((module.device.type, loss))
        return loss

    monkeypatch.setattr(export, "_validation_loss", measuring)
    module = LlamaModule(str(tmp_path / "base"), lora=LoRAConfig(rank=4))
    data = AlpacaDataModule(
        path=str(tmp_path / "data.json"), base_folder=str(tmp_path / "base"), val_fraction=0.2
    )
    trainer = Trainer(
        max_steps=2,
        accelerator="cuda",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=export.ExportAtEnd(format="hf", output=str(tmp_path / "hf")),
    )
    trainer.fit(module, datamodule=data)
    print(f"devices and losses of the export: {measured}")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert [device for device, _ in measured] == ["cuda", "cuda"]
    assert module.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_the_export_at_the_end_of_two_devices(tmp_path: Path) -> None:
    output = on_two_ranks([*arguments(tmp_path), "--trainer.accelerator=cuda"])
    assert output.count("exported:") == 1


def test_the_model_is_off_the_device_when_the_judge_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_lightning.evaluation import callbacks
    from llama_lightning.training.llama_module import LlamaModule

    write_small_llama(tmp_path / "base", vocab_size=512)
    write_byte_tokenizer(tmp_path / "base")
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    torch.cuda.empty_cache()
    before, seen = torch.cuda.memory_allocated(), {}
    answer, grade = LlamaModule.answer, callbacks.grade_file

    def answering(self: LlamaModule, *given: Any) -> Any:
        seen["while it answers"] = torch.cuda.memory_allocated() - before
        return answer(self, *given)

    def grading(*given: Any) -> Any:
        seen["when the judge starts"] = torch.cuda.memory_allocated() - before
        return grade(*given)

    monkeypatch.setattr(LlamaModule, "answer", answering)
    monkeypatch.setattr(callbacks, "grade_file", grading)
    keys = {
        "model.base_model": tmp_path / "base",
        "data.path": tmp_path / "data.json",
        "data.predict_path": tmp_path / "data.json",
        "trainer.accelerator": "cuda",
        "trainer.devices": 1,
        "trainer.default_root_dir": tmp_path,
        "model.generation.max_new_tokens": 4,
        "judge.backend": "exact",
    }
    assert main(["predict", *(f"--{key}={value}" for key, value in keys.items())]) == 0
    print(f"bytes allocated on the device: {seen}")
    assert seen["while it answers"] > 100_000
    assert seen["when the judge starts"] < 10_000
