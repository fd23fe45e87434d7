//! The loops in portable Rust: what the compiler makes of them for any processor of the
//! architecture.

use std::hint::black_box;

use super::Loops;

/// Numbers that a step works on; they fill the registers of any processor.
const LANES: usize = 32;
const STEPS: usize = 2048;

/// Numbers that the int8 loop goes through; they stay in the first-level cache.
const BYTES: usize = 4096;
const PASSES: usize = 16;

pub(super) fn loops() -> Loops {
    Loops {
        name: "portable",
        f32: Box::new(multiply_add),
        int8: Box::new(dot),
    }
}

/// The sum of all numbers, modulo 2^64.
#[inline(always)]
pub(super) fn read(part: &[u64]) -> u64 {
    let (chunks, tail) = part.as_chunks::<32>();
    let mut lanes = [0u64; 32];
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*number);
        }
    }
    let all = lanes.iter().chain(tail);
    all.fold(0, |sum, number| sum.wrapping_add(*number))
}

fn multiply_add() -> u64 {
    let mut sums = black_box([1.0f32; LANES]);
    let (factor, summand) = black_box((0.999_f32, 0.001_f32));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = *sum * factor + summand;
        }
    }
    black_box(sums);
    (2 * LANES * STEPS) as u64
}

fn dot() -> u64 {
    let (a, b) = black_box(([3i8; BYTES], [-5i8; BYTES]));
    let mut sums = [0i32; LANES];
    for _ in 0..PASSES {
        let (a, b) = black_box((&a, &b));
        let (a, b) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
        for (a, b) in a.iter().zip(b) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum += i32::from(i16::from(*a) * i16::from(*b));
            }
        }
    }
    black_box(sums);
    (2 * BYTES * PASSES) as u64
}
