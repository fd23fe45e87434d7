#!/usr/bin/env python3
"""Checks that llama.cpp reads the GGUF files that `phi3 quantize` writes, and gives the same logits.

    python3 -m venv .demo/llama && .demo/llama/bin/pip install llama-cpp-python==0.3.36 numpy
    .demo/llama/bin/python scripts/check_llama_cpp.py [--phi3 PROGRAM] [--type TYPE ...]

Each model is quantized, then both programs compute the logits of the same token ids. The trained
one (scripts/demo.sh fetches and converts it) is also tokenized by both. The tiny ones have random
weights: short and long rope, grouped queries, partial rotation, a tied head.

llama.cpp keeps keys and values in half precision and rounds activations to 8 bits before products
with quantized weights, so that logits agree to the tolerances below and not exactly. It switches
Phi-3's sliding window off: what is run here is shorter. It chooses rope factors by the size of the
context, at least 256, instead of the length of the text: the tiny models with factors run a text
that is long for them. (Their short factors are checked by tests/tests/gguf_models.rs.)

Of Phi-3.5-MoE llama.cpp computes another model: it normalizes by RMSNorm where the reference has
LayerNorm, and weighs the two experts by their softmax scaled to a sum of 1, where SparseMixer's weights
mostly are 1 each. The logits of a file as published therefore cannot agree; how far they are apart is
printed, and nothing is asked of it. Agreement is asked of variants of the tiny model in which both are
the same: what is added to the residual stream is antisymmetric, so that its mean is 0 and both norms are
one; the factors on rope's sines are those of LongRoPE's formula, the only ones that llama.cpp's
key can tell for both lengths; and either one expert per token and no jitter (SparseMixer's weight is then 1, and so is the
other), which tells whether the same one of 16 experts is chosen, or two experts in all and the plain
router (`router_type` `topk_softmax`: both weigh by the softmax over two).
"""

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / ".demo" / "SmolLM2-135M-Instruct-f16"
TINY = ["phi3-mini-4k", "phi3-medium-4k", "phi3-mini-128k-longrope", "phi4-mini"]
MOE = "phi3.5-moe"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_0",
         "Q5_1", "IQ4_NL", "Q3_K_M", "Q2_K"]
TEXT = ("<|im_start|>user\nName three rivers of Europe, and 2 of Asia.<|im_end|>\n"
        "<|im_start|>assistant\nThe Danube, the Rhine and the Volga; the Yangtze & the Mekong. "
        "Caf\u00e9, na\u00efve, 1234567, \u65e5\u672c\u8a9e, \U0001f600!\n\n\tdef f(x):\n\t    return x**2")
FLOAT = {"F32", "F16", "BF16"}
# By how llama.cpp rounds activations before products with such weights (f16 counts as not at all):
# the largest difference of two logits over their standard deviation, and the mean divergence of its
# distribution of the next token from ours. Measured on the trained model: 0.005 and 3e-6 (F16),
# 0.08 and 1.4e-4 (BF16), up to 0.33 and 0.011 (quantized types).
TOLERANCE = {"none": (0.02, 1e-4), "bf16": (0.1, 5e-4), "8 bits": (0.6, 0.03)}


