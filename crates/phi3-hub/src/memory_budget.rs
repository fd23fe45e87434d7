//! A model larger than memory: groups of weights kept by recent use, within a budget.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use phi3_nn::{Bytes, Residency};

use crate::mapping::{drop_pages, read_ahead};

/// Keeps the groups of weights that were used last, up to so many bytes; lets go of the others by
/// advice to the kernel, and reads ahead those that are announced.
///
/// Only mapped bytes can be let go. The bytes stay where they are, and are read from disk again when
/// they are touched, unless the kernel still has them in its page cache, which no process can see.
///
/// ```
/// use phi3_hub::MemoryBudget;
/// use phi3_nn::Residency;
///
/// let budget = MemoryBudget::new(10);
/// let groups = [6, 5, 4].map(|len| budget.register(vec![vec![0u8; len].into()]));
/// budget.announce(&[groups[0]]);
/// budget.announce(&[groups[2]]); // together 10
/// budget.announce(&[groups[0]]); // there already
/// budget.announce(&[groups[1]]); // the one of 4 was used longest ago, and 6 + 5 are too many too
/// let found = budget.counters();
/// assert_eq!((found.hits, found.misses, found.bytes_read), (1, 3, 15));
/// assert_eq!((found.resident_bytes, found.dropped), (5, 2));
/// ```
#[derive(Debug)]
pub struct MemoryBudget(Mutex<State>);

#[derive(Debug)]
struct State {
    limit: u64,
    groups: Vec<Group>,
    /// Groups that are in memory, by the time of their last use.
    recent: BTreeSet<(u64, usize)>,
    clock: u64,
    counters: Counters,
}

#[derive(Debug)]
struct Group {
    parts: Vec<Bytes>,
    bytes: u64,
    /// The time of the last use, if the group is in memory.
    used: Option<u64>,
}

/// What keeping within a budget took so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Announced groups that were in memory.
    pub hits: u64,
    /// Those that were not.
    pub misses: u64,
    /// Groups that were let go.
    pub dropped: u64,
    /// Bytes of all misses.
    pub bytes_read: u64,
    /// Bytes of the groups in memory now.
    pub resident_bytes: u64,
    /// Bytes of all groups.
    pub group_bytes: u64,
}

impl MemoryBudget {
    /// No group yet; `limit` is in bytes.
    pub fn new(limit: u64) -> Self {
        Self(Mutex::new(State {
            limit,
            groups: Vec::new(),
            recent: BTreeSet::new(),
            clock: 0,
            counters: Counters::default(),
        }))
    }

    /// Sets the limit, once it is known what else there is.
    pub fn set_limit(&self, limit: u64) {
        self.state().limit = limit;
    }

    /// The limit, in bytes.
    pub fn limit(&self) -> u64 {
        self.state().limit
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.state().counters
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Residency for MemoryBudget {
    fn register(&self, parts: Vec<Bytes>) -> usize {
        let mut state = self.state();
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        state.counters.group_bytes += bytes;
        state.groups.push(Group {
            parts,
            bytes,
            used: None,
        });
        state.groups.len() - 1
    }

    /// The announced groups stay, even where they alone are more than the limit.
    fn announce(&self, groups: &[usize]) {
        self.state().announce(groups);
    }
}

impl State {
    fn announce(&mut self, announced: &[usize]) {
        self.clock += 1;
        let now = self.clock;
        let mut missing = Vec::new();
        for &idx in announced {
            let Some(group) = self.groups.get_mut(idx) else {
                continue;
            };
            match group.used.replace(now) {
                Some(before) => {
                    self.recent.remove(&(before, idx));
                    self.counters.hits += 1;
                }
                None => {
                    self.counters.misses += 1;
                    self.counters.bytes_read += group.bytes;
                    self.counters.resident_bytes += group.bytes;
                    missing.push(idx);
                }
            }
            self.recent.insert((now, idx));
        }
        // Room is made first, so that the kernel need not find it under pressure.
        while self.counters.resident_bytes > self.limit
            && let Some(&(used, idx)) = self.recent.first()
            && used < now
        {
            self.recent.remove(&(used, idx));
            if let Some(group) = self.groups.get_mut(idx) {
                group.used = None;
                self.counters.dropped += 1;
                self.counters.resident_bytes -= group.bytes;
                group.parts.iter().for_each(drop_pages);
            }
        }
        for group in missing.iter().filter_map(|idx| self.groups.get(*idx)) {
            group.parts.iter().for_each(read_ahead);
        }
    }
}
