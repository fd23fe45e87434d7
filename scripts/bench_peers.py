#!/usr/bin/env python3
"""Measures `phi3 bench` beside llama.cpp and candle-transformers on the same GGUF files.

    python3 scripts/bench_peers.py --shape phi-3-mini --types Q4_0,Q4_K_M -p 512 -n 64 -t 2
    python3 scripts/bench_peers.py --models a.gguf b.gguf --peers llama.cpp --out table.md

Makes random models of a real shape (`phi3 bench --random`) or takes the files that are given, and
runs every program on every file, one after the other, for each round again: what disturbs the
machine for a while disturbs all. Prints a Markdown table of medians and ratios with processor, date,
versions and threads; a peer that fails is left out of the table, and below it stands why. So does
how much of the processors other programs took meanwhile: more than a few percent, and the figures
say little, those of llama.cpp least, whose threads spin while they wait for one that is not running.
With --state FILE every run is written down as soon as it is done, and a script that was stopped goes
on where it was, as long as programs, files and tests are the same.

llama.cpp is PyPI's llama-cpp-python 0.3.36, built from source into a virtual environment of its own
(about 15 minutes, once; needs a C++ compiler), or whatever Python `--python` or PHI3_PEER_PYTHON
names. candle-transformers' quantized_phi3 is the latest on crates.io, in a small cargo project of its
own, compiled for this processor; it is asked for by `--peers llama.cpp,candle`, runs at depth 0 and
with one sequence only, and takes minutes for a prompt of 512. Both lie in --work.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "0.3.36"
OURS = "phi3"

# The share of the processors that other programs may take without changing what is measured.
QUIET = 0.05


def main():
    args = arguments()
    if args.worker:
        return llama_worker(args)
    args.work.mkdir(parents=True, exist_ok=True)
    tests = all_tests(args)
    programs = {OURS: Ours(args)}
    failures = {}
    for name in filter(None, args.peers.split(",")):
        try:
            programs[name] = PEERS[name](args)
        except (subprocess.CalledProcessError, OSError) as error:
            failures[name] = f"could not be installed: {reason(error)}"
            note(f"{name}: {failures[name]}")
    files = args.models or [programs[OURS].make(kind) for kind in args.types.split(",")]
    results = measure(args, programs, files, tests, failures)
    text = report(args, programs, files, tests, results, failures)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 1 if failures else 0


def arguments():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", type=Path, help="GGUF files, in place of random ones")
    add("--shape", default="phi-3-mini", help="shape of random models (default: %(default)s)")
    add("--layers", type=int, help="only so many layers of the shape")
    add("--types", default="Q4_0", help="types of random models, with commas (default: %(default)s)")
    add("-p", "--prompt-tokens", type=numbers, default=[512], help="default: 512")
    add("-n", "--new-tokens", type=numbers, default=[64], help="default: 64")
    add("-d", "--depth", type=numbers, default=[0], help="default: 0")
    add("-b", "--batch", type=numbers, default=[1], help="default: 1")
    add("-t", "--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    add("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    add("--peers", default="llama.cpp", help="llama.cpp, candle or both (default: %(default)s)")
    add("--phi3", type=Path, help="the binary (default: cargo builds it in release mode)")
    add("--python", default=os.environ.get("PHI3_PEER_PYTHON"), help="a Python with llama_cpp")
    add("--work", type=Path, default=cache / "phi3/peers", help="default: %(default)s")
    add("--timeout", type=float, default=3600, help="seconds for one run of one program")
    add("--out", type=Path, help="also write the table to this file")
    add("--state", type=Path, help="keep finished runs in this file, and do not repeat them")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(filter(None, args.peers.split(","))) - set(PEERS)
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)}: known are {', '.join(PEERS)}")
    return args


def numbers(text):
    return [int(number) for number in text.split(",")]


def all_tests(args):
    """(n_prompt, n_gen, depth, batch), in the order of `phi3 bench`."""
    tests = []
    for depth in args.depth:
        tests += [(n, 0, depth, 1) for n in args.prompt_tokens if n]
        tests += [(0, n, depth, b) for b in sorted(set(args.batch)) for n in args.new_tokens if n]
    return tests


def measure(args, programs, files, tests, failures):
    """{(file, program): {"runs": [...], test: [tokens a second of each round]}}"""
    results = {}
    done = State(args.state)
    for turn in range(args.repeat):
        for file in files:
            for name, program in programs.items():
                if name in failures:
                    continue
                note(f"round {turn + 1} of {args.repeat}: {name} on {file.name}")
                try:
                    key = f"{turn} {program.version()} {args.threads} {file.name} {tests}"
                    run = done.get(key)
                    if run is None:
                        before = processor_seconds()
                        run = program.run(file, tests)
                        run["others"] = share_of_others(before, processor_seconds())
                        done.put(key, run)
                except (subprocess.SubprocessError, OSError, ValueError) as error:
                    failures[name] = f"failed on {file.name}: {reason(error)}"
                    note(f"{name} {failures[name]}")
                    continue
                of = results.setdefault((file, name), {"runs": []})
                of["runs"].append(run)
                for it in run["tests"]:
                    key = tuple(it[k] for k in ("n_prompt", "n_gen", "depth", "batch"))
                    of.setdefault(key, []).append(it["speed"])
    return results


class State:
    """Runs by what they ran, in a file if there is one."""

    def __init__(self, path):
        self.path = path
        self.runs = json.loads(path.read_text()) if path and path.exists() else {}

    def get(self, key):
        return self.runs.get(key)

    def put(self, key, run):
        self.runs[key] = run
        if self.path:
            # Renamed when it is whole, so that a script stopped here finds the runs before.
            whole = self.path.with_name(self.path.name + ".new")
            whole.write_text(json.dumps(self.runs))
            whole.replace(self.path)


def reason(error):
    """The last line that a failed program said."""
    said = getattr(error, "stderr", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__


def report(args, programs, files, tests, results, failures):
    peers = [name for name in programs if name != OURS]
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        f"{processor()}, {args.threads} threads, {now}, load {load()}; medians of "
        f"{args.repeat} alternating rounds, tokens/s.",
        "; ".join(f"{name}: {program.version()}" for name, program in programs.items()) + ".",
        "",
    ]
    head = ["model", "test", "depth", "batch", OURS]
    for name in peers:
        head += [name, f"{OURS} : {name}"]
    lines += [row(head), row(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for file in files:
        of = {name: results.get((file, name), {}) for name in programs}
        for test in tests:
            n_prompt, n_gen, depth, batch = test
            label = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
            rounds = {name: of[name].get(test, []) for name in programs}
            speeds = {name: median(values) for name, values in rounds.items()}
            cells = [file.stem, label, depth, batch, spread(rounds[OURS])]
            for name in peers:
                cells += [spread(rounds[name]), figure(ratio(speeds[OURS], speeds[name]))]
            lines.append(row(cells))
        for label, key, unit in (
            ("load to first token, s", "first_token", 1),
            ("peak memory, GB", "peak_memory", 1e9),
        ):
            values = {}
            for name in programs:
                found = [run[key] for run in of[name].get("runs", []) if run.get(key)]
                values[name] = median([value / unit for value in found])
            cells = [file.stem, label, "", "", figure(values[OURS])]
            for name in peers:
                cells += [figure(values[name]), figure(ratio(values[OURS], values[name]))]
            lines.append(row(cells))
    others = [(run["others"], name) for (_, name), of in results.items() for run in of["runs"]]
    known = [it for it in others if it[0] is not None]
    ours = [run for of in results.values() for run in of["runs"] if run.get("usual_read")]
    if ours:
        best, usual = (spread([run[key] for run in ours]) for key in ("read", "usual_read"))
        lines.append(
            f"\nBeside these runs the machine read {best} GB/s from memory at best and {usual} GB/s "
            "in the median of 4 ms each, as `phi3 bench` measures it."
        )
    if known:
        most, name = max(known)
        verdict = "" if most < QUIET else ": measure again on a quiet machine"
        lines.append(
            f"\nOther programs took up to {most:.0%} of the processors (beside {name}){verdict}."
        )
    lines += [f"\n{name} {why}." for name, why in failures.items()]
    return "\n".join(lines)


def row(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def median(values):
    return statistics.median(values) if values else None


def ratio(ours, theirs):
    return ours / theirs if ours and theirs else None


def figure(value):
    return "" if value is None else f"{value:.2f}"


def spread(values):
    """The median, and the ends where there are several."""
    if len(values) < 2:
        return figure(median(values))
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def processor_seconds():
    """Seconds of all processors, of those busy ones, and those of finished children."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, wait, irq, softirq, steal = (int(f) / ticks for f in fields)
    busy = user + nice + system + irq + softirq + steal
    children = os.times()
    return busy + idle + wait, busy, children.children_user + children.children_system


