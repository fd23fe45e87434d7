//! What a pass through a model reads and computes, from the list of its tensors.

use std::collections::BTreeMap;

use phi3::hub::TensorEntry;
use phi3::hub::gguf::hf_name;

/// A model's weights, as a forward pass uses them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Types that hold a tenth of the bytes or more, the largest first: `Q4_K+Q6_K`.
    pub kind: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of all weights.
    pub parameters: u64,
    /// Bytes that every pass reads: all but an embedding that is not the head too.
    pub read: u64,
    /// Weights of matrices that each token is multiplied with.
    pub per_token: u64,
    /// Those of the head, which only tokens whose logits are wanted meet.
    pub head: u64,
    /// Whether most bytes are quantized, so that products of integers are the limit.
    pub quantized: bool,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl Weights {
    /// The sums over a file's tensors.
    pub fn of(tensors: &[TensorEntry]) -> Self {
        let name = |tensor: &TensorEntry| hf_name(&tensor.name).unwrap_or(tensor.name.clone());
        let tied = !tensors.iter().any(|tensor| name(tensor) == HEAD);
        let mut sums = Self::default();
        let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
        for tensor in tensors {
            let count: u64 = tensor.shape.iter().map(|&axis| axis as u64).product();
            let name = name(tensor);
            sums.bytes += tensor.bytes;
            sums.parameters += count;
            *kinds.entry(&tensor.dtype).or_default() += tensor.bytes;
            let is_head = name == HEAD || tied && name == EMBEDDING;
            if is_head {
                sums.head += count;
            } else if tensor.shape.len() > 1 && name != EMBEDDING {
                sums.per_token += count;
            }
            if is_head || name != EMBEDDING {
                sums.read += tensor.bytes;
            }
        }
        let mut kinds: Vec<(&str, u64)> = kinds.into_iter().collect();
        kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let floats = ["F64", "F32", "F16", "BF16"];
        sums.quantized = kinds
            .first()
            .is_some_and(|(kind, _)| !floats.contains(kind));
        kinds.retain(|(_, bytes)| bytes * 10 >= sums.bytes);
        let kinds: Vec<&str> = kinds.into_iter().map(|(kind, _)| kind).collect();
        sums.kind = kinds.join("+");
        sums
    }

    /// The same where each token takes only a share of the experts: the others are neither read nor
    /// multiplied for it. A pass of many tokens reads more of them than is counted here.
    pub fn with_experts_taken(mut self, tensors: &[TensorEntry], share: f64) -> Self {
        let is_expert = |name: &str| name.contains("_exps.") || name.contains(".experts.");
        let others = |count: u64| (count as f64 * (1.0 - share)) as u64;
        for tensor in tensors.iter().filter(|tensor| is_expert(&tensor.name)) {
            let count: u64 = tensor.shape.iter().map(|&axis| axis as u64).product();
            self.per_token -= others(count).min(self.per_token);
            self.read -= others(tensor.bytes).min(self.read);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: &str, shape: &[usize], bytes: u64) -> TensorEntry {
        TensorEntry {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            bytes,
            file: String::new(),
        }
    }

    #[test]
    fn an_embedding_is_read_when_it_is_the_head() {
        let mut tensors = vec![
            tensor("token_embd.weight", "Q4_0", &[10, 32], 180),
            tensor("blk.0.attn_qkv.weight", "Q4_0", &[96, 32], 1728),
            tensor("blk.0.attn_norm.weight", "F32", &[32], 128),
        ];
        let tied = Weights::of(&tensors);
        let expected = Weights {
            kind: "Q4_0".to_owned(),
            bytes: 2036,
            parameters: 3424,
            read: 2036,
            per_token: 3072,
            head: 320,
            quantized: true,
        };
        assert_eq!(tied, expected);
        tensors.push(tensor("output.weight", "Q6_K", &[10, 32], 263));
        let apart = Weights::of(&tensors);
        assert_eq!((apart.read, apart.head), (2036 - 180 + 263, 320));
        assert_eq!(apart.kind, "Q4_0+Q6_K");
    }

    #[test]
    fn only_the_experts_that_a_token_takes_count() {
        let tensors = [
            tensor("output.weight", "F16", &[10, 4], 80),
            tensor("blk.0.attn_q.weight", "F16", &[4, 4], 32),
            tensor("blk.0.ffn_up_exps.weight", "F16", &[8, 4, 4], 256),
        ];
        let all = Weights::of(&tensors);
        assert_eq!((all.read, all.per_token), (368, 144));
        let taken = all.clone().with_experts_taken(&tensors, 0.25);
        assert_eq!((taken.read, taken.per_token), (80 + 32 + 64, 16 + 32));
        assert_eq!((taken.bytes, taken.head), (all.bytes, all.head));
    }

    #[test]
    fn safetensors_have_their_own_names() {
        let weights = Weights::of(&[
            tensor(EMBEDDING, "BF16", &[10, 4], 80),
            tensor(HEAD, "BF16", &[10, 4], 80),
        ]);
        assert_eq!((weights.read, weights.quantized), (80, false));
        assert_eq!(Weights::of(&[]), Weights::default());
    }
}
