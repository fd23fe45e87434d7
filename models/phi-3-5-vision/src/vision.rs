//! The image tower, top to bottom in the order of the reference's modeling file: CLIP's ViT up to
//! the hidden state that is the feature. What comes behind that is not computed, nor loaded.

use candle_core::{Device, Tensor};
use phi3_nn::{Error, LayerNorm, Linear, Result, StoredTensor, Weights, full_attention, in_lanes};

use crate::config::VisionConfig;
use crate::processor::CROP;

/// Crops that are on their way through the tower at a time: what bounds its memory, to some 60 MB for
/// each of a large tower. On the CPU each has a thread beside the kernels' own; elsewhere they go
/// together.
const CROPS_AT_ONCE: usize = 4;

/// Channels of a picture.
const CHANNELS: usize = 3;

/// Self-attention in which every patch sees every other.
#[derive(Debug)]
struct Attention {
    /// q, k and v, which the checkpoint keeps apart, as one matrix.
    qkv_proj: Linear,
    out_proj: Linear,
    num_heads: usize,
    scale: f32,
}

impl Attention {
    fn new(width: usize, num_heads: usize, weights: &Weights) -> Result<Self> {
        let (mut parts, mut biases) = (Vec::new(), Vec::new());
        for name in ["q_proj", "k_proj", "v_proj"] {
            let weights = weights.pp(name);
            parts.extend_from_slice(weights.stored("weight", &[width, width])?.parts());
            biases.push(weights.tensor_f32("bias", &[width])?);
        }
        let name = weights.full_name("qkv_proj");
        let bias = Tensor::cat(&biases, 0)?.to_dtype(weights.dtype())?;
        let stored = stacked(&name, vec![3 * width, width], parts)?;
        Ok(Self {
            qkv_proj: Linear::from_stored(name, stored, Some(bias), weights)?,
            out_proj: Linear::load(weights.pp("out_proj"), width, width, true)?,
            num_heads,
            scale: 1.0 / ((width / num_heads) as f32).sqrt(),
        })
    }

    /// The attention of x `[b·len, C]`, added to `residual`.
    fn forward(&self, x: &Tensor, len: usize, residual: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv_proj.forward(x)?; // [b·len, 3·C]
        let attended = full_attention(&qkv, self.num_heads, len, self.scale)?; // [b·len, C]
        self.out_proj.forward_plus(&attended, residual)
    }
}

/// fc2(quick_gelu(fc1(x))).
#[derive(Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn new(width: usize, weights: &Weights) -> Result<Self> {
        let (fc1, fc2) = (weights.pp("fc1"), weights.pp("fc2"));
        let inner = extent(&fc1, "bias", 0)?;
        Ok(Self {
            fc1: Linear::load(fc1, width, inner, true)?,
            fc2: Linear::load(fc2, inner, width, true)?,
        })
    }

    /// The block's output for x `[b·len, C]`, added to `residual`.
    fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let inner = self.fc1.forward_quick_gelu(x)?; // [b·len, I]
        self.fc2.forward_plus(&inner, residual)
    }
}

