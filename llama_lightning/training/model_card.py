"""The model card, README.md: what a folder holds, what it was made of, and what was measured.

The head is what the hub reads.
Source: huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_lightning.weights.new_folder import ORIGIN

LOADED_BY = {
    "peft": "PeftModel.from_pretrained(base, FOLDER)",
    "hf": "AutoModelForCausalLM.from_pretrained(FOLDER)",
}


def _lines(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List nested settings, a line each, under their dotted keys."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            lines.append(f"| `{prefix}{key}` | {value} |")
    return lines


def model_card(
    format: str,
    *,
    base_model: str,
    settings: Mapping[str, Any],
    measured: Mapping[str, str],
) -> str:
    """Write a card.

    Args:
        format: "peft" or "hf".
        base_model: a hub name or a folder.
        settings: keys of the run and their values; nested ones get dotted keys.
        measured: what was measured, and the figure.
    """
    library = {"peft": "peft", "hf": "transformers"}[format]
    what = {
        "peft": f"A LoRA adapter in PEFT's format for {base_model}",
        "hf": f"Weights in Hugging Face format, fine-tuned from {base_model}",
    }[format]
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if base_model.count("/") == 1 and not Path(base_model).exists():
        head.append(f"base_model: {base_model}")
    head += [ORIGIN["README.md"], "---"]
    return "\n".join(
        [
            *head,
            f"\n# {base_model.rpartition('/')[2]}, fine-tuned\n",
            f"{what}, made by llama_lightning. `{LOADED_BY[format]}` loads it.\n",
            "## Measured\n",
            "| what | value |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in measured.items()),
            "\n## Trained with\n",
            "| key | value |\n|---|---|",
            *_lines(settings),
            "",
        ]
    )
