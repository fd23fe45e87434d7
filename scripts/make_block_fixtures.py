#!/usr/bin/env python3
"""Makes the fixtures of phi3-kernels' block formats, decoded by the gguf package.

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
}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for seed, (name, factors) in enumerate(FACTORS.items()):
        random = np.random.Generator(np.random.PCG64(seed))
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
        else:
            weights = gguf.quants.dequantize(data, kind)
        assert weights.shape == (ROWS, COLS) and np.isfinite(weights).all()
        weights = weights.astype("<f4").tobytes()
        (OUT / f"{name.lower()}.bin").write_bytes(data.tobytes() + weights)


if __name__ == "__main__":
    main()
