"""A Llama as a GGUF file for llama.cpp, and the Modelfile with which Ollama serves it.

llama.cpp turns neighbouring elements of q and k against each other, Hugging Face's layout the two
halves of a head: the rows are put in another order. It scales positions by a tensor of divisors.
Source: github.com/ggml-org/llama.cpp, conversion of Llama in convert_hf_to_gguf.py; docs/modelfile
of ollama.
Letters: N heads, H head dimension, I inputs.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llama_lightning.errors import UsageError
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama
from llama_lightning.model.rope import inverse_frequencies
from llama_lightning.weights.new_folder import ORIGIN

FileType = Literal["float32", "float16", "bfloat16", "q8_0"]
# What GGUF calls the type of a tensor, and of a whole file.
GGUF_TYPES: dict[FileType, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
CONTROL, NORMAL, UNUSED = 3, 1, 5  # llama.cpp's types of tokens


def check_gguf_package() -> None:
    """Find out early that the package is missing.

    Raises:
        UsageError: it is.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("format gguf needs the package gguf: pip install -e '.[gguf]'")


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Bring the rows of each head, (N * H, ...), from 0 1 2 ... to 0, H/2, 1, H/2 + 1 ..."""
    halves = rows.view(heads, 2, -1, *rows.shape[1:])  # (N, 2, H / 2, ...)
    return halves.transpose(1, 2).reshape(rows.shape)


def _tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's name and fp32 values, one by one; a tied head is not there."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if config.rope_scaling is not None:
        plain = inverse_frequencies(replace(config, rope_scaling=None), torch.device("cpu"))
        scaled = inverse_frequencies(config, torch.device("cpu"))
        yield "rope_freqs.weight", plain / scaled
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().cpu()
        if ".q_proj." in name:
            weight = interleave(weight, config.num_attention_heads)
        elif ".k_proj." in name:
            weight = interleave(weight, config.num_key_value_heads)
        yield str(names.get_name(name, try_suffixes=(".weight", ".bias"))), weight


def _add_shape(writer: Any, config: LlamaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, files: Mapping[str, str], size: int) -> None:
    raw = json.loads(files["tokenizer.json"])
    config = json.loads(files["tokenizer_config.json"])
    special = {token["content"]: int(token["id"]) for token in raw["added_tokens"]}
    # The embedding may have rows for which there is no token.
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for ids, kind in ((raw["model"]["vocab"], NORMAL), (special, CONTROL)):
        for text, token in ids.items():
            tokens[token], types[token] = text, kind
    merges = (m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # how text is cut into pieces, as the Llama 3 pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(special[config["bos_token"]])
    writer.add_eos_token_id(special[config["eos_token"]])
    if "<|eot_id|>" in special:
        writer.add_eot_token_id(special["<|eot_id|>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template(config["chat_template"])


def _modelfile(file: str, template: str, stops: Sequence[str]) -> str:
    lines = [
        ORIGIN["Modelfile"],
        f"FROM ./{file}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def save_gguf(
    model: Llama,
    folder: Path,
    *,
    file_type: FileType,
    files: Mapping[str, str],
    template: str,
    stops: Sequence[str],
    name: str,
) -> None:
    """Write a GGUF file, tensor by tensor, and the Modelfile.

    Vectors stay fp32, as do matrices whose rows a quantised block does not divide.

    Args:
        model: without LoRA.
        folder: where model-f16.gguf (or f32, bf16, q8_0) and Modelfile go.
        file_type: type of the matrices.
        files: tokenizer.json and tokenizer_config.json, the chat template in it.
        template: Ollama's, from .Prompt to the prompt.
        stops: the text of each token that ends a response.
        name: of the model, for people.
    """
    import gguf

    matrix_type, whole_type = GGUF_TYPES[file_type]

    def stored_type(shape: Sequence[int]) -> Any:
        kind = gguf.GGMLQuantizationType[matrix_type]
        fits = len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        return kind if fits else gguf.GGMLQuantizationType.F32

    path = folder / f"model-{matrix_type.lower()}.gguf"
    written = _modelfile(path.name, template, stops)
    (folder / "Modelfile").write_text(written, encoding="utf-8")
    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[whole_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config)
        _add_tokenizer(writer, files, model.config.vocab_size)
        for tensor_name, tensor in _tensors(model):
            kind = stored_type(tensor.shape)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = tensor.numel() // block * block_bytes
            writer.add_tensor_info(tensor_name, tensor.shape, np.dtype("f4"), num_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model):
            array = tensor.contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(array, stored_type(array.shape)))
    finally:
        writer.close()
