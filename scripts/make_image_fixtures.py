#!/usr/bin/env python3
"""Writes tests/fixtures/image-formats: small pictures in many variants, and Pillow's pixels of them.

    pip install pillow==13.0.0
    scripts/make_image_fixtures.py tests/fixtures/image-formats

formats.json holds for each file its size and the sha256 of `convert("RGB")`; NAME.rgb.png is that
picture itself, for formats whose decoders may differ.
"""

import hashlib
import io
import json
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image

W, H = 61, 43


def picture(width=W, height=H):
    """Smooth areas, hard edges of color and some noise."""
    image = Image.new("RGB", (width, height))
    seed = 1
    for y in range(height):
        for x in range(width):
            seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
            pixel = (x * 4 % 256, y * 5 % 256, (x + y) * 2 % 256)
            if 20 <= x < 40 and 10 <= y < 30:
                pixel = (250, 20, 30) if (x // 5 + y // 5) % 2 else (10, 60, 240)
            noise = (seed >> 16) % 9
            image.putpixel((x, y), tuple(min(255, c + noise) for c in pixel))
    return image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, color, rows, extra=b"", width=None):
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def wide_samples(channels):
    rows = []
    for y in range(H):
        samples = [(x * 1021 + y * 769 + c * 20011) % 65536 for x in range(W) for c in range(channels)]
        rows.append(struct.pack(f">{len(samples)}H", *samples))
    return rows


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    base = picture()
    alpha = base.copy()
    alpha.putalpha(base.convert("L").point(lambda v: 0 if v < 90 else v))
    files = {}

    def save(name, image, **options):
        out = io.BytesIO()
        image.save(out, **options)
        files[name] = out.getvalue()

    files["gray16.png"] = png(16, 0, wide_samples(1), width=W)
    files["gray16_alpha.png"] = png(16, 4, wide_samples(2), width=W)
    files["rgb16.png"] = png(16, 2, wide_samples(3), width=W)
    files["rgba16.png"] = png(16, 6, wide_samples(4), width=W)
    rows = [bytes((x * 7 + y * 3) % 256 for x in range(16)) for y in range(H)]
    transparent = chunk(b"tRNS", struct.pack(">H", 1))
    files["gray2_transparent.png"] = png(2, 0, rows, transparent, width=W)
    rows = [bytes((x * 7 + y * 3) % 256 for x in range(31)) for y in range(H)]
    files["gray4.png"] = png(4, 0, rows, width=W)
    save("palette4.png", base.quantize(13), format="PNG", bits=4)
    save("truecolor_transparent.png", base, format="PNG", transparency=base.getpixel((3, 3)))
    save("animated.png", base, format="PNG", save_all=True, append_images=[picture(W, H).rotate(90)])

    save("plain.gif", base.quantize(64), format="GIF")
    clear = base.quantize(64)
    save("transparent.gif", clear, format="GIF", transparency=clear.getpixel((30, 20)))
    frames = [base.rotate(36 * i).quantize(32) for i in range(10)]
    save("animated.gif", frames[0], format="GIF", save_all=True, append_images=frames[1:], duration=40)
    save("gray.gif", base.convert("L"), format="GIF")

    save("rgb.bmp", base, format="BMP")
    save("palette.bmp", base.quantize(200), format="BMP")
    save("onebit.bmp", base.convert("1"), format="BMP")
    save("gray.bmp", base.convert("L"), format="BMP")
    save("rgba.bmp", alpha, format="BMP")

    save("lossless.webp", base, format="WEBP", lossless=True)
    save("lossless_alpha.webp", alpha, format="WEBP", lossless=True, exact=True)
    save("lossy.webp", base, format="WEBP", quality=80)
    save("lossy_alpha.webp", alpha, format="WEBP", quality=60, exact=True)
    save("animated.webp", base, format="WEBP", lossless=True, save_all=True, append_images=[base.rotate(180)])

    for name, sampling in [("444", 0), ("422", 1), ("420", 2)]:
        save(f"rgb_{name}.jpg", base, format="JPEG", quality=85, subsampling=sampling)
    save("progressive.jpg", base, format="JPEG", quality=85, progressive=True)
    save("restart.jpg", base, format="JPEG", quality=60, restart_marker_blocks=3)
    save("gray.jpg", base.convert("L"), format="JPEG", quality=85)
    save("cmyk.jpg", base.convert("CMYK"), format="JPEG", quality=90)
    save("one_pixel.jpg", picture(1, 1), format="JPEG")
    save("high_quality.jpg", base, format="JPEG", quality=100, subsampling=2)
    save("low_quality.jpg", base, format="JPEG", quality=10)

    listing = {"pillow": Image.__version__, "images": {}}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        rgb = Image.open(io.BytesIO(content)).convert("RGB")
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        listing["images"][name] = {"width": rgb.width, "height": rgb.height, "rgb_sha256": digest}
        if name.endswith(".jpg") or name.startswith("lossy"):
            rgb.save(folder / f"{name}.rgb.png")
    (folder / "formats.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
