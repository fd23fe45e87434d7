//! How the kernels' work is spread over threads: by a pool of their own ([`mod@pool`]).

use std::collections::HashSet;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use self::pool::Pool;

mod pool;

/// Multiply-adds below which a second thread costs more than it gives.
const MIN_PARALLEL_WORK: usize = 1 << 16;

/// Tasks for each thread, so that a thread that lost its core for a while is not waited for.
const TASKS_PER_THREAD: usize = 12;

/// More threads than processors have cores; beyond it, starting them is the only effect.
const MAX_THREADS: usize = 1024;

static POOL: RwLock<Option<Arc<Pool>>> = RwLock::new(None);

/// Sets the number of threads that kernels use, at most 1024; 0 for the default
/// ([`num_threads`]). Takes effect for operations that start afterwards, also when a pool of
/// another size exists. Where the system refuses to start threads, the caller does all work.
pub fn set_num_threads(n: usize) {
    let n = if n == 0 { default_threads() } else { n }.min(MAX_THREADS);
    let mut pool = POOL.write().unwrap_or_else(PoisonError::into_inner);
    if pool.as_ref().is_none_or(|p| p.threads() != n) {
        *pool = Some(Arc::new(Pool::new(n)));
    }
}

/// The number of threads that kernels use: what [`set_num_threads`] was given; else the
/// environment variable `PHI3_THREADS`, if it holds a positive number; else the number of
/// physical cores this process may use, or of logical ones where the system does not tell the
/// difference.
pub fn num_threads() -> usize {
    pool().threads()
}

/// The calling thread as one of the kernels' threads ([`occupy_thread`]).
#[derive(Debug)]
#[must_use = "the thread is counted until this is dropped"]
pub struct OccupiedThread {
    _counted: pool::Occupied,
}

/// Counts the calling thread among the threads that kernels use, between its kernels as well as in
/// them, until the value is dropped: for several threads that each go through a model of their own.
/// While there are as many of them as [`num_threads`], each does its work alone, and when one has
/// ended the others are helped.
pub fn occupy_thread() -> OccupiedThread {
    OccupiedThread {
        _counted: pool().occupy(),
    }
}

/// Cuts `out` into parts of whole items (`item` elements each) and calls `f(first item, part)`
/// for each, with the threads of the pool when `work`, in multiply-adds, pays for them. How
/// many items a part holds depends on work and threads, so a result must not depend on it.
pub(crate) fn for_each_part(
    out: &mut [f32],
    item: usize,
    work: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    let items = out.len().checked_div(item).unwrap_or(0);
    let chunk = chunk_len(items, work);
    for_each_chunk(out, chunk * item, |i, part| f(i * chunk, part));
}

/// Calls `f(i, part)` for each part i of `out`, all but the last `len` long, with the threads
/// of the pool when there is more than one part.
pub(crate) fn for_each_chunk(out: &mut [f32], len: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if len < out.len() {
        let mut parts: Vec<&mut [f32]> = out.chunks_mut(len).collect();
        for_each(&mut parts, |i, part| f(i, part));
    } else if !out.is_empty() {
        f(0, out);
    }
}

/// Calls `f(i, item)` for every item i, each a piece of work that pays for a thread (some microseconds),
/// with the threads of the kernels: successive items by one thread where that is no slower. Kernels that `f`
/// calls run on its own thread.
///
/// ```
/// let mut squares = [1, 2, 3];
/// phi3_kernels::for_each(&mut squares, |_, x| *x *= *x);
/// assert_eq!(squares, [1, 4, 9]);
/// ```
pub fn for_each<T: Send>(items: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
    pool().for_each(items, f);
}

/// How many of `items` equal pieces of `work` one task takes.
pub(crate) fn chunk_len(items: usize, work: usize) -> usize {
    let threads = num_threads();
    if threads == 1 || work < MIN_PARALLEL_WORK {
        return items;
    }
    let tasks = (threads * TASKS_PER_THREAD).min(work / (MIN_PARALLEL_WORK / 4));
    items.div_ceil(tasks.max(1))
}

fn pool() -> Arc<Pool> {
    let existing = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
    existing.unwrap_or_else(|| {
        let mut pool = POOL.write().unwrap_or_else(PoisonError::into_inner);
        pool.get_or_insert_with(|| Arc::new(Pool::new(default_threads())))
            .clone()
    })
}

fn default_threads() -> usize {
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        crate::environment::threads()
            .ok()
            .flatten()
            .unwrap_or_else(|| {
                let usable = std::thread::available_parallelism().map_or(1, usize::from);
                physical_cores().map_or(usable, |cores| cores.min(usable))
            })
            .min(MAX_THREADS)
    })
}

/// Distinct cores among the logical processors, where the system lists them (Linux). Elsewhere
/// the standard library offers only logical processors.
fn physical_cores() -> Option<usize> {
    let mut cores = HashSet::new();
    for cpu in std::fs::read_dir("/sys/devices/system/cpu").ok()? {
        let siblings = cpu.ok()?.path().join("topology/thread_siblings_list");
        // Other entries of the folder, and processors that are switched off, have no such file.
        if let Ok(siblings) = std::fs::read_to_string(siblings) {
            cores.insert(siblings);
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_part_is_visited_once() {
        for threads in [1, 3] {
            set_num_threads(threads);
            // Where no thread can be started, the caller does all work.
            if !cfg!(target_family = "wasm") {
                assert_eq!(num_threads(), threads);
            }
            for items in [0, 1, 2, 7, 1000] {
                for work in [0, 1 << 17, usize::MAX] {
                    let mut out = vec![0.0; items * 3];
                    for_each_part(&mut out, 3, work, |first, part| {
                        for (i, v) in part.iter_mut().enumerate() {
                            *v += (first * 3 + i) as f32;
                        }
                    });
                    assert!(out.iter().enumerate().all(|(i, v)| *v == i as f32));
                }
            }
        }
        set_num_threads(0);
        assert_eq!(num_threads(), default_threads());
    }

    #[test]
    fn kernels_inside_tasks_do_not_deadlock() {
        let calls = AtomicUsize::new(0);
        for_each(&mut [(); 8], |_, ()| {
            let mut out = vec![0.0; 64];
            for_each_part(&mut out, 1, usize::MAX, |_, part| {
                calls.fetch_add(part.len(), Ordering::Relaxed);
            });
        });
        assert_eq!(calls.into_inner(), 8 * 64);
    }
}
