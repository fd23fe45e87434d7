//! A mixture of experts as the hub spells it, however the checkpoint does.
//!
//! transformers 5 writes a layer's router as `mlp.router.weight` and its experts as
//! `mlp.experts.gate_up_proj` `[E, 2I, H]` and `mlp.experts.down_proj` `[E, H, I]`; the hub has
//! `block_sparse_moe.gate.weight` and `block_sparse_moe.experts.N.w1`, `w3`, `w2`.

use std::collections::BTreeMap;
use std::sync::Arc;

use phi3_nn::{StoredTensor, TensorPart, TensorSource};

/// `source` itself, unless it has experts in the spelling of transformers 5.
pub(super) fn of_hub(source: &Arc<dyn TensorSource>) -> Arc<dyn TensorSource> {
    let names = source.names();
    if !names.iter().any(|name| name.ends_with(GATE_UP)) {
        return Arc::clone(source);
    }
    let mut places = BTreeMap::new();
    for name in names {
        let whole = |stored: String| (stored, Place::Whole);
        if let Some(layer) = name.strip_suffix(ROUTER) {
            let hub = format!("{layer}.block_sparse_moe.gate.weight");
            places.insert(hub, whole(name.clone()));
        } else if let Some(layer) = name.strip_suffix(GATE_UP) {
            for (expert, half) in
                (0..experts(source.as_ref(), &name)).flat_map(|e| [(e, 0), (e, 1)])
            {
                let matrix = ["w1", "w3"][half];
                let hub = format!("{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight");
                places.insert(hub, (name.clone(), Place::Half { expert, half }));
            }
        } else if let Some(layer) = name.strip_suffix(DOWN) {
            for expert in 0..experts(source.as_ref(), &name) {
                let hub = format!("{layer}.block_sparse_moe.experts.{expert}.w2.weight");
                places.insert(hub, (name.clone(), Place::Expert(expert)));
            }
        } else {
            places.insert(name.clone(), whole(name));
        }
    }
    Arc::new(HubSpelling {
        inner: Arc::clone(source),
        places,
    })
}

const ROUTER: &str = ".mlp.router.weight";
const GATE_UP: &str = ".mlp.experts.gate_up_proj";
const DOWN: &str = ".mlp.experts.down_proj";

/// A tensor that cannot be read has none; asking for one of its experts says that it is missing.
fn experts(source: &dyn TensorSource, name: &str) -> usize {
    let tensor = source.tensor(name).ok().flatten();
    let experts = tensor.and_then(|tensor| tensor.shape().first().copied());
    experts.unwrap_or(0)
}

/// Where a tensor of the hub lies within the one that holds it.
enum Place {
    Whole,
    Expert(usize),
    Half { expert: usize, half: usize },
}

struct HubSpelling {
    inner: Arc<dyn TensorSource>,
    /// By the hub's name: the stored tensor's, and the place in it.
    places: BTreeMap<String, (String, Place)>,
}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

impl TensorSource for HubSpelling {
    fn tensor(&self, name: &str) -> Result<Option<StoredTensor>, Boxed> {
        let Some((stored, place)) = self.places.get(name) else {
            return Ok(None);
        };
        let Some(tensor) = self.inner.tensor(stored)? else {
            return Ok(None);
        };
        Ok(Some(match place {
            Place::Whole => tensor,
            Place::Expert(expert) => tensor.at(*expert)?,
            Place::Half { expert, half } => half_of(&tensor.at(*expert)?, *half)?,
        }))
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn origin(&self) -> String {
        self.inner.origin()
    }
}

/// The upper or the lower half of a matrix's rows, in place.
fn half_of(matrix: &StoredTensor, half: usize) -> Result<StoredTensor, Boxed> {
    let ([rows, columns], [part]) = (matrix.shape(), matrix.parts()) else {
        return Err("an expert is no matrix in one part".into());
    };
    let (rows, size) = (rows / 2, part.bytes.len() / 2);
    let bytes = part.bytes.slice(half * size..(half + 1) * size);
    let part = TensorPart {
        block_type: part.block_type,
        rows,
        bytes: bytes.ok_or("it has no such half")?,
    };
    Ok(StoredTensor::stacked(vec![rows, *columns], vec![part])?)
}

#[cfg(test)]
mod tests {
    use phi3_kernels::BlockType;
    use phi3_nn::MemorySource;

    use super::*;

    #[test]
    fn experts_of_transformers_5_are_found_under_the_hubs_names() {
        let (experts, inner, hidden) = (2, 3, 4);
        let numbered = |shape: &[usize]| {
            let values = (0..shape.iter().product::<usize>()).map(|i| i as f32);
            let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
            StoredTensor::new(shape.to_vec(), BlockType::F32, bytes.into()).unwrap()
        };
        let mut source = MemorySource::new();
        source.insert("l.mlp.router.weight", numbered(&[experts, hidden]));
        source.insert(
            "l.mlp.experts.gate_up_proj",
            numbered(&[experts, 2 * inner, hidden]),
        );
        source.insert(
            "l.mlp.experts.down_proj",
            numbered(&[experts, hidden, inner]),
        );
        source.insert("model.norm.weight", numbered(&[hidden]));
        let source: Arc<dyn TensorSource> = Arc::new(source);
        let hub = of_hub(&source);
        assert_eq!(hub.names().len(), 2 + 3 * experts);
        let first = |name: &str| {
            let tensor = hub.tensor(name).unwrap().unwrap();
            (tensor.shape().to_vec(), tensor.to_f32().unwrap()[0])
        };
        let expert = |name: &str| first(&format!("l.block_sparse_moe.experts.{name}.weight"));
        assert_eq!(first("l.block_sparse_moe.gate.weight"), (vec![2, 4], 0.0));
        assert_eq!(first("model.norm.weight"), (vec![4], 0.0));
        assert_eq!(expert("0.w1"), (vec![3, 4], 0.0));
        assert_eq!(expert("0.w3"), (vec![3, 4], 12.0));
        assert_eq!(expert("1.w1"), (vec![3, 4], 24.0));
        assert_eq!(expert("1.w3"), (vec![3, 4], 36.0));
        assert_eq!(expert("1.w2"), (vec![4, 3], 12.0));
        assert!(hub.tensor("l.mlp.experts.down_proj").unwrap().is_none());
        // What has the hub's names already is left as it is.
        let again = of_hub(&hub);
        assert!(Arc::ptr_eq(&hub, &again));
    }
}
