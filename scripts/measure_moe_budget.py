#!/usr/bin/env python3
"""Runs a Phi-3.5-MoE of the real size in less memory than it has, and says what that costs.

    python3 scripts/measure_moe_budget.py PHI3 FOLDER [--type Q2_K] [--budget 12] [--tokens 64]

Makes a model with random weights in FOLDER with `PHI3 bench --random` (at Q2_K 15 GB; the free disk is
looked at first), and generates from it in turn with --memory-budget, and with the whole file mapped and
no budget. Both run in a memory cgroup of the budget (v1 or v2) where one can be made, with nothing of
the file in the page cache at the start; where none can be made, that is said. Prints for each run the
exit code, tokens per second, bytes that reached the process from the disk per token, and the largest
resident set that was sampled, of file pages and of its own. The file is removed at the end unless
--keep is given. Needs Linux; only Python's library is used.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

GIB = 1 << 30
# Bytes a weight, in the mixes of this size; the file has 41.9 billion.
BYTES_PER_WEIGHT = {"Q2_K": 0.366, "Q3_K_S": 0.43, "Q4_0": 0.564}


def main():
    parser = argparse.ArgumentParser(description="Phi-3.5-MoE within a budget of memory.")
    parser.add_argument("phi3", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", choices=BYTES_PER_WEIGHT, default="Q2_K")
    parser.add_argument("--budget", type=float, default=12, help="GiB")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=230, help="longest run")
    parser.add_argument("--rounds", type=int, default=2, help="a disk may be faster the second time")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()

    needed = int(41.9e9 * arguments.layers / 32 * BYTES_PER_WEIGHT[arguments.type]) + GIB
    free = shutil.disk_usage(arguments.folder).free
    file = arguments.folder / f"phi-3.5-moe-{arguments.type}-{arguments.layers}.gguf"
    if not file.exists() and free < needed:
        sys.exit(f"{file} needs {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")
    make = [arguments.phi3, "bench", "--random", "phi-3.5-moe", "--type", arguments.type]
    make += ["--layers", str(arguments.layers), "--out", file, "--make-only"]
    subprocess.run([str(part) for part in make], check=True, stdout=subprocess.DEVNULL)
    try:
        size = file.stat().st_size
        print(f"{file.name}: {size / 1e9:.2f} GB, budget {arguments.budget} GiB", flush=True)
        limit = int(arguments.budget * GIB)
        for budget in [limit, None] * arguments.rounds:
            print(json.dumps(run(arguments, file, limit, budget)), flush=True)
    finally:
        if not arguments.keep:
            file.unlink()


def run(arguments, file, limit, budget):
    """One generation, alone in a cgroup of `limit` bytes where there is one."""
    forget(file)
    cgroup = Cgroup.make(limit)
    command = [str(arguments.phi3), "generate", "--model", str(file), "--raw", "--device", "cpu"]
    command += ["--prompt", "the", "--max-new-tokens", str(arguments.tokens), "--stats"]
    if budget:
        command += ["--memory-budget", str(budget)]
    enter = cgroup.enter if cgroup else None
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=enter
    )
    most = {"RssFile": 0, "RssAnon": 0, "VmRSS": 0}
    read, begun = 0, time.monotonic()
    while process.poll() is None:
        for key, value in status(process.pid).items():
            if key in most:
                most[key] = max(most[key], value)
        read = disk_bytes(process.pid) or read
        if time.monotonic() - begun > arguments.seconds:
            process.kill()
        time.sleep(0.05)
    said = process.stderr.read()
    result = {
        "memory_budget": budget,
        "cgroup": f"{cgroup.version}, {limit} bytes" if cgroup else "none could be made: no limit",
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - begun, 1),
        "disk_bytes": read,
        "disk_bytes_per_token": read // arguments.tokens,
        "sampled_bytes": most,
        "cgroup_peak_bytes": cgroup.peak() if cgroup else None,
        "said": said.strip().splitlines(),
    }
    if cgroup:
        cgroup.remove()
    return result


def forget(file):
    """Takes the file out of the page cache."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(pid):
    """Sizes in /proc/PID/status, in bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {key: int(kb) * 1024 for key, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def disk_bytes(pid):
    """Bytes that the disk gave to the process, page faults included."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return None
    found = re.search(r"^read_bytes: (\d+)$", text, re.M)
    return int(found.group(1)) if found else None


class Cgroup:
    """A group of one process with a limit of memory."""

    def __init__(self, path, version):
        self.path, self.version = path, version

    @classmethod
    def make(cls, limit):
        """`None` where the system or the user's rights allow none."""
        for root, version, key in [
            ("/sys/fs/cgroup/memory", "v1", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "v2", "memory.max"),
        ]:
            path = Path(root) / f"phi3-budget-{os.getpid()}"
            try:
                path.mkdir()
            except OSError:
                continue
            try:
                (path / key).write_text(str(limit))
                return cls(path, version)
            except OSError:
                path.rmdir()
        return None

    def enter(self):
        """In the child, before the program starts."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self):
        for key in ("memory.max_usage_in_bytes", "memory.peak"):
            try:
                return int((self.path / key).read_text())
            except OSError:
                continue
        return None

    def remove(self):
        for _ in range(20):
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.1)


if __name__ == "__main__":
    main()