def share_of_others(before, after):
    """What other programs took of all processors between the two, or None if unknown."""
    if before is None or after is None:
        return None
    total, busy, children = (b - a for a, b in zip(before, after))
    return max(0.0, (busy - children) / total) if total > 0 else None


def load():
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except (AttributeError, OSError):
        return "unknown"


def peak_memory():
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def note(text):
    print(text, file=sys.stderr, flush=True)


def output(command, args, env=None):
    """stdout of a command; what it said is in the error if it fails."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=args.timeout,
        env=environment,
        text=True,
        check=True,
    )
    return done.stdout


class Ours:
    def __init__(self, args):
        self.args = args
        self.binary = args.phi3
        if self.binary is None:
            note("building phi3 in release mode")
            subprocess.run(
                ["cargo", "build", "--release", "-p", "phi3-cli"], cwd=ROOT, check=True, stdout=2
            )
            target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
            self.binary = target / "release/phi3"

    def version(self):
        number = output([self.binary, "--version"], self.args).split()[-1]
        if self.args.phi3:
            # Whatever commit is checked out, the binary need not be of it.
            made = datetime.datetime.fromtimestamp(self.binary.stat().st_mtime, datetime.timezone.utc)
            return f"{number}, a binary of {made:%Y-%m-%d %H:%M} UTC"
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return f"{number}, commit {commit}" if commit else number

    def make(self, kind):
        command = [self.binary, "bench", "--random", self.args.shape, "--type", kind]
        if self.args.layers:
            command += ["--layers", self.args.layers]
        return Path(output(command + ["--make-only"], self.args).strip())

    def run(self, file, tests):
        args = self.args
        comma = lambda values: ",".join(map(str, values))
        command = [self.binary, "bench", "--model", file, "--json", "--repeat", 1]
        command += ["-p", comma(args.prompt_tokens), "-n", comma(args.new_tokens)]
        command += ["-d", comma(args.depth), "-b", comma(args.batch), "-t", args.threads]
        found = json.loads(output(command, args))
        for it in found:
            it["speed"] = it["tokens_per_second"]["median"]
        probe = found[0].get("probe") or {}
        return {
            "tests": found,
            "first_token": found[0]["load_to_first_token_seconds"],
            "peak_memory": max(it["peak_memory_bytes"] or 0 for it in found),
            "read": probe.get("read_gigabytes_per_second"),
            "usual_read": probe.get("read_gigabytes_per_second_median"),
        }


class LlamaCpp:
    def __init__(self, args):
        self.args = args
        self.python = args.python
        if self.python is None:
            folder = args.work / "venv"
            scripts = "Scripts" if os.name == "nt" else "bin"
            self.python = str(folder / scripts / "python")
            if not self.works():
                note(f"building llama-cpp-python {LLAMA} in {folder}")
                subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, stdout=2)
                pip = [self.python, "-m", "pip", "install", "--quiet"]
                subprocess.run(pip + [f"llama-cpp-python=={LLAMA}"], check=True, stdout=2)
        self.number = output([self.python, "-c", SHOW_VERSION], args).strip()

    def works(self):
        try:
            return output([self.python, "-c", SHOW_VERSION], self.args).strip() == LLAMA
        except (subprocess.SubprocessError, OSError):
            return False

    def version(self):
        return f"llama-cpp-python {self.number}"

    def run(self, file, tests):
        task = json.dumps({"model": str(file), "threads": self.args.threads, "tests": tests})
        command = [self.python, Path(__file__).resolve(), "--worker", task]
        return json.loads(output(command, self.args))


SHOW_VERSION = "import llama_cpp; print(llama_cpp.__version__)"


def llama_worker(args):
    """Runs in the Python that has llama_cpp; prints what `run` returns."""
    import llama_cpp as llama

    task = json.loads(args.worker)
    silence = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silence, None)
    llama.llama_backend_init()
    start = time.perf_counter()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(task["model"].encode(), parameters)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    with LlamaContext(llama, model, task["threads"], 4096, 1) as context:
        context.step([[7]], [0])
        first_token = time.perf_counter() - start
    tests = []
    for n_prompt, n_gen, depth, batch in task["tests"]:
        tokens = n_prompt + n_gen
        with LlamaContext(llama, model, task["threads"], depth + tokens, batch) as context:
            context.fill(depth)
            run = context.prompt if n_prompt else context.generate
            run(min(n_prompt, 32) or 1)
            seconds = run(tokens)
        tests.append(
            {
                "n_prompt": n_prompt,
                "n_gen": n_gen,
                "depth": depth,
                "batch": batch,
                "speed": tokens * batch / seconds,
            }
        )
    print(json.dumps({"tests": tests, "first_token": first_token, "peak_memory": peak_memory()}))


class LlamaContext:
    """Sequences of one model in llama.cpp, each with a part of the cache of its own."""

    CHUNK = 512

    def __init__(self, llama, model, threads, length, batch):
        self.llama, self.batch, self.depth = llama, batch, 0
        parameters = llama.llama_context_default_params()
        # Parts of the cache are multiples of 256.
        parameters.n_ctx = (length + 255) // 256 * 256 * batch
        parameters.n_seq_max = batch
        parameters.kv_unified = False
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, parameters)
        if not self.context:
            sys.exit("llama.cpp cannot make a context")
        self.memory = llama.llama_get_memory(self.context)
        self.tokens = llama.llama_batch_init(max(self.CHUNK, batch), 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.random = random.Random(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.llama.llama_batch_free(self.tokens)
        self.llama.llama_free(self.context)

    def ids(self, count):
        return [self.random.randrange(self.vocab) for _ in range(count)]

    def step(self, ids, starts, wanted=True):
        """Runs `ids[s]` at `starts[s]` of each sequence; logits of each one's last."""
        i = 0
        for sequence, (some, start) in enumerate(zip(ids, starts)):
            for offset, token in enumerate(some):
                self.tokens.token[i] = token
                self.tokens.pos[i] = start + offset
                self.tokens.n_seq_id[i] = 1
                self.tokens.seq_id[i][0] = sequence
                self.tokens.logits[i] = wanted and offset == len(some) - 1
                i += 1
        self.tokens.n_tokens = i
        if self.llama.llama_decode(self.context, self.tokens) != 0:
            sys.exit("llama_decode failed")
        self.llama.llama_synchronize(self.context)

    def read(self, ids, start):
        for at in range(0, len(ids), self.CHUNK):
            last = at + self.CHUNK >= len(ids)
            self.step([ids[at : at + self.CHUNK]], [start + at], last)

    def fill(self, depth):
        self.read(self.ids(depth), 0)
        for sequence in range(1, self.batch):
            self.llama.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.depth = depth

    def truncate(self):
        for sequence in range(self.batch):
            self.llama.llama_memory_seq_rm(self.memory, sequence, self.depth, -1)

    def prompt(self, count):
        self.truncate()
        ids = self.ids(count)
        start = time.perf_counter()
        self.read(ids, self.depth)
        return time.perf_counter() - start

    def generate(self, count):
        self.truncate()
        steps = [[self.ids(1) for _ in range(self.batch)] for _ in range(count)]
        start = time.perf_counter()
        for i, ids in enumerate(steps):
            self.step(ids, [self.depth + i] * self.batch)
        return time.perf_counter() - start


