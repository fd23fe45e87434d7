#!/usr/bin/env python3
"""Measures the image tower of Phi-3.5-vision beside transformers, and the time to the first token.

    cargo build --release --workspace --examples
    python3 scripts/bench_vision.py --crops 5 --rounds 3 --threads 2

Makes a tower of the real size (CLIP ViT-L/14-336) with random weights, rounded to bf16 as in the real
checkpoint, and sends the same random crops through it here and in transformers' CLIPVisionModel on
torch, f32 on the CPU with the same number of threads, one after the other, round by round. Compares the
features (hidden_states[-2] without the class token): prints a Markdown table of medians, the ratio and
the largest difference over the features' deviation. torch runs twice: as the reference does, with the
last layer that nobody reads, and without it.

--first-token adds, from images to the first token with a decoder of phi-3-mini's shape in random
Q4_0 weights: 1 image in 4 and 16 crops, 4 images in 4 crops, with peak memory.

Needs the PyPI packages torch, transformers and numpy (measured with 2.15.0, 5.24.0, 2.4.6).
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "model.vision_embed_tokens."
TOWER = PREFIX + "img_processor.vision_model."
HIDDEN, WIDTH, LAYERS, HEADS, INNER = 3072, 1024, 24, 16, 4096
PIXELS = 3 * 336 * 336


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.first_token_only:
        tower(args)
    if args.first_token or args.first_token_only:
        first_token(args)


def tower(args):
    import torch

    torch.set_num_threads(args.threads)
    model = make(args)
    generator = torch.Generator().manual_seed(2)
    crops = torch.randn(args.crops, 3, 336, 336, generator=generator)
    (args.work / "crops.f32").write_bytes(crops.numpy().tobytes())
    ours, theirs, shorter = [], [], []
    for _ in range(args.rounds):
        run = json.loads(speed(args, ["--crops", args.work / "crops.f32", "--out", args.work / "features.f32"]))
        ours.append(run["tower_seconds"] / args.crops)
        seconds, expected = torch_features(model, crops, LAYERS)
        theirs.append(seconds / args.crops)
        seconds, _ = torch_features(model, crops, LAYERS - 1)
        shorter.append(seconds / args.crops)
    found = torch.frombuffer(bytearray((args.work / "features.f32").read_bytes()), dtype=torch.float32)
    found = found.reshape(expected.shape)
    difference = ((found - expected).abs().max() / expected.std()).item()
    median = statistics.median
    print(f"{processor()}, {args.threads} threads, {datetime.date.today()}, torch {torch.__version__}, ", end="")
    print(f"{args.crops} crops together, medians of {args.rounds} rounds\n")
    print("| tower | s per crop | phi3 is faster by |\n| --- | --- | --- |")
    print(f"| phi3 | {median(ours):.3f} | |")
    print(f"| transformers, as the reference runs it | {median(theirs):.3f} | {median(theirs) / median(ours):.2f} |")
    print(f"| transformers without the last layer | {median(shorter):.3f} | {median(shorter) / median(ours):.2f} |")
    print(f"\nlargest difference {difference:.1e} of the features' deviation ({expected.std():.2f}); ", end="")
    print(f"peak memory of phi3 {run['peak_memory_bytes'] / 1e6:.0f} MB\n")
    if difference > 1e-3:
        sys.exit("the features differ")


def make(args):
    """The tower, and its checkpoint in --work."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(1)
    model = CLIPVisionModel(config).eval()
    random = lambda *shape: torch.randn(*shape) * shape[-1] ** -0.5
    tensors = {
        "glb_GN": random(1, 1, 4 * WIDTH),
        "sub_GN": random(1, 1, 1, 4 * WIDTH),
        "img_projection.0.weight": random(HIDDEN, 4 * WIDTH),
        "img_projection.0.bias": torch.zeros(HIDDEN),
        "img_projection.2.weight": random(HIDDEN, HIDDEN),
        "img_projection.2.bias": torch.zeros(HIDDEN),
    }
    tensors = {PREFIX + name: tensor.bfloat16() for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Biases and norms are constants at first; here none may be left out unnoticed.
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            tensor.copy_(tensor.bfloat16())
            tensors[TOWER + name.removeprefix("vision_model.")] = tensor.bfloat16()
    write_safetensors(args.work / "model.safetensors", tensors)
    (args.work / "config.json").write_text(json.dumps(decoder_config()))
    return model


def write_safetensors(path, tensors):
    import torch

    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(torch.int16).numpy().tobytes())


def decoder_config():
    factors = [1 + i / 10 for i in range(48)]
    return {
        "model_type": "phi3_v",
        "hidden_size": HIDDEN,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors},
    }


def torch_features(model, crops, layers):
    import torch

    encoder = getattr(model, "vision_model", model).encoder
    kept = encoder.layers
    encoder.layers = kept[:layers]
    with torch.inference_mode():
        start = time.perf_counter()
        states = model(crops, output_hidden_states=True).hidden_states
        seconds = time.perf_counter() - start
    encoder.layers = kept
    return seconds, states[LAYERS - 1][:, 1:]


def speed(args, more):
    command = [args.binary, "--model", args.work, "--decoder", args.work / "decoder.gguf", "--repeat", "1"]
    environment = os.environ | {"PHI3_THREADS": str(args.threads)}
    done = subprocess.run(list(map(str, command + more)), env=environment, check=True, stdout=subprocess.PIPE)
    return done.stdout


def first_token(args):
    print("| images | crops with global views | prompt tokens | pixels s | tower s | decoder s | first token s | peak memory GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for images, crops in [(1, 4), (1, 16), (4, 4)]:
        if args.only and args.only != f"{images}x{crops}":
            continue
        run = json.loads(speed(args, ["--images", images, "--per-image", crops]))
        print(f"| {images} of {crops} | {run['crops']} | {run['prompt_tokens']} | {run['pixels_seconds']:.2f} ", end="")
        print(f"| {run['tower_and_projection_seconds']:.1f} | {run['decoder_seconds']:.1f} ", end="")
        print(f"| {run['first_token_seconds']:.1f} | {run['peak_memory_bytes'] / 1e9:.2f} |", flush=True)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "bench-vision")
    parser.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "examples" / "vision-speed")
    parser.add_argument("--crops", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--first-token", action="store_true")
    parser.add_argument("--first-token-only", action="store_true", help="after a run that made the tower")
    parser.add_argument("--only", help="one of the lines: 1x4, 1x16 or 4x4")
    return parser.parse_args()


if __name__ == "__main__":
    main()
