//! The heads of queries, keys and values in the rows of one projection.

use candle_core::{Device, Tensor};
use phi3_kernels::{Heads, Rotation, take_heads};

use crate::error::{Error, Result};
use crate::host;
use crate::rope::RopeTables;

/// Where the heads of queries, keys and values lie in a row of a fused projection.
#[derive(Clone, Debug)]
pub struct FusedHeads {
    head_dim: usize,
    queries: Vec<usize>,
    keys: Vec<usize>,
    values: Vec<usize>,
}

/// What attention reads of each row.
#[derive(Clone, Debug)]
pub struct Qkv {
    /// Rotated, `[n, h, d]`.
    pub queries: Tensor,
    /// Rotated, `[n, k, d]`.
    pub keys: Tensor,
    /// `[n, k, d]`.
    pub values: Tensor,
}

impl FusedHeads {
    /// All queries, then all keys, then all values.
    pub fn side_by_side(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        let (keys, values) = (num_heads, num_heads + num_kv_heads);
        Self {
            head_dim,
            queries: (0..keys).collect(),
            keys: (keys..values).collect(),
            values: (values..values + num_kv_heads).collect(),
        }
    }

    /// For each key/value head the queries that read it, then its key, then its value.
    pub fn grouped(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        let in_group = num_heads.checked_div(num_kv_heads).unwrap_or(0);
        let group = |i: usize| i * (in_group + 2);
        Self {
            head_dim,
            queries: (0..num_kv_heads)
                .flat_map(|i| group(i)..group(i) + in_group)
                .collect(),
            keys: (0..num_kv_heads).map(|i| group(i) + in_group).collect(),
            values: (0..num_kv_heads).map(|i| group(i) + in_group + 1).collect(),
        }
    }

    /// Elements of a row.
    pub fn row_len(&self) -> usize {
        self.in_row() * self.head_dim
    }

    fn in_row(&self) -> usize {
        self.queries.len() + self.keys.len() + self.values.len()
    }

    /// Cuts the rows of `qkv` `[n, row_len]` into heads, and rotates queries and keys.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use phi3_nn::{FusedHeads, Regime, RotaryEmbedding, rope::RopeParameters};
    /// let parameters = RopeParameters { theta: 1e4, rotary_dim: 2, long: None };
    /// let rows = [(0, Regime::Short)].into_iter(); // position 0 turns by nothing
    /// let rope = RotaryEmbedding::new(&parameters).tables(rows, &Device::Cpu)?;
    /// let qkv = Tensor::new(&[[0f32, 1., 2., 3., 4., 5., 6., 7.]], &Device::Cpu)?;
    /// let split = FusedHeads::side_by_side(2, 1, 2).split(&qkv, &rope)?;
    /// assert_eq!(split.queries.to_vec3::<f32>()?, [[[0., 1.], [2., 3.]]]);
    /// assert_eq!(split.values.to_vec3::<f32>()?, [[[6., 7.]]]);
    /// # Ok::<(), phi3_nn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Batch`] if rows have another length, or rope another number of them;
    /// [`Error::Candle`] if a tensor operation fails.
    pub fn split(&self, qkv: &Tensor, rope: &RopeTables) -> Result<Qkv> {
        let (rows, columns) = qkv.dims2()?;
        if columns != self.row_len() {
            return Err(Error::Batch(format!(
                "rows of {columns} elements are no {} heads of {}",
                self.in_row(),
                self.head_dim
            )));
        }
        if qkv.device().is_cpu() && !qkv.track_op() {
            let heads = (self.in_row(), self.head_dim);
            return Ok(Qkv {
                queries: rope.take(qkv, heads, &self.queries)?,
                keys: rope.take(qkv, heads, &self.keys)?,
                values: take(qkv, heads, &self.values, None)?,
            });
        }
        let qkv = qkv.reshape((rows, self.in_row(), self.head_dim))?;
        Ok(Qkv {
            queries: rope.apply_with_candle(&take_with_candle(&qkv, &self.queries)?)?,
            keys: rope.apply_with_candle(&take_with_candle(&qkv, &self.keys)?)?,
            values: take_with_candle(&qkv, &self.values)?,
        })
    }
}

/// Some heads of the rows of `x`, on the CPU, rotated if there is a `rotation`: `[n, taken, d]`.
pub(crate) fn take(
    x: &Tensor,
    (in_row, head_dim): (usize, usize),
    taken: &[usize],
    rotation: Option<Rotation<'_>>,
) -> Result<Tensor> {
    let rows = x.dim(0)?;
    if let Some(rotation) = rotation
        && rotation.cos.len() != rows * rotation.half
    {
        return Err(Error::Batch(format!(
            "{rows} rows cannot be rotated by the angles of {}",
            rotation.cos.len() / rotation.half.max(1)
        )));
    }
    let mut out = vec![0f32; rows * taken.len() * head_dim];
    let heads = Heads {
        head_dim,
        in_row,
        taken,
    };
    host::with_f32(x, |x| take_heads(x, heads, rotation, &mut out))?;
    Ok(Tensor::from_vec(
        out,
        (rows, taken.len(), head_dim),
        &Device::Cpu,
    )?)
}

/// [`take`] of `x` `[n, in_row, d]` in candle operations: any device, differentiable.
fn take_with_candle(x: &Tensor, taken: &[usize]) -> Result<Tensor> {
    let (first, count) = (taken.first().copied().unwrap_or(0), taken.len());
    if taken.iter().copied().eq(first..first + count) {
        return Ok(x.narrow(1, first, count)?.contiguous()?);
    }
    let taken: Vec<u32> = taken.iter().map(|head| *head as u32).collect();
    Ok(x.index_select(&Tensor::new(taken, x.device())?, 1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::rope::{Regime, RopeParameters, RotaryEmbedding};

    #[test]
    fn both_ways_of_splitting_agree_for_both_layouts() -> Result<()> {
        let (num_heads, num_kv_heads, head_dim, n) = (6, 2, 4, 5);
        let parameters = RopeParameters {
            theta: 1e4,
            rotary_dim: 4,
            long: None,
        };
        let rows = (0..n).map(|position| (position, Regime::Short));
        let rope = RotaryEmbedding::new(&parameters).tables(rows, &Device::Cpu)?;
        for (heads, third_query, second_key) in [
            (
                FusedHeads::side_by_side(num_heads, num_kv_heads, head_dim),
                3,
                7,
            ),
            (FusedHeads::grouped(num_heads, num_kv_heads, head_dim), 5, 8),
        ] {
            assert_eq!((heads.queries[3], heads.keys[1]), (third_query, second_key));
            let qkv = Tensor::randn(0f32, 1.0, (n, heads.row_len()), &Device::Cpu)?;
            let fast = heads.split(&qkv, &rope)?;
            let tracked = Var::from_tensor(&qkv)?;
            let slow = heads.split(&tracked, &rope)?;
            for (fast, slow) in [
                (fast.queries, slow.queries),
                (fast.keys, slow.keys),
                (fast.values, slow.values),
            ] {
                let difference = (fast - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(difference < 1e-6, "{heads:?}: {difference}");
            }
            assert!(heads.split(&qkv.narrow(1, 0, 8)?, &rope).is_err());
            assert!(heads.split(&qkv.narrow(0, 0, 2)?, &rope).is_err());
        }
        Ok(())
    }
}