class Candle:
    def __init__(self, args):
        self.args = args
        folder = args.work / "candle"
        (folder / "src").mkdir(parents=True, exist_ok=True)
        manifest = folder / "Cargo.toml"
        cargo = lambda *rest: subprocess.run(["cargo", *rest], cwd=folder, check=True, stdout=2)
        # Written anew so that the latest release is taken; the empty workspace keeps cargo from
        # looking for one above.
        manifest.write_text(
            '[package]\nname = "candle-peer"\nversion = "0.0.0"\nedition = "2021"\n\n'
            '[dependencies]\nanyhow = "1"\n\n[workspace]\n'
        )
        (folder / "src/main.rs").write_text(CANDLE_MAIN)
        cargo("add", "--quiet", "candle-core", "candle-transformers")
        note("building candle-transformers for this processor")
        flags = {**os.environ, "RUSTFLAGS": "-C target-cpu=native"}
        flags.pop("CARGO_TARGET_DIR", None)
        build = ["cargo", "build", "--release", "--quiet"]
        subprocess.run(build, cwd=folder, check=True, stdout=2, env=flags)
        self.binary = folder / "target/release/candle-peer"
        lines = manifest.read_text().splitlines()
        self.number = next(line for line in lines if line.startswith("candle-transformers"))

    def version(self):
        return f"{self.number}, target-cpu=native"

    def run(self, file, tests):
        possible = [test for test in tests if test[2] == 0 and test[3] == 1]
        names = [f"{n_prompt}:{n_gen}" for n_prompt, n_gen, _, _ in possible]
        threads = {"RAYON_NUM_THREADS": str(self.args.threads)}
        return json.loads(output([self.binary, file, *names], self.args, threads))