/// One encoder layer: attention and feed-forward block, each behind a norm and beside a residual.
#[derive(Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    self_attn: Attention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl EncoderLayer {
    fn new(width: usize, num_heads: usize, eps: f64, weights: &Weights) -> Result<Self> {
        Ok(Self {
            layer_norm1: LayerNorm::load(weights.pp("layer_norm1"), width, eps)?,
            self_attn: Attention::new(width, num_heads, &weights.pp("self_attn"))?,
            layer_norm2: LayerNorm::load(weights.pp("layer_norm2"), width, eps)?,
            mlp: Mlp::new(width, &weights.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, len: usize) -> Result<Tensor> {
        let x = &(self.self_attn).forward(&self.layer_norm1.forward(x)?, len, x)?;
        self.mlp.forward(&self.layer_norm2.forward(x)?, x)
    }
}

/// CLIP's vision model.
pub(crate) struct VisionTower {
    /// The convolution over patches, as a product with their pixels.
    patch_embedding: Linear,
    class_embedding: Tensor,    // [1, C]
    position_embedding: Tensor, // [1 + patches, C]
    pre_layrnorm: LayerNorm,
    layers: Vec<EncoderLayer>,
    width: usize,
    patch_size: usize,
    weights: Weights,
}

impl VisionTower {
    /// Builds the tower; every size is that of a tensor.
    pub(crate) fn new(config: &VisionConfig, weights: Weights) -> Result<Self> {
        let embeddings = weights.pp("embeddings");
        let width = extent(&embeddings, "class_embedding", 0)?;
        let patch_size = extent(&embeddings.pp("patch_embedding"), "weight", 3)?;
        let num_heads = config.num_attention_heads.unwrap_or(width.div_ceil(64));
        if width == 0 || !width.is_multiple_of(num_heads) {
            return Err(Error::config(format!(
                "vision_config.num_attention_heads is {num_heads}, for a tower {width} wide"
            )));
        }
        if patch_size == 0 || !CROP.is_multiple_of(2 * patch_size) {
            return Err(Error::config(format!(
                "patches of {patch_size} pixels do not fill a crop of {CROP}, two by two"
            )));
        }
        let side = CROP / patch_size;
        let patch = patch_embedding(width, patch_size, &embeddings.pp("patch_embedding"))?;
        let vector = |name, shape: &[usize]| -> Result<Tensor> {
            Ok(embeddings
                .tensor_f32(name, shape)?
                .to_dtype(weights.dtype())?)
        };
        let (class, position) = ("class_embedding", "position_embedding.weight");
        let encoder = weights.pp("encoder").pp("layers");
        let stored_layers = (0..)
            .take_while(|idx| {
                let layer = encoder.pp(idx).pp("layer_norm1");
                matches!(layer.find("weight"), Ok(Some(_)))
            })
            .count();
        let eps = config.layer_norm_eps;
        let layers = (0..used_layers(config.feature_layer, stored_layers)?)
            .map(|idx| EncoderLayer::new(width, num_heads, eps, &encoder.pp(idx)))
            .collect::<Result<_>>()?;
        Ok(Self {
            patch_embedding: patch,
            class_embedding: vector(class, &[width])?.reshape((1, width))?,
            position_embedding: vector(position, &[1 + side * side, width])?,
            pre_layrnorm: LayerNorm::load(weights.pp("pre_layrnorm"), width, eps)?,
            layers,
            width,
            patch_size,
            weights,
        })
    }

    /// Elements of a feature: C.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Patches along the side of a crop.
    pub(crate) fn side(&self) -> usize {
        CROP / self.patch_size
    }

    /// The features of `crops`, each `[3, 336, 336]`: `[crops, patches, C]`, without the class
    /// token's. Works through them in parts, so that memory does not grow with their number beyond
    /// the features themselves.
    pub(crate) fn forward(&self, crops: &[&[f32]]) -> Result<Tensor> {
        let (together, lanes) = match self.weights.device().is_cpu() {
            true => (1, CROPS_AT_ONCE),
            false => (CROPS_AT_ONCE, 1),
        };
        let chunks: Vec<&[&[f32]]> = crops.chunks(together).collect();
        let parts = in_lanes(&chunks, lanes, |crops| self.features(crops))?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn features(&self, crops: &[&[f32]]) -> Result<Tensor> {
        let (b, width) = (crops.len(), self.width);
        let patches = self.side() * self.side();
        let len = 1 + patches;
        let pixels = self.unfold(crops)?; // [b·patches, 3·p·p]
        let x = self
            .patch_embedding
            .forward(&pixels)?
            .reshape((b, patches, width))?;
        let class = self.class_embedding.broadcast_as((b, 1, width))?;
        let x = Tensor::cat(&[&class, &x], 1)? // [b, len, C]
            .broadcast_add(&self.position_embedding)?
            .reshape((b * len, width))?;
        let mut x = self.pre_layrnorm.forward(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x, len)?;
        }
        Ok(x.reshape((b, len, width))?.narrow(1, 1, patches)?)
    }

    /// The pixels of every patch in the order of the convolution's weights: channel, row, column.
    fn unfold(&self, crops: &[&[f32]]) -> Result<Tensor> {
        let (side, p) = (self.side(), self.patch_size);
        let columns = CHANNELS * p * p;
        let mut pixels = Vec::with_capacity(crops.len() * side * side * columns);
        for crop in crops {
            if crop.len() != CHANNELS * CROP * CROP {
                return Err(Error::Batch(format!(
                    "a crop has {} values, not {CHANNELS}x{CROP}x{CROP}",
                    crop.len()
                )));
            }
            for (row, column) in (0..side * side).map(|patch| (patch / side, patch % side)) {
                let first = row * p * CROP + column * p;
                for channel in crop.chunks_exact(CROP * CROP) {
                    let lines = channel.get(first..).unwrap_or_default().chunks(CROP);
                    for line in lines.take(p) {
                        pixels.extend_from_slice(line.get(..p).unwrap_or_default());
                    }
                }
            }
        }
        let rows = crops.len() * side * side;
        Ok(Tensor::from_vec(pixels, (rows, columns), &Device::Cpu)?
            .to_dtype(self.weights.dtype())?
            .to_device(self.weights.device())?)
    }
}

/// How many of the `stored` layers make the hidden state `feature_layer`.
fn used_layers(feature_layer: i64, stored: usize) -> Result<usize> {
    let idx = if feature_layer < 0 {
        (stored as i64 + 1).checked_add(feature_layer)
    } else {
        Some(feature_layer)
    };
    idx.and_then(|idx| usize::try_from(idx).ok())
        .filter(|idx| *idx <= stored)
        .ok_or_else(|| {
            Error::config(format!(
                "img_processor.layer_idx is {feature_layer}, but the tower has {stored} layers"
            ))
        })
}

fn patch_embedding(width: usize, p: usize, weights: &Weights) -> Result<Linear> {
    let stored = weights.stored("weight", &[width, CHANNELS, p, p])?;
    let name = weights.full_name("").trim_end_matches('.').to_owned();
    let shape = vec![width, CHANNELS * p * p];
    let flat = stacked(&name, shape, stored.parts().to_vec())?;
    Linear::from_stored(name, flat, None, weights)
}

fn stacked(name: &str, shape: Vec<usize>, parts: Vec<phi3_nn::TensorPart>) -> Result<StoredTensor> {
    StoredTensor::stacked(shape, parts).map_err(|source| Error::TensorBytes {
        name: name.to_owned(),
        source,
    })
}

/// One axis of a tensor's shape.
pub(crate) fn extent(weights: &Weights, name: &str, axis: usize) -> Result<usize> {
    let shape = weights.shape(name)?;
    shape.get(axis).copied().ok_or_else(|| {
        Error::config(format!(
            "tensor `{}` has shape {shape:?}, without an axis {axis}",
            weights.full_name(name)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_feature_is_counted_from_the_embeddings_on() {
        assert_eq!(used_layers(-2, 24).ok(), Some(23));
        assert_eq!(used_layers(-1, 3).ok(), Some(3));
        assert_eq!(used_layers(0, 3).ok(), Some(0));
        assert_eq!(used_layers(3, 3).ok(), Some(3));
        for wrong in [4, -5, i64::MIN, i64::MAX] {
            assert!(used_layers(wrong, 3).is_err(), "{wrong}");
        }
    }
}
