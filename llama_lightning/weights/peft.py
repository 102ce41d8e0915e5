"""LoRA as PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.

A key of PEFT is `base_model.model.` and ours.
Source: peft/tuners/lora/config.py.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig


def save_peft(model: Llama, lora: LoRAConfig, folder: Path, *, base_model: str) -> None:
    """Write the two files; PeftModel.from_pretrained loads them onto the base."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
