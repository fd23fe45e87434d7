//! From features of crops to rows for the decoder: merging, separators, projection.

use candle_core::Tensor;
use phi3_nn::{Error, Linear, Observer, Result, Weights};

use crate::config::VisionConfig;
use crate::processor::{CROP, ProcessedImage};
use crate::vision::{VisionTower, extent};

/// An image as the decoder sees it: one row per token. A clone shares them.
#[derive(Clone, Debug)]
pub struct ImageFeatures {
    rows: Tensor, // [tokens, hidden]
}

impl ImageFeatures {
    /// The rows, `[tokens, hidden_size]`.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// Tokens that the image takes in a prompt.
    pub fn tokens(&self) -> usize {
        self.rows.dims().first().copied().unwrap_or(0)
    }
}

/// `vision_embed_tokens`: the tower, the separators and the projection.
pub(crate) struct ImageEmbedding {
    img_processor: VisionTower,
    sub_gn: Tensor, // [1, 1, 4C]
    glb_gn: Tensor, // [1, 4C]
    projection: [Linear; 2],
}

impl ImageEmbedding {
    pub(crate) fn new(config: &VisionConfig, hidden_size: usize, weights: Weights) -> Result<Self> {
        let tower = weights.pp("img_processor").pp("vision_model");
        let img_processor = VisionTower::new(config, tower)?;
        let merged = 4 * img_processor.width();
        let separator = |name, shape: &[usize]| -> Result<Tensor> {
            Ok(weights.tensor_f32(name, shape)?.to_dtype(weights.dtype())?)
        };
        let sub_gn = separator("sub_GN", &[1, 1, 1, merged])?;
        let glb_gn = separator("glb_GN", &[1, 1, merged])?;
        let (first, second) = (
            weights.pp("img_projection").pp(0),
            weights.pp("img_projection").pp(2),
        );
        let inner = extent(&first, "bias", 0)?;
        Ok(Self {
            img_processor,
            sub_gn: sub_gn.reshape((1, 1, merged))?,
            glb_gn: glb_gn.reshape((1, merged))?,
            projection: [
                Linear::load(first, merged, inner, true)?,
                Linear::load(second, inner, hidden_size, true)?,
            ],
        })
    }

    /// The features of each image. Crops of all images go through the tower together; zero crops,
    /// with which the reference fills a batch, do not.
    pub(crate) fn forward(
        &self,
        images: &[&ProcessedImage],
        mut observer: Option<&mut dyn Observer>,
    ) -> Result<Vec<ImageFeatures>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        let mut observe = |name: &str, value: &Tensor| match observer.as_deref_mut() {
            Some(observer) if observer.wants(name) => observer.observe(name, value),
            _ => Ok(()),
        };
        let mut crops = Vec::new();
        for image in images {
            let own = image.pixel_values.chunks(3 * CROP * CROP);
            if own.len() != image.layout.crops() + 1 {
                return Err(Error::Batch(format!(
                    "an image of {} crops has the pixels of {}",
                    image.layout.crops() + 1,
                    own.len()
                )));
            }
            crops.extend(own);
        }
        let features = self.img_processor.forward(&crops)?; // [crops, patches, C]
        observe("clip_hidden_m2", &features)?;
        let mut first = 0;
        images
            .iter()
            .map(|image| {
                let crops = image.layout.crops() + 1;
                let own = features.narrow(0, first, crops)?;
                first += crops;
                let rows = self.merge(&own, image)?; // [tokens, 4C]
                if rows.dim(0)? != image.layout.tokens() {
                    return Err(Error::Batch(format!(
                        "an image of {} tokens became {} rows: the tower's patches are of another size",
                        image.layout.tokens(),
                        rows.dim(0)?
                    )));
                }
                observe("img_projection_in", &rows)?;
                let [first, second] = &self.projection;
                let rows = second.forward(&first.forward(&rows)?.gelu_erf()?)?; // [tokens, hidden]
                observe("img_projection_out", &rows)?;
                Ok(ImageFeatures { rows })
            })
            .collect()
    }

    /// Features `[1 + crops, patches, C]`, those of the global view first, to
    /// [crops line by line, `glb_GN`, global view]; every line ends with `sub_GN`.
    fn merge(&self, features: &Tensor, image: &ProcessedImage) -> Result<Tensor> {
        let layout = &image.layout;
        let global = self.map(&features.narrow(0, 0, 1)?, 1, 1)?;
        let sub = features.narrow(0, 1, layout.crops())?;
        let sub = self.map(&sub, layout.crop_rows, layout.crop_columns)?;
        Ok(Tensor::cat(&[&sub, &self.glb_gn, &global], 0)?)
    }

    /// Crops `[rows·columns, patches, C]` laid out as one picture whose cells are 2x2 patches, each
    /// line ended by `sub_GN`: `[lines·(cells + 1), 4C]`.
    fn map(&self, crops: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let (side, width) = (self.img_processor.side() / 2, self.img_processor.width());
        let cells = crops
            .reshape(vec![rows, columns, side, 2, side, 2, width])?
            .permute(vec![0, 2, 1, 4, 3, 5, 6])? // [rows, side, columns, side, 2, 2, C]
            .contiguous()?
            .reshape((rows * side, columns * side, 4 * width))?;
        let ends = self.sub_gn.broadcast_as((rows * side, 1, 4 * width))?;
        Ok(Tensor::cat(&[&cells, &ends], 1)? // [lines, cells + 1, 4C]
            .reshape((rows * side * (columns * side + 1), 4 * width))?)
    }
}