CANDLE_MAIN = """
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_phi3::ModelWeights;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let start = Instant::now();
    let mut file = std::fs::File::open(&args[1])?;
    let content = Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(false, content, &mut file, &Device::Cpu)?;
    read(&mut model, 1, 0)?;
    let first_token = start.elapsed().as_secs_f64();
    let mut tests = Vec::new();
    for test in &args[2..] {
        let (n_prompt, n_gen) = test.split_once(':').context("PROMPT:GENERATED")?;
        let (n_prompt, n_gen): (usize, usize) = (n_prompt.parse()?, n_gen.parse()?);
        read(&mut model, 4, 0)?;
        let start = Instant::now();
        // A call at position 0 empties the cache.
        if n_prompt > 0 {
            read(&mut model, n_prompt, 0)?;
        }
        for position in 0..n_gen {
            read(&mut model, 1, position)?;
        }
        let speed = (n_prompt + n_gen) as f64 / start.elapsed().as_secs_f64();
        tests.push(format!(
            r#"{{"n_prompt":{n_prompt},"n_gen":{n_gen},"depth":0,"batch":1,"speed":{speed}}}"#
        ));
    }
    let peak = std::fs::read_to_string("/proc/self/status").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("VmHWM:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let peak = peak.map_or("null".to_owned(), |kilobytes| (kilobytes * 1024).to_string());
    println!(
        r#"{{"tests":[{}],"first_token":{first_token},"peak_memory":{peak}}}"#,
        tests.join(",")
    );
    Ok(())
}

fn read(model: &mut ModelWeights, tokens: usize, position: usize) -> Result<()> {
    let ids: Vec<u32> = (0..tokens).map(|i| ((i + position) * 7919 % 30_000) as u32).collect();
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    model.forward(&ids, position)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(())
}
"""

PEERS = {"llama.cpp": LlamaCpp, "candle": Candle}

if __name__ == "__main__":
    sys.exit(main())
