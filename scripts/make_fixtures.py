#!/usr/bin/env python3
"""Makes golden kits of the phi3 decoder with the reference implementation, and checks the ones
that are there.

    python -m venv venv
    venv/bin/pip install torch==2.9.1 transformers==4.57.1 safetensors==0.8.0 numpy==2.4.6
    venv/bin/python scripts/make_fixtures.py            # writes the kits of KITS
    venv/bin/python scripts/make_fixtures.py --check    # recomputes every golden of every kit

(PyPI's torch for x86-64 brings several GB of CUDA libraries along; a CPU build does as well.)

A kit is a folder of tests/fixtures with a checkpoint of random weights (config.json and
model.safetensors with the hub's names), golden.safetensors and golden.json. All goldens are
float32 on the CPU, by transformers' Phi3ForCausalLM with eager attention. Tensors of a case:

    input_ids [T], logits [T, V]       the prompt, and its prefill
    decode_ids [N+1], decode_logits [N, V]
                                       greedy ids, the first from the last prefill row, and N cached
                                       steps; these never recompute, so across the longrope limit
                                       they mix both rotations
    generate_ids [N+1]                 greedy ids where every step runs the whole sequence again, which
                                       is what recomputing at the longrope limit amounts to
    generate_logits [N+1, V]           the rows that chose them, only where they differ from the above
    hidden_embed, hidden_layer0_attn (before the residual add), hidden_layer0, hidden_layer_last,
    hidden_final_norm [T, H]           intermediates of the prefill
    leftpad.{input_ids, attention_mask, position_ids} [B, T], leftpad.logits [B, T, V]
                                       a left-padded batch; rows of padding are zero
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

TRANSFORMERS = "4.57.1"
FIXTURES = Path(__file__).resolve().parent.parent / "tests/fixtures"

# Greedy ids are compared exactly, so no choice may hang on rounding.
SMALLEST_GAP = 0.02
# Rounding of the reference itself; larger differences mean that the kit is not reproduced.
NOISE = 1e-4

HUB_FIELDS = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "use_cache": True,
}

# A case is (prompt length, decoded ids, whether hidden states are stored).
KITS = {
    "phi3-other": {
        "seed": 1,
        "notes": "head_dim unlike hidden_size / heads, GQA 6/3, half of each head rotated, "
        "a window that is no power of two, an odd vocabulary, theta 25000",
        "config": {
            "hidden_size": 80,
            "intermediate_size": 104,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 48,
            "vocab_size": 257,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 512,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 25000.0,
            "sliding_window": 11,
            "tie_word_embeddings": False,
        },
        "cases": {"below": (5, 4, False), "cross": (7, 9, False), "window": (38, 6, True)},
        "leftpad": (4, 13),
    },
    "phi3-other-longrope": {
        "seed": 2,
        "notes": "longrope and a sliding window at once, an attention_factor of the checkpoint's "
        "own, partial rotary, GQA 4/2, tied embeddings, three layers",
        "config": {
            "hidden_size": 96,
            "intermediate_size": 104,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 263,
            "max_position_embeddings": 384,
            "original_max_position_embeddings": 24,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.05, 1.1, 1.3, 1.6, 2.0],
                "long_factor": [1.1, 1.9, 3.5, 7.0, 13.0, 16.0],
                "attention_factor": 1.25,
            },
            "rope_theta": 10000.0,
            "sliding_window": 9,
            "tie_word_embeddings": True,
        },
        "cases": {
            "short": (12, 5, True),
            "edge": (24, 0, False),
            "edge_plus1": (25, 4, False),
            "long": (40, 5, True),
            "cross": (19, 11, False),
        },
        "leftpad": None,
    },
}


def main():
    parser = argparse.ArgumentParser(description="Make or check the golden kits in tests/fixtures.")
    parser.add_argument("--check", action="store_true", help="recompute the goldens that are there")
    parser.add_argument("--out", type=Path, default=FIXTURES, help="folder of the kits")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        sys.exit(f"transformers {TRANSFORMERS} is the reference, {transformers.__version__} is installed")
    torch.manual_seed(0)
    with torch.inference_mode():
        if arguments.check:
            kits = sorted(path.parent for path in arguments.out.glob("*/golden.safetensors"))
            if not all([check_kit(folder) for folder in kits]) or not kits:
                sys.exit(1)
        else:
            for name, kit in KITS.items():
                make_kit(arguments.out / name, kit)


def make_kit(folder, kit):
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(HUB_FIELDS | kit["config"])
    randomize(model, kit["seed"])
    goldens, cases = {}, {}
    for index, (case, (length, steps, hidden)) in enumerate(kit["cases"].items()):
        tensors, cases[case] = clear_case(model, 100 * kit["seed"] + index, length, steps, hidden)
        goldens |= {f"{case}.{name}": tensor for name, tensor in tensors.items()}
    if kit["leftpad"]:
        prompts = [prompt(model, 900 + length, length) for length in kit["leftpad"]]
        goldens |= {f"leftpad.{name}": t for name, t in left_padded(model, prompts).items()}

    weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(goldens, folder / "golden.safetensors")
    write_json(folder / "config.json", HUB_FIELDS | kit["config"])
    write_json(
        folder / "golden.json",
        {
            "kit": folder.name,
            "source": f"transformers {TRANSFORMERS} Phi3ForCausalLM, attn eager, float32 CPU, "
            f"torch {torch.__version__}, scripts/make_fixtures.py",
            "seed": kit["seed"],
            "notes": kit["notes"],
            "cases": cases,
            "tensors": {k: [str(t.dtype), list(t.shape)] for k, t in sorted(goldens.items())},
        },
    )
    print(f"{folder.name}: {len(goldens)} goldens, {sum(w.size for w in weights.values())} weights")


def clear_case(model, seed, length, steps, hidden):
    """The first random prompt whose greedy choices are all clear."""
    for attempt in range(200):
        ids = prompt(model, 1000 * seed + attempt, length)
        tensors, facts = golden_case(model, ids, steps, hidden)
        if facts["min_top2_margin"] > SMALLEST_GAP:
            return tensors, facts
    sys.exit(f"no prompt of {length} ids leaves a gap above {SMALLEST_GAP}")


def golden_case(model, ids, steps, hidden):
    """Every tensor of one case, and the figures for golden.json."""
    tensors = {"input_ids": ids}
    logits, states = prefill(model, ids)
    tensors["logits"] = logits
    if hidden:
        tensors |= states

    decode_ids, decode_logits = cached_steps(model, ids, steps)
    generate_ids, generate_logits = recomputed_steps(model, ids, steps)
    tensors["decode_ids"] = decode_ids
    if steps:
        tensors |= {"decode_logits": decode_logits, "generate_ids": generate_ids}
    difference = float(np.abs(generate_logits[1:] - decode_logits).max()) if steps else 0.0
    crosses = difference > 1e-3
    if crosses:
        tensors["generate_logits"] = generate_logits
    chosen = np.concatenate([logits[-1:], decode_logits, generate_logits])
    top = np.sort(chosen, axis=1)
    facts = {
        "prompt_len": len(ids),
        "n_decode": steps,
        "min_top2_margin": float((top[:, -1] - top[:, -2]).min()),
        "generate_equals_raw_decode": not crosses,
        "generate_vs_raw_logits_maxabs": difference,
        "logit_std": round(float(logits.std()), 4),
    }
    return tensors, facts


def prefill(model, ids):
    """Logits [T, V] and the named intermediates of one run without a cache."""
    states, layers = {}, model.model.layers

    def keep(name):
        def hook(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            states[name] = output[0].float().numpy().copy()

        return hook

    modules = {
        "hidden_embed": model.model.embed_tokens,
        "hidden_layer0_attn": layers[0].self_attn,
        "hidden_layer0": layers[0],
        "hidden_layer_last": layers[-1],
        "hidden_final_norm": model.model.norm,
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy().copy()
    for handle in handles:
        handle.remove()
    return logits, states


def cached_steps(model, ids, steps):
    """Greedy ids [N+1] and the logits [N, V] of N cached steps of one token."""
    cache = DynamicCache(config=model.config)
    logits = model(torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True).logits[0, -1]
    chosen, rows = [int(logits.argmax())], []
    for step in range(steps):
        position = torch.tensor([len(ids) + step])
        logits = model(
            torch.tensor([[chosen[-1]]]),
            past_key_values=cache,
            position_ids=position[None],
            cache_position=position,
            use_cache=True,
        ).logits[0, -1]
        rows.append(logits.numpy().copy())
        chosen.append(int(logits.argmax()))
    vocab = model.config.vocab_size
    return np.array(chosen, np.int64), np.array(rows, np.float32).reshape(steps, vocab)


def recomputed_steps(model, ids, steps):
    """Greedy ids [N+1] and the rows [N+1, V] that chose them, without any cache."""
    chosen, rows = [], []
    for _ in range(steps + 1):
        sequence = np.concatenate([ids, np.array(chosen, np.int64)])
        rows.append(prefill(model, sequence)[0][-1])
        chosen.append(int(rows[-1].argmax()))
    return np.array(chosen, np.int64), np.array(rows)


def left_padded(model, prompts):
    """The tensors of a batch that is padded on the left."""
    width, pad = max(map(len, prompts)), 0
    ids = np.array([[pad] * (width - len(p)) + list(p) for p in prompts], np.int64)
    mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts], np.int64)
    return padded_logits(model, ids, mask)


def padded_logits(model, ids, mask):
    positions = mask.cumsum(1) - 1
    positions[mask == 0] = 1
    logits = model(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        use_cache=False,
    ).logits.numpy()
    logits = np.where(mask[:, :, None] == 1, logits, np.float32(0))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits": logits}


def check_kit(folder):
    """Recomputes the goldens of a folder and prints the largest difference of each name."""
    config = json.loads((folder / "config.json").read_text())
    model = build_model(config)
    weights = {k: torch.from_numpy(v).float() for k, v in load_weights(folder).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    if missing or unexpected:
        sys.exit(f"{folder.name}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")

    goldens = load_file(folder / "golden.safetensors")
    worst, equal = {}, True
    for case in sorted({name.split(".")[0] for name in goldens}):
        stored = {n.removeprefix(f"{case}."): t for n, t in goldens.items() if n.startswith(f"{case}.")}
        if case == "leftpad":
            found = padded_logits(model, stored["input_ids"], stored["attention_mask"])
        else:
            steps = len(stored.get("decode_ids", [0])) - 1
            found, _ = golden_case(model, stored["input_ids"], steps, hidden=True)
        for name, golden in stored.items():
            if name not in found:
                print(f"  {folder.name}: {case}.{name} is not made by this script")
            elif golden.dtype.kind == "f":
                worst[name] = max(worst.get(name, 0.0), float(np.abs(found[name] - golden).max(initial=0)))
            elif not np.array_equal(found[name], golden):
                print(f"  {folder.name}: {case}.{name} differs")
                equal = False
    print(f"{folder.name}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    return equal and all(value <= NOISE for value in worst.values())


def load_weights(folder):
    # numpy has no bfloat16; torch's reader does.
    from safetensors.torch import load_file as load_torch

    return {k: v.float().numpy() for k, v in load_torch(folder / "model.safetensors").items()}


def build_model(fields):
    """Phi3ForCausalLM in float32 with eager attention, of a config.json with the hub's fields."""
    fields = {k: v for k, v in fields.items() if k not in ("auto_map", "_name_or_path", "torch_dtype")}
    scaling = fields.pop("rope_scaling")
    vocab, (pad, eos) = fields["vocab_size"], (fields.pop("pad_token_id"), fields.pop("eos_token_id"))
    # The hub's ids lie beyond a tiny vocabulary; they play no part in the logits.
    config = Phi3Config(**fields, pad_token_id=min(pad, vocab - 1), eos_token_id=min(eos, vocab - 1))
    # Set past the config class, which refuses the attention_factor that its rope reads.
    config.rope_scaling = scaling and scaling | {"rope_type": "longrope"}
    config._attn_implementation = "eager"
    return Phi3ForCausalLM(config).float().eval()


def randomize(model, seed):
    """Weights for which activations and logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(1 + 0.1 * noise)
        else:
            # Rows of a tied embedding are also the head's.
            embedding = "embed_tokens" in name and not model.config.tie_word_embeddings
            weight.copy_(noise if embedding else noise / weight.shape[1] ** 0.5)


def prompt(model, seed, length):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length, dtype=np.int64)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
