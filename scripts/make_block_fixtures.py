#!/usr/bin/env python3
"""Makes the fixtures of phi3-kernels' block formats, decoded by the gguf package, and INT4 by numpy.

    python -m venv venv && venv/bin/pip install gguf==0.19.0 numpy==2.4.6
    venv/bin/python scripts/make_block_fixtures.py

One file a type in crates/phi3-kernels/tests/fixtures: the bytes of ROWS rows of COLS weights,
then the ROWS * COLS weights that gguf.quants.dequantize makes of them, as little-endian f32.
Quantized bits are random; factors are random halves of moderate size and either sign, a few
of them subnormal or zero.
"""

from pathlib import Path

import gguf
import numpy as np

ROWS, COLS = 2, 512
OUT = Path(__file__).parent.parent / "crates/phi3-kernels/tests/fixtures"

# Byte offsets of the half-precision factors in a block.
FACTORS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "F16": [],
    "BF16": [],
    "INT4": [0],
}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for seed, (name, factors) in enumerate(FACTORS.items()):
        random = np.random.Generator(np.random.PCG64(seed))
        if name == "INT4":
            block_len, block_bytes = 256, 130
        else:
            kind = gguf.GGMLQuantizationType[name]
            block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(
            0, 256, (ROWS * COLS // block_len, block_bytes), dtype=np.uint8
        )
        for offset in factors:
            halves = random.normal(0, 0.02, len(blocks)).astype(np.float16)
            halves[random.random(len(blocks)) < 0.2] *= np.float16(2e-4)
            halves[-1] = 0
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
        if not factors:
            # Keep to finite values: NaN cannot be compared bit for bit.
            exponent = 0x7C if name == "F16" else 0x7F
            high = blocks[:, 1]
            high[(high & exponent) == exponent] ^= 0x40
        data = blocks.reshape(ROWS, -1)
        if name == "F16":
            weights = data.view(np.float16).astype(np.float32)
        elif name == "INT4":
            weights = int4(blocks).reshape(ROWS, COLS)
        else:
            weights = gguf.quants.dequantize(data, kind)
        assert weights.shape == (ROWS, COLS) and np.isfinite(weights).all()
        weights = weights.astype("<f4").tobytes()
        (OUT / f"{name.lower()}.bin").write_bytes(data.tobytes() + weights)


def int4(blocks):
    """A block is a half and 128 bytes; of each 64 weights, byte l of 32 holds q of weight l low and
    that of weight l + 32 high; a weight is d * (q - 8)."""
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    packed = blocks[:, 2:].reshape(-1, 4, 1, 32)
    q = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 256)
    return d * (q.astype(np.float32) - 8)


if __name__ == "__main__":
    main()
