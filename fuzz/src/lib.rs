//! What the targets share: seeds, and how they fail.

use std::path::PathBuf;

/// Called once before a target runs; `seeds` are its first inputs.
///
/// With `PHI3_FUZZ_SEEDS` set to a folder the seeds are written there and nothing is fuzzed: they
/// follow from the fixtures, so that none are kept in the repository.
///
/// libFuzzer's bindings abort at every panic. Here only those that leave the library are findings:
/// it turns the panics of the `tokenizers` and `minijinja` crates into errors.
pub fn start(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    if let Some(folder) = std::env::var_os("PHI3_FUZZ_SEEDS") {
        let folder = PathBuf::from(folder);
        std::fs::create_dir_all(&folder).expect("the folder of seeds can be made");
        for (i, seed) in seeds().into_iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{i:02}")), seed).expect("a seed is written");
        }
        std::process::exit(0);
    }
    if std::env::var_os("PHI3_FUZZ_VERBOSE").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    } else {
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    }
}
