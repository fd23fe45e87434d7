//! What a random model in the shape of Phi-3-small has of its own.

use serde_json::{Value as Json, json};

use super::{Error, RandomModel};
use crate::gguf::small;

impl RandomModel {
    pub(super) fn set_small(&mut self) {
        let prefix = self.shape.architecture().name();
        // Every field is a number that this file wrote, so that none is missing or of another type.
        for (key, value) in small::values(&self.small_config()).unwrap_or_default() {
            self.writer.set(format!("{prefix}.{key}"), value);
        }
    }

    /// config.json of the published checkpoints, with this shape's sizes.
    fn small_config(&self) -> Json {
        let shape = self.shape;
        let longrope = shape.attention_factor().is_some().then(|| {
            json!({
                "type": "longrope",
                "original_max_position_embeddings": shape.trained,
                "short_factor": vec![1.0; shape.rotary_dim / 2],
                "long_factor": shape.long_factors(),
            })
        });
        json!({
            "vocab_size": shape.vocab,
            "max_position_embeddings": shape.context,
            "hidden_size": shape.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "ff_intermediate_size": shape.intermediate,
            "layer_norm_epsilon": 1e-5,
            "dense_attention_every_n_layers": 2,
            "blocksparse_block_size": 64,
            "blocksparse_num_local_blocks": 16,
            "blocksparse_vert_stride": 8,
            "blocksparse_homo_head_pattern": false,
            "gegelu_limit": 20.0,
            "mup_use_scaling": true,
            "mup_attn_multiplier": 1.0,
            "mup_embedding_multiplier": 10.0,
            "mup_width_multiplier": 8.0,
            "rope_embedding_base": 1e6,
            "rope_scaling": longrope,
        })
    }

    pub(super) fn add_small_layer(&mut self, layer: usize) -> Result<(), Error> {
        let shape = self.shape;
        let (hidden, inner) = (shape.hidden, shape.intermediate);
        let qkv = hidden / shape.heads * (shape.heads + 2 * shape.kv_heads);
        let prefix = format!("model.layers.{layer}");
        for (name, rows, columns) in [
            ("self_attn.query_key_value", qkv, hidden),
            ("self_attn.dense", hidden, hidden),
            ("mlp.up_proj", 2 * inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            let name = format!("{prefix}.{name}");
            self.add(&format!("{name}.weight"), &[rows, columns], Some(layer))?;
            self.add(&format!("{name}.bias"), &[rows], None)?;
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            for kind in ["weight", "bias"] {
                self.add(&format!("{prefix}.{name}.{kind}"), &[hidden], None)?;
            }
        }
        Ok(())
    }
}
