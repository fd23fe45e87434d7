// node scripts/run_wasi.mjs PROGRAM.wasm [ARGUMENT...]: runs a WASI program with this machine's
// files, environment and terminal, and ends with its exit code.
import { readFileSync } from "node:fs";
import { WASI } from "node:wasi";

// Rust's standard library calls these to start a thread, and Debian's C library does not have them.
// There are none, which the kernels' pool takes for an answer.
const ENOSYS = 52;
const threads = {
  pthread_attr_init: () => 0,
  pthread_attr_setstacksize: () => 0,
  pthread_attr_destroy: () => 0,
  pthread_create: () => ENOSYS,
  pthread_join: () => ENOSYS,
  pthread_detach: () => ENOSYS,
};

const [program, ...args] = process.argv.slice(2);
const wasi = new WASI({
  version: "preview1",
  args: [program, ...args],
  env: process.env,
  preopens: { "/": "/" },
  returnOnExit: true,
});
const module = new WebAssembly.Module(readFileSync(program));
const imports = { wasi_snapshot_preview1: wasi.wasiImport, env: threads };
process.exitCode = wasi.start(new WebAssembly.Instance(module, imports));
