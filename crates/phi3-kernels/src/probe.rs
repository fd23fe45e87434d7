//! What a machine can do at most: what memory delivers and what the multipliers do, measured.
//!
//! A measured speed means something beside these figures only. They are limits of the processor,
//! not of this crate: loops without any of a kernel's other work, one for each instruction set
//! that the processor has, whatever [`backend_name`](crate::backend_name) says. Each is the best
//! of several rounds, since other programs can only make a round slower; of reading the median
//! is told, too, because long runs cannot choose their moment.

#[cfg_attr(target_arch = "aarch64", path = "probe/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "probe/x86_64.rs")]
#[cfg_attr(
    not(any(target_arch = "aarch64", target_arch = "x86_64")),
    path = "probe/other.rs"
)]
mod native;
mod portable;

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Rounds of a measurement; the best counts.
const ROUNDS: usize = 50;

/// Length of a round: shorter than a time slice, so that some rounds are undisturbed where other
/// programs run too.
const ROUND: Duration = Duration::from_millis(4);

/// Bytes that the read measurement goes through, more than caches hold on all but the largest
/// servers.
const READ_BYTES: usize = 256 << 20;

/// Words that a thread reads between two looks at the clock.
const READ_WORDS: usize = 1 << 17;

/// What a machine does at most with some threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Threads that measured.
    pub threads: usize,
    /// Bytes a second that the threads read from memory together.
    pub read_bytes: f64,
    /// The same in the median round: what programs get of it that run longer than a moment, where
    /// others read, too.
    pub usual_read_bytes: f64,
    /// The instruction sets that the processor has, from slow to fast.
    pub instruction_sets: Vec<InstructionSet>,
}

/// What an instruction set does at most with some threads.
#[derive(Clone, Debug, PartialEq)]
pub struct InstructionSet {
    /// `portable`, `avx2`, `avx-vnni`, `avx512-vnni`, `neon`, `neon-dotprod`, as
    /// the backends are called.
    pub name: &'static str,
    /// Additions and multiplications of f32 a second; a fused one counts as two.
    pub f32_ops: f64,
    /// Additions and multiplications of 8-bit integers a second.
    pub int8_ops: f64,
}

impl Probe {
    /// The most f32 operations a second of any instruction set.
    pub fn f32_ops(&self) -> f64 {
        self.best(|set| set.f32_ops)
    }

    /// The most 8-bit operations a second of any instruction set.
    pub fn int8_ops(&self) -> f64 {
        self.best(|set| set.int8_ops)
    }

    fn best(&self, figure: impl Fn(&InstructionSet) -> f64) -> f64 {
        self.instruction_sets.iter().map(figure).fold(0.0, f64::max)
    }
}

/// Measures what this machine does at most with `threads` threads of its own, in about one
/// second. 256 MiB are allocated meanwhile.
pub fn probe(threads: usize) -> Probe {
    probe_for(threads, READ_BYTES, ROUND)
}

fn probe_for(threads: usize, read_bytes: usize, round: Duration) -> Probe {
    let threads = threads.max(1);
    let mut sets = Vec::new();
    let mut measure = |loops: Loops| {
        let ops = |run: &(dyn Fn() -> u64 + Sync)| rates(threads, round, |_| run()).best();
        sets.push(InstructionSet {
            name: loops.name,
            f32_ops: ops(&*loops.f32),
            int8_ops: ops(&*loops.int8),
        });
    };
    measure(portable::loops());
    native::all_loops().into_iter().for_each(&mut measure);
    let reading = read_rates(threads, read_bytes, round);
    Probe {
        threads,
        read_bytes: reading.best(),
        usual_read_bytes: reading.median(),
        instruction_sets: sets,
    }
}

/// The two loops of an instruction set. A call takes some microseconds and returns the number of
/// operations that it did.
struct Loops {
    name: &'static str,
    f32: Box<dyn Fn() -> u64 + Sync>,
    int8: Box<dyn Fn() -> u64 + Sync>,
}

