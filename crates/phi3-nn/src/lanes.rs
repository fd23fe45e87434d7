//! Independent pieces of work side by side, for what the kernels' threads cannot share.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::error::Result;

/// `f` of every item, in order. At most `most` items, and no more than the kernels have threads, are
/// worked on at a time, each by a thread of its own, which the kernels count as one of theirs: they
/// help where there are fewer items left than threads.
///
/// ```
/// let squares = phi3_nn::in_lanes(&[1, 2, 3], 2, |x| Ok(x * x))?;
/// assert_eq!(squares, [1, 4, 9]);
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// One of those of `f`; further items are then not begun.
pub fn in_lanes<T: Sync, R: Send>(
    items: &[T],
    most: usize,
    f: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let lanes = most.min(phi3_kernels::num_threads()).min(items.len());
    if lanes <= 1 {
        return items.iter().map(f).collect();
    }
    let next = AtomicUsize::new(0);
    let lane = || -> Result<Vec<(usize, R)>> {
        let _occupied = phi3_kernels::occupy_thread();
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else {
                return Ok(done);
            };
            let result = f(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?;
            done.push((index, result));
        }
    };
    let mut done = thread::scope(|scope| {
        // Where the system has no thread left, those that there are do the work.
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, lane).ok();
        let others: Vec<_> = (1..lanes).filter_map(spawn).collect();
        let mut done = lane();
        for other in others {
            let more = other.join().unwrap_or_else(|panic| resume_unwind(panic));
            done = done.and_then(|mut done| {
                done.extend(more?);
                Ok(done)
            });
        }
        done
    })?;
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_it() -> Result<()> {
        let items: Vec<usize> = (0..40).collect();
        for most in [0, 1, 2, 9] {
            let slow_first = |x: &usize| {
                thread::sleep(std::time::Duration::from_micros(
                    ((40 - x) % 5) as u64 * 100,
                ));
                Ok(*x)
            };
            assert_eq!(in_lanes(&items, most, slow_first)?, items);
            let begun = AtomicUsize::new(0);
            let fails = |x: &usize| {
                begun.fetch_add(1, Ordering::Relaxed);
                match x {
                    3 => Err(Error::Batch("three".to_owned())),
                    _ => Ok(()),
                }
            };
            let error = in_lanes(&items, most, fails).unwrap_err();
            assert!(error.to_string().contains("three"));
            let begun = begun.into_inner();
            // Other lanes may be far ahead of the one that fails.
            assert!(begun == 4 || most > 1, "{begun}");
        }
        assert!(in_lanes(&items[..0], 4, |x| Ok(*x))?.is_empty());
        Ok(())
    }
}