def rounding(kind):
    return {"F32": "none", "F16": "none", "BF16": "bf16"}.get(kind, "8 bits")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--phi3", default=str(ROOT / "target" / "release" / "phi3"))
    parser.add_argument("--type", nargs="+", default=TYPES)
    args = parser.parse_args()
    try:
        import llama_cpp  # noqa: F401
        import numpy  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: install llama-cpp-python and numpy as the head of this script says")
    failed = 0
    print(f"{'model':<28} {'type':<8} {'ids':>4} {'largest':>9} {'mean KL':>9} {'same top':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        for folder, types in models(args.type, Path(scratch)):
            for kind in types:
                failed += check(args.phi3, folder, kind, Path(scratch))
    if failed:
        sys.exit(f"{failed} comparisons failed")


def models(types, scratch):
    if (TRAINED / "config.json").exists():
        yield TRAINED, types
    else:
        print("no trained model here: scripts/demo.sh fetches it")
    for name in TINY:
        # Rows of the tiny ones are short; what falls back to another type is of no interest here.
        yield ROOT / "tests" / "fixtures" / name, [kind for kind in types if kind in FLOAT | {"Q8_0"}]
    for name, experts, changes in MIXTURES:
        folder = scratch / name
        mixture(folder, experts, changes)
        yield folder, [kind for kind in types if kind in FLOAT | {"Q8_0"}]


# Variants of the tiny mixture: name, its first so many experts, changes to its config. All but the
# published one get an antisymmetric residual stream.
OTHER_RULE = MOE + ", as published"
MIXTURES = [
    (MOE + ", one per token", 16, {"num_experts_per_tok": 1, "router_jitter_noise": 0.0}),
    (MOE + ", two of two", 2, {"num_local_experts": 2, "router_type": "topk_softmax"}),
    (OTHER_RULE, 16, {}),
]


def mixture(folder, experts, changes):
    """Writes the fixture with changes to `folder`."""
    import numpy as np

    fixture = ROOT / "tests" / "fixtures" / MOE
    folder.mkdir()
    config = json.loads((fixture / "config.json").read_text())
    if folder.name != OTHER_RULE:
        rope = config["rope_scaling"]
        stretch = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        factor = (1 + math.log(stretch) / math.log(rope["original_max_position_embeddings"])) ** 0.5
        config["rope_scaling"] = rope | {"short_mscale": factor, "long_mscale": factor}
    (folder / "config.json").write_text(json.dumps(config | changes))
    data = (fixture / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body, out = json.loads(data[8 : 8 + size]), data[8 + size :], b""
    kept = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        number = name.partition(".experts.")[2].partition(".")[0]
        if number and int(number) >= experts:
            continue
        start, end = tensor["data_offsets"]
        shape = tensor["shape"]
        values = np.frombuffer(body[start:end], dtype="<f4").reshape(shape)
        if name.endswith("block_sparse_moe.gate.weight"):
            values = values[:experts]
        elif folder.name != OTHER_RULE:
            values = antisymmetric(name, values)
        shape, values = list(values.shape), values.tobytes()
        offsets = [len(out), len(out) + len(values)]
        kept[name] = {"dtype": tensor["dtype"], "shape": shape, "data_offsets": offsets}
        out += values
    head = json.dumps(kept).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + out)


def antisymmetric(name, values):
    """What writes to the residual stream, with the second half of its outputs minus the first."""
    import numpy as np

    axis = 0 if name.endswith(("o_proj.weight", "o_proj.bias", ".w2.weight")) else None
    axis = 1 if name.endswith("embed_tokens.weight") else axis
    if axis is None:
        return values
    half = np.split(values, 2, axis=axis)[0]
    return np.concatenate([half, -half], axis=axis)


def check(phi3, folder, kind, scratch):
    import numpy as np

    path = scratch / f"{folder.name}-{kind}.gguf"
    run(phi3, "quantize", folder, path, "--type", kind)
    config = json.loads((folder / "config.json").read_text())
    trained = folder == TRAINED
    llama = open_llama(path, 512 if trained else 256)
    problems = []
    if trained:
        ids = llama.tokenize(TEXT.encode(), add_bos=False, special=True)
        ours = tokenize(phi3, path)
        if ids != ours:
            problems.append(f"ids differ: {ids} and ours {ours}")
    else:
        ids = [(7 * i + 3) % config["vocab_size"] for i in range(length(config))]
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)], dtype=np.float64)
    ours = our_logits(phi3, path, ids, scratch).astype(np.float64)
    largest = np.abs(ours - theirs).max() / theirs.std()
    p, q = log_softmax(ours), log_softmax(theirs)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    top = float((p.argmax(-1) == q.argmax(-1)).mean())
    largest_allowed, kl_allowed = TOLERANCE[rounding(kind)]
    if folder.name == OTHER_RULE:
        print(f"{folder.name:<28} {kind:<8} {len(ids):>4} {largest:>9.5f} {kl:>9.2e} {top:>9.3f}"
              "    another model there: nothing is asked")
        llama.close()
        path.unlink()
        return 0
    if not largest <= largest_allowed:
        problems.append(f"largest difference {largest:.4f}, expected at most {largest_allowed}")
    if not kl <= kl_allowed:
        problems.append(f"mean KL {kl:.2e}, expected at most {kl_allowed}")
    print(f"{folder.name:<28} {kind:<8} {len(ids):>4} {largest:>9.5f} {kl:>9.2e} {top:>9.3f}"
          + "".join(f"\n    FAILED: {problem}" for problem in problems))
    llama.close()
    path.unlink()
    return len(problems)


def length(config):
    """Tokens that use the long rope factors, if there are any."""
    return config["original_max_position_embeddings"] + 8 if config.get("rope_scaling") else 24


def open_llama(path, n_ctx):
    import llama_cpp

    return llama_cpp.Llama(model_path=str(path), n_ctx=n_ctx, n_batch=n_ctx, n_threads=2,
                           logits_all=True, verbose=False)


def tokenize(phi3, path):
    return json.loads(run(phi3, "tokenize", "--model", path, "--json", "--prompt", TEXT))


def our_logits(phi3, path, ids, scratch):
    import numpy as np

    given, out = scratch / "ids.json", scratch / "logits.safetensors"
    given.write_text(json.dumps(ids))
    run(phi3, "logits", "--model", path, "--ids", given, "--out", out, "--device", "cpu")
    data = out.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])["logits"]
    start, end = header["data_offsets"]
    values = np.frombuffer(data[8 + size + start : 8 + size + end], dtype="<f4")
    return values.reshape(header["shape"])


def log_softmax(logits):
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def run(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