/// Bytes a second that the threads read, each its own part of a buffer again and again.
fn read_rates(threads: usize, bytes: usize, round: Duration) -> Rates {
    let words = bytes / size_of::<u64>();
    // Written once, so that every page is memory of its own and not the system's page of zeros.
    let buffer = vec![1u64; words];
    let parts: Vec<Vec<&[u64]>> = buffer
        .chunks(words.div_ceil(threads).max(1))
        .map(|part| part.chunks(READ_WORDS).collect())
        .collect();
    let next: Vec<AtomicUsize> = parts.iter().map(|_| AtomicUsize::new(0)).collect();
    rates(parts.len(), round, |thread| {
        let idx = next[thread].fetch_add(1, Ordering::Relaxed);
        let piece = parts[thread][idx % parts[thread].len()];
        black_box(native::read(piece));
        size_of_val(piece) as u64
    })
}

/// Work a second of each round, the least first.
struct Rates([f64; ROUNDS]);

impl Rates {
    fn best(&self) -> f64 {
        self.0[ROUNDS - 1]
    }

    fn median(&self) -> f64 {
        self.0[ROUNDS / 2]
    }
}

/// The work a second that `threads` threads did together; `work(thread)` does some and says how
/// much.
fn rates(threads: usize, round: Duration, work: impl Fn(usize) -> u64 + Sync) -> Rates {
    // A barrier and a second thread would be in the way where there are no threads.
    let rate_alone = || {
        work(0); // caches, pages and clocks get ready
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < round {
            done += work(0);
        }
        done as f64 / began.elapsed().as_secs_f64()
    };
    let rate = || {
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (start, nanos) = (Barrier::new(threads), AtomicU64::new(0));
        thread::scope(|scope| {
            for thread in 0..threads {
                let (work, done, stop, start, longest) = (&work, &done, &stop, &start, &nanos);
                scope.spawn(move || {
                    work(thread); // caches, pages and clocks get ready
                    start.wait();
                    let began = Instant::now();
                    while !stop.load(Ordering::Relaxed) {
                        done.fetch_add(work(thread), Ordering::Relaxed);
                        if began.elapsed() >= round {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    longest.fetch_max(nanos, Ordering::Relaxed);
                });
            }
        });
        done.into_inner() as f64 / (nanos.into_inner().max(1) as f64 * 1e-9)
    };
    let mut rates = [0.0; ROUNDS];
    for of_round in &mut rates {
        *of_round = if threads == 1 { rate_alone() } else { rate() };
    }
    rates.sort_by(f64::total_cmp);
    Rates(rates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_measured() {
        let round = Duration::from_millis(2);
        for threads in [0, 1, 3] {
            if threads > 1 && cfg!(target_family = "wasm") {
                continue; // there are no threads
            }
            let probe = probe_for(threads, 1 << 20, round);
            assert_eq!(probe.threads, threads.max(1));
            assert!(probe.usual_read_bytes > 1e6, "{probe:?}");
            assert!(probe.read_bytes >= probe.usual_read_bytes, "{probe:?}");
            assert_eq!(probe.instruction_sets[0].name, "portable");
            for set in &probe.instruction_sets {
                assert!(set.f32_ops > 1e6 && set.int8_ops > 1e6, "{set:?}");
                assert!(probe.f32_ops() >= set.f32_ops && probe.int8_ops() >= set.int8_ops);
            }
        }
    }

    #[test]
    #[cfg_attr(target_family = "wasm", ignore = "there are no threads")]
    fn a_rate_is_work_by_time() {
        // Two threads that each do one unit in a millisecond do at most two thousand a second.
        let rates = rates(2, Duration::from_millis(3), |_| {
            thread::sleep(Duration::from_millis(1));
            1
        });
        let rate = rates.best();
        assert!(rate > 10.0 && rate <= 2000.0, "{rate}");
        assert!(rates.median() <= rate);
    }

    #[test]
    fn reading_reads_everything() {
        for len in [0, 1, 7, 64, 1000] {
            let numbers: Vec<u64> = (0..len).map(|i| i * i).collect();
            let sum = numbers.iter().sum::<u64>();
            assert_eq!(native::read(&numbers), sum);
            assert_eq!(portable::read(&numbers), sum);
        }
    }
}
