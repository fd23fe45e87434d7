//! Threads that wait for pieces of work.
//!
//! A forward pass is hundreds of kernels one after another, each a fraction of a millisecond. To wake a
//! sleeping thread takes tens of microseconds, more on a virtual machine, and as often again for the
//! caller that sleeps until all is done. So the caller works, too, and whoever waits looks for a
//! moment whether there is something to do before going to sleep.

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work, or a caller for the last results, before it sleeps: longer than
/// what a forward pass does between two kernels, short beside a time slice that others may need.
const LOOKS: Duration = Duration::from_micros(200);

/// Looks between two questions for the time.
const LOOKS_AT_ONCE: usize = 64;

thread_local! {
    /// Whether this thread is in a task.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
    /// Whether this thread is counted as busy between its calls, too.
    static OCCUPIED: Cell<bool> = const { Cell::new(false) };
}

/// A number of threads, of which a caller is one.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Callers and workers that may be in tasks at a time.
    threads: usize,
    state: Mutex<State>,
    /// Where workers sleep.
    wake: Condvar,
    /// How many jobs there have been, so that looking needs no lock.
    epoch: AtomicU64,
    /// Threads in tasks, and those that are counted as busy between them.
    busy: AtomicUsize,
}

/// While it lives, its thread counts as one that works, as [`Pool::occupy`] says.
#[derive(Debug)]
pub(super) struct Occupied {
    /// None where the thread was counted already.
    shared: Option<Arc<Shared>>,
    /// What a thread counts for may not end on another one.
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            OCCUPIED.set(false);
            shared.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Jobs whose callers have not returned yet.
    jobs: Vec<Arc<Job>>,
    sleepers: usize,
    closed: bool,
}

impl Pool {
    /// `threads` threads, or one where the system refuses to start them.
    pub(super) fn new(threads: usize) -> Self {
        let pool = Self {
            shared: Arc::new(Shared::new(threads)),
        };
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name(format!("phi3-kernels-{i}"));
            if builder.spawn(move || shared.work()).is_err() {
                // The caller is then the only one; those that did start end with `pool`.
                return Self {
                    shared: Arc::new(Shared::new(1)),
                };
            }
        }
        pool
    }

    pub(super) fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Calls `f(i, item)` for every item i and returns when all calls have. Each thread begins with
    /// a range of its own and then helps with those of others. In a task of another call the caller
    /// does all.
    ///
    /// # Panics
    /// When a call panics, after the others have returned.
    pub(super) fn for_each<T: Send>(&self, items: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
        if items.len() < 2 || self.threads() == 1 || IN_TASK.get() {
            items
                .iter_mut()
                .enumerate()
                .for_each(|(i, item)| f(i, item));
            return;
        }
        let base = Base(items.as_mut_ptr());
        let call = |i: usize| {
            // SAFETY: a job calls once for each index below its number of tasks, which is that of
            // the items, and `run` returns when all calls have; so this is the only reference to
            // the item while it lives. `T: Send` lets another thread have it.
            f(i, unsafe { &mut *base.at(i) });
        };
        self.shared.run(items.len(), &call);
    }

    /// Counts the calling thread as one that works, between its calls as well as in them, so that no
    /// worker takes its core meanwhile.
    pub(super) fn occupy(&self) -> Occupied {
        let shared = (!OCCUPIED.replace(true)).then(|| {
            self.shared.busy.fetch_add(1, Ordering::Relaxed);
            Arc::clone(&self.shared)
        });
        Occupied {
            shared,
            of_this_thread: PhantomData,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.wake.notify_all();
    }
}

/// The first of several items.
struct Base<T>(*mut T);

impl<T> Base<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

// SAFETY: the pointer is dereferenced by `for_each` alone, which says why that is right.
unsafe impl<T: Send> Sync for Base<T> {}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            state: Mutex::default(),
            wake: Condvar::new(),
            epoch: AtomicU64::new(0),
            busy: AtomicUsize::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it has the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `call` for 0 to `tasks - 1`, with whatever threads come.
    fn run(&self, tasks: usize, call: &(dyn Fn(usize) + Sync)) {
        let job = Arc::new(Job::new(tasks, self.threads.min(tasks), call));
        let uncounted = usize::from(!OCCUPIED.get());
        let busy = uncounted + self.busy.fetch_add(uncounted, Ordering::Relaxed);
        let wanted = {
            let mut state = self.state();
            state.jobs.push(Arc::clone(&job));
            self.epoch.fetch_add(1, Ordering::Release);
            let idle = self.threads.saturating_sub(busy);
            state.sleepers.min(tasks - 1).min(idle)
        };
        for _ in 0..wanted {
            self.wake.notify_one();
        }
        job.work();
        job.wait();
        self.busy.fetch_sub(uncounted, Ordering::Relaxed);
        self.state().jobs.retain(|other| !Arc::ptr_eq(other, &job));
        if let Some(panic) = job
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            resume_unwind(panic);
        }
    }

    /// What a worker does all its life.
    fn work(&self) {
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if let Some(job) = self.join(&self.state()) {
                job.work();
                self.busy.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            // Where all cores are taken, looking would take one from those who work.
            let full = self.busy.load(Ordering::Relaxed) >= self.threads;
            if !full && look(|| self.epoch.load(Ordering::Acquire) != epoch) {
                continue;
            }
            let mut state = self.state();
            // What came since is seen with the lock, with which it was entered.
            while self.epoch.load(Ordering::Acquire) == epoch {
                if state.closed {
                    return;
                }
                state.sleepers += 1;
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.sleepers -= 1;
            }
        }
    }

    /// A job that has tasks left, if there are not threads enough in tasks; counts this thread as
    /// one.
    fn join(&self, state: &State) -> Option<Arc<Job>> {
        let job = state.jobs.iter().find(|job| job.has_tasks())?;
        let more = |busy: usize| (busy < self.threads).then_some(busy + 1);
        let counted = self
            .busy
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        counted.is_ok().then(|| Arc::clone(job))
    }
}

