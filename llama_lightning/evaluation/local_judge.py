"""A judge model that answers lines of JSON, in a process of its own (see prometheus.py).

    python -m llama_lightning.evaluation.local_judge FOLDER DTYPE BATCH_SIZE

The one file under evaluation/ that knows the network. It ends with its input.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from llama_lightning.errors import JudgeError, UserError
from llama_lightning.model.generate import generate
from llama_lightning.model.llama import Llama
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import PromptBatch
from llama_lightning.weights.huggingface import load_huggingface, read_config

GIB = 2**30
GATHER_S = 0.05  # how long a batch waits for its next request
PARAMETERS = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed")

Request = dict[str, Any]


def quantise_nf4(model: Llama) -> None:
    """Keep the matrices of the blocks in 4 bits each; they are packed when they are moved."""
    # At its import it misses a faster kernel for the CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            weight = linear.weight.detach()
            packed = Linear4bit(  # type: ignore[no-untyped-call]
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
            block.set_submodule(name, packed)


class JudgeModel:
    """A network and its tokenizer, text in and text out.

    Args:
        folder: config.json, safetensors and tokenizer.json.
        dtype: bfloat16, float32 or nf4.

    Raises:
        UserError: files that cannot be used.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.config = read_config(folder)
        ids: dict[str, Any] = {}
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                ids |= json.loads((folder / name).read_text(encoding="utf-8"))
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the class has no other
            raise JudgeError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Where they are not given, the values that transformers has for Llama and Mistral.
        self.bos: int = ids.get("bos_token_id") or 1
        stops = ids.get("eos_token_id") or 2
        self.stops: list[int] = stops if isinstance(stops, list) else [stops]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = torch.float32 if dtype == "float32" else torch.bfloat16
        model = load_huggingface(folder, self.config, dtype=stored)
        if dtype == "nf4":
            quantise_nf4(model)
        self.model = model.to(self.device).eval()

    def encode(self, text: str) -> list[int]:
        """Encode a prompt, its beginning token included."""
        whole = text.encode(errors="replace").decode()  # half a surrogate pair is no text
        return [self.bos, *self.tokenizer.encode(whole, add_special_tokens=False).ids]

    def replies(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
        """Generate replies to requests with equal parameters, each as soon as it is finished."""
        prompts, rows = [], {}
        for request in requests:
            prompt = self.encode(request["text"])
            needed = len(prompt) + request["max_new_tokens"]
            if needed > self.config.max_position_embeddings:
                longest = self.config.max_position_embeddings
                said = f"may need {needed} tokens, and the model takes {longest}"
                yield {"number": request["number"], "too_long": said}
                continue
            prompts.append(torch.tensor(prompt))
            rows[request["row"]] = request["number"]
        if not prompts:
            return
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        batch = PromptBatch(
            tokens=torch.cat(prompts).to(self.device),
            boundaries=F.pad(lengths.cumsum(0), (1, 0)).to(self.device),
            row_ids=torch.tensor(list(rows), device=self.device),
            stop_ids=torch.tensor([self.stops] * len(prompts), device=self.device),
        )
        config = GenerationConfig(**{name: requests[0][name] for name in PARAMETERS})
        for generation in generate(self.model, batch, config):
            yield {
                "number": rows[generation.row_id],
                "text": self.tokenizer.decode(generation.tokens),
                "truncated": generation.finish_reason == "length",
            }


def next_batch(
    requests: "queue.SimpleQueue[Request]", waiting: list[Request], size: int
) -> list[Request]:
    """Wait for requests and take those with the first one's parameters out of `waiting`."""
    if not waiting:
        waiting.append(requests.get())
    while len(waiting) < size:
        try:
            waiting.append(requests.get(timeout=GATHER_S))
        except queue.Empty:
            break
    alike = [r for r in waiting if all(r[name] == waiting[0][name] for name in PARAMETERS)][:size]
    for request in alike:
        waiting.remove(request)
    return alike


def memory_sentence(error: Exception) -> str | None:
    """Say who holds the memory, if that is what the error is about."""
    cure = (
        "set judge.dtype nf4 (about 5 GB for 7 billion weights) or judge.concurrency 1, or take "
        "judge.backend ollama"
    )
    if isinstance(error, torch.OutOfMemoryError):
        free, total = (count / GIB for count in torch.cuda.mem_get_info())
        own = torch.cuda.memory_reserved() / GIB
        return (
            f"the GPU's {total:.1f} GiB are full: the judge holds {own:.1f}, other processes "
            f"{total - free - own:.1f} (`nvidia-smi` names them); {cure}"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"this machine's memory is full; {cure}"
    return None


def main() -> None:
    """Load, then answer until the input ends."""
    # Libraries print too, some of them from below Python: only `answers` leads to who asks.
    answers, sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8"), sys.stderr
    os.dup2(2, 1)
    folder, dtype, size = sys.argv[1:]
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def read(lines: TextIO) -> None:
        for line in lines:
            requests.put(json.loads(line))
        os._exit(0)  # whoever asked is gone, in the middle of a reply perhaps

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    threading.Thread(target=read, args=(sys.stdin,), daemon=True).start()
    start = time.monotonic()
    try:
        model = JudgeModel(Path(folder), dtype)
        send({"said": f"loaded on {model.device.type} in {time.monotonic() - start:.0f} s"})
        waiting: list[Request] = []
        while True:
            for reply in model.replies(next_batch(requests, waiting, int(size))):
                send(reply)
    except UserError as error:
        send({"refused": str(error)})
    except (RuntimeError, MemoryError) as error:
        said = memory_sentence(error)
        if said is None:
            raise
        send({"failed": said})


if __name__ == "__main__":
    main()
