#!/usr/bin/env python3
"""Turns the demo's GGUF into a Hugging Face folder of model_type phi3.

    python3 scripts/convert_smollm2.py FILE.gguf FOLDER [--dtype f32|f16|bf16]

SmolLM2's Llama layers are Phi-3 layers once q, k, v and gate, up are fused: no number changes
beyond dequantizing and rounding to the dtype. Writes config.json, generation_config.json,
model.safetensors, tokenizer.json and tokenizer_config.json, which holds the chat template. FOLDER
appears only when all of it is written. Needs the packages of scripts/demo-requirements.txt.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors import serialize

TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

# token_type of GGUF vocabularies.
NORMAL, CONTROL = 1, 3


def main():
    parser = argparse.ArgumentParser(description="GGUF (llama) to a Hugging Face folder (phi3).")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=TORCH_NAMES, default="f16")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists; remove it to convert again")

    reader = GGUFReader(arguments.gguf)
    metadata = Metadata(reader)
    metadata.require("general.architecture", "llama")
    metadata.require("tokenizer.ggml.model", "gpt2")
    metadata.require("tokenizer.ggml.pre", "smollm")

    partial = arguments.folder.with_name(arguments.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: encode(tensor, arguments.dtype) for name, tensor in phi3_tensors(reader, metadata)}
    (partial / "model.safetensors").write_bytes(serialize(weights, {"format": "pt"}))
    write_json(partial / "config.json", config(metadata, arguments.dtype))
    write_json(partial / "generation_config.json", generation_config(metadata))
    write_json(partial / "tokenizer.json", tokenizer(metadata))
    write_json(partial / "tokenizer_config.json", tokenizer_config(metadata))
    partial.rename(arguments.folder)
    print(arguments.folder)


class Metadata:
    """Keys of the file, those of the architecture without its prefix."""

    def __init__(self, reader):
        self.fields = reader.fields

    def __getitem__(self, key):
        field = self.fields.get(key) or self.fields.get(f"llama.{key}")
        if field is None:
            sys.exit(f"the file has no metadata key {key}")
        return field.contents()

    def require(self, key, value):
        if self[key] != value:
            sys.exit(f"{key} is {self[key]!r}; this script converts only {value!r}")


def phi3_tensors(reader, metadata):
    """Each tensor of the Phi-3 checkpoint, by name, in float32."""
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def take(name):
        tensor = stored.pop(name, None)
        if tensor is None:
            sys.exit(f"the file has no tensor {name}")
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    heads, kv_heads = metadata["attention.head_count"], metadata["attention.head_count_kv"]
    yield "model.embed_tokens.weight", take("token_embd.weight")
    for layer in range(metadata["block_count"]):
        there, here = f"blk.{layer}", f"model.layers.{layer}"
        q = split_halves(take(f"{there}.attn_q.weight"), heads)
        k = split_halves(take(f"{there}.attn_k.weight"), kv_heads)
        v = take(f"{there}.attn_v.weight")
        gate, up = take(f"{there}.ffn_gate.weight"), take(f"{there}.ffn_up.weight")
        yield f"{here}.input_layernorm.weight", take(f"{there}.attn_norm.weight")
        yield f"{here}.self_attn.qkv_proj.weight", np.concatenate([q, k, v])
        yield f"{here}.self_attn.o_proj.weight", take(f"{there}.attn_output.weight")
        yield f"{here}.post_attention_layernorm.weight", take(f"{there}.ffn_norm.weight")
        yield f"{here}.mlp.gate_up_proj.weight", np.concatenate([gate, up])
        yield f"{here}.mlp.down_proj.weight", take(f"{there}.ffn_down.weight")
    yield "model.norm.weight", take("output_norm.weight")
    if stored:
        sys.exit(f"the file has tensors that a Phi-3 model has no place for: {sorted(stored)}")


def split_halves(weight, heads):
    """Rows of a projection, rotary pairs apart by half a head instead of side by side.

    GGUF files of this architecture keep row 2j and 2j + 1 of a head as the pair j of its rotation;
    Phi-3 pairs rows j and j + d/2.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # [h, d/2, 2, H]
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def encode(tensor, dtype):
    """The tensor as the safetensors package takes it."""
    if dtype == "f32":
        rounded = tensor
    elif dtype == "f16":
        rounded = tensor.astype(np.float16)
        if not np.isfinite(rounded).all():
            sys.exit("a weight is beyond the range of f16; use --dtype bf16 or f32")
    else:
        # numpy has no bf16: the upper half of the f32, rounded to nearest even.
        bits = tensor.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    data = np.ascontiguousarray(rounded).tobytes()
    return {"dtype": TORCH_NAMES[dtype], "shape": list(tensor.shape), "data": data}


def config(metadata, dtype):
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": metadata["embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["feed_forward_length"],
        "max_position_embeddings": metadata["context_length"],
        "original_max_position_embeddings": metadata["context_length"],
        "num_attention_heads": metadata["attention.head_count"],
        "num_hidden_layers": metadata["block_count"],
        "num_key_value_heads": metadata["attention.head_count_kv"],
        "partial_rotary_factor": 1.0,
        # Stored as f32: the shortest decimal of that f32 is the number that was meant.
        "rms_norm_eps": float(str(np.float32(metadata["attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": float(metadata["rope.freq_base"]),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": metadata["vocab_size"],
    }


def generation_config(metadata):
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "do_sample": False,
    }


def special_tokens(metadata):
    """Id and fields of every special token, in the form that both tokenizer files use."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if unknown := set(types) - {NORMAL, CONTROL}:
        sys.exit(f"tokens of types {sorted(unknown)} are not known to this script")
    return {i: {"content": tokens[i]} | flags for i, kind in enumerate(types) if kind == CONTROL}


def tokenizer(metadata):
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | token for i, token in special_tokens(metadata).items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                # What tells `smollm` from GPT-2: every digit is a word of its own.
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos, unknown, pad = (
        tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")
    )
    return {
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        "added_tokens_decoder": {str(i): token for i, token in special_tokens(metadata).items()},
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": metadata["context_length"],
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
    }


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