/// Whether `found` comes true within [`LOOKS`].
fn look(found: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS_AT_ONCE {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > LOOKS {
            return false;
        }
    }
}

/// Some tasks of a caller.
struct Job {
    /// Valid until the last task has returned.
    call: *const (dyn Fn(usize) + Sync),
    /// Successive tasks, for each thread that may come.
    ranges: Vec<Tasks>,
    /// Threads that have come.
    threads: AtomicUsize,
    /// Tasks that have not returned.
    unfinished: AtomicUsize,
    caller: Thread,
    /// Of the first task that panicked.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Tasks that are not taken yet; alone in their lines of the cache, since threads write here all the
/// time.
#[repr(align(128))]
struct Tasks {
    next: AtomicUsize,
    end: usize,
}

// SAFETY: `call` points to a function that threads may share, and `Job::work` says why it is still
// there when it is called; everything else is shared by its own means.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("unfinished", &self.unfinished)
            .finish_non_exhaustive()
    }
}

impl Job {
    fn new(tasks: usize, threads: usize, call: &(dyn Fn(usize) + Sync)) -> Self {
        let range = |i: usize| Tasks {
            next: AtomicUsize::new(i * tasks / threads),
            end: (i + 1) * tasks / threads,
        };
        let call = std::ptr::from_ref(call);
        Self {
            // SAFETY: only the lifetime changes, which `run` keeps: it returns after the last call.
            call: unsafe {
                std::mem::transmute::<
                    *const (dyn Fn(usize) + Sync + '_),
                    *const (dyn Fn(usize) + Sync + 'static),
                >(call)
            },
            ranges: (0..threads).map(range).collect(),
            threads: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(tasks),
            caller: thread::current(),
            panic: Mutex::new(None),
        }
    }

    fn has_tasks(&self) -> bool {
        let left = |tasks: &Tasks| tasks.next.load(Ordering::Relaxed) < tasks.end;
        self.ranges.iter().any(left)
    }

    /// Does tasks until none is left: of a range of this thread's own, then of the others.
    fn work(&self) {
        IN_TASK.set(true);
        let own = self.threads.fetch_add(1, Ordering::Relaxed);
        for i in 0..self.ranges.len() {
            let tasks = &self.ranges[(own + i) % self.ranges.len()];
            loop {
                let task = tasks.next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks.end {
                    break;
                }
                // SAFETY: this task is unfinished, so its caller has not returned, and what it gave
                // is still there.
                let call = unsafe { &*self.call };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| call(task))) {
                    let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(panic);
                }
                if self.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.caller.unpark();
                }
            }
        }
        IN_TASK.set(false);
    }

    /// Until the tasks that other threads have taken have returned.
    fn wait(&self) {
        let finished = || self.unfinished.load(Ordering::Acquire) == 0;
        if finished() || look(finished) {
            return;
        }
        while !finished() {
            thread::park();
        }
    }
}

// Not on WebAssembly, which has no threads here and ends at a panic.
#[cfg(all(test, not(target_family = "wasm")))]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_visited_once_by_many_callers() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for round in 0..200 {
                            let mut items = vec![0; round % 40];
                            pool.for_each(&mut items, |i, item| *item += i + 1);
                            assert!(items.iter().enumerate().all(|(i, item)| *item == i + 1));
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn sleepers_wake() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            thread::sleep(10 * LOOKS);
            let (mut items, caller) = ([false; 2], thread::current().id());
            // The caller's task takes so long that the worker comes for the other one.
            pool.for_each(&mut items, |_, other| {
                thread::sleep(Duration::from_millis(100));
                *other = thread::current().id() != caller;
            });
            assert!(items.contains(&true) && items.contains(&false), "{items:?}");
        }
    }

    #[test]
    fn nobody_helps_where_all_threads_are_occupied() {
        let pool = Pool::new(2);
        let helped = |pool: &Pool| {
            let (mut items, caller) = ([false; 4], thread::current().id());
            pool.for_each(&mut items, |_, other| {
                thread::sleep(Duration::from_millis(20));
                *other = thread::current().id() != caller;
            });
            items.contains(&true)
        };
        let all = std::sync::Barrier::new(2);
        let of_two = || {
            let occupied = pool.occupy();
            // Counted once, however often it says so.
            drop(pool.occupy());
            all.wait();
            assert!(!helped(&pool), "both threads are occupied");
            all.wait();
            drop(occupied);
        };
        thread::scope(|scope| {
            scope.spawn(of_two);
            of_two();
        });
        assert!(helped(&pool), "the other one is free again");
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(&mut [(); 8], |i, ()| {
                assert!(i != 3, "three");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let panic = result.unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"three"));
        assert_eq!(done.into_inner(), 7);
        // And the pool works on.
        let mut items = [0; 8];
        pool.for_each(&mut items, |i, item| *item = i);
        assert_eq!(items, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_dropped_pool_ends_its_threads() {
        let shared = Arc::downgrade(&Pool::new(3).shared);
        let start = Instant::now();
        while shared.strong_count() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "threads go on");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
