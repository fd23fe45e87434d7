//! Rotary position embedding in its rotate-half form, with LongRoPE.
//!
//! With `R` rotated dimensions of a head and `j < R/2`,
//! ```text
//! inv_freq_j = 1 / (factor_j * theta^(2j/R))
//! angle      = position * inv_freq_j
//! rot(x)     = x * cos + cat(-x[R/2:], x[:R/2]) * sin
//! ```
//! and dimensions `R..D` pass through. Plain rope has factors of 1. LongRoPE ("longrope", first
//! published as "su") has one list of factors for sequences of up to
//! `original_max_position_embeddings` tokens and one for longer ones, and multiplies cos and sin by
//! an attention factor. Tables are computed in f32 whatever the model's dtype is.
//!
//! Source: transformers `modeling_rope_utils.py` and `modeling_phi3.py`; LongRoPE, arXiv:2402.13753.

use candle_core::{Device, Tensor};
use phi3_kernels::Rotation;
use serde::Deserialize;

use crate::config::check_positive;
use crate::error::{Error, Result};
use crate::{heads, host};

/// Which of LongRoPE's two lists of factors a sequence uses. Models without it stay `Short`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Regime {
    /// At most `original_max_position_embeddings` tokens.
    #[default]
    Short,
    /// More than that.
    Long,
}

/// `rope_scaling` of a config.json, or `rope_parameters` as transformers 5 writes it: the raw form.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct RopeScalingConfig {
    /// "default", "su" or "longrope"; called `rope_type` by newer writers.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    /// The newer name of `type`.
    pub rope_type: Option<String>,
    /// Base of the frequencies, where it stands inside (transformers 5).
    pub rope_theta: Option<f64>,
    /// Share of the head that is rotated, where it stands inside (transformers 5).
    pub partial_rotary_factor: Option<f64>,
    /// Factors up to the original length, `[R/2]`.
    pub short_factor: Option<Vec<f64>>,
    /// Factors beyond it, `[R/2]`.
    pub long_factor: Option<Vec<f64>>,
    /// Multiplies cos and sin in both regimes, instead of the formula.
    pub attention_factor: Option<f64>,
    /// Multiplies cos and sin up to the original length, in models that state it (phimoe, phi3small).
    pub short_mscale: Option<f64>,
    /// Multiplies cos and sin beyond it, in models that state it.
    pub long_mscale: Option<f64>,
    /// Length that splits the regimes, where it stands inside.
    pub original_max_position_embeddings: Option<usize>,
    /// Length ratio for the formula of the attention factor, instead of the ratio of the lengths.
    pub factor: Option<f64>,
    /// Fills missing `long_factor` (and `short_factor` with ones) by a closed form of the Phi-3
    /// report: see [`FactorRule`]. An addition of this library.
    pub factor_rule: Option<FactorRule>,
}

impl RopeScalingConfig {
    /// Base of the frequencies: where it stands inside, else outside, else the default.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not positive.
    pub fn theta(&self, outside: Option<f64>, default: f64) -> Result<f64> {
        let theta = self.rope_theta.or(outside).unwrap_or(default);
        check_positive("rope_theta", theta)?;
        Ok(theta)
    }

    /// The rope type by its current name: "default" or "longrope".
    ///
    /// # Errors
    /// [`Error::Config`] for any other type.
    pub fn kind(&self) -> Result<RopeKind> {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => Ok(RopeKind::Default),
            Some("su" | "longrope") => Ok(RopeKind::LongRope),
            Some(other) => Err(Error::config(format!(
                "rope type `{other}` is not supported; Phi-3 checkpoints use `default`, `su` or `longrope`"
            ))),
        }
    }
}

/// The rope types of the Phi-3 family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// Plain rotary embedding.
    Default,
    /// Two lists of factors; "su" is its older name.
    LongRope,
}

/// Closed forms for LongRoPE factors: a way to run a checkpoint that ships no factor lists beyond
/// its trained length by a ratio `s`, without searching for factors. Short factors are 1.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FactorRule {
    /// `factor_j = s^(2j/R)`: the base grows with the dimension, as if theta were `theta * s`; the
    /// fastest dimension is left alone and the slowest is stretched by almost `s`.
    Power,
    /// Three pieces over the rotated dimensions `i = 2j` of `R`: 1 below `R/4`, `s` from `3R/4` on,
    /// and linear in between.
    Piecewise,
}

impl FactorRule {
    /// The `[R/2]` factors of `rotary_dim` R for the length ratio `s`.
    ///
    /// ```
    /// use phi3_nn::rope::FactorRule;
    /// assert_eq!(FactorRule::Piecewise.factors(8, 5.0), [1.0, 1.0, 3.0, 5.0]);
    /// assert_eq!(FactorRule::Power.factors(4, 9.0), [1.0, 3.0]);
    /// ```
    pub fn factors(self, rotary_dim: usize, s: f64) -> Vec<f64> {
        (0..rotary_dim / 2)
            .map(|j| {
                let share = 2.0 * j as f64 / rotary_dim as f64;
                match self {
                    Self::Power => s.powf(share),
                    Self::Piecewise => 1.0 + (s - 1.0) * ((share - 0.25) / 0.5).clamp(0.0, 1.0),
                }
            })
            .collect()
    }
}

/// A checked rope: everything the tables need.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated dimensions R of a head; even.
    pub rotary_dim: usize,
    /// LongRoPE, if the model has it.
    pub long: Option<LongRope>,
}

impl RopeParameters {
    /// Length that splits the regimes, if there are two.
    pub fn original_max_position_embeddings(&self) -> Option<usize> {
        let long = self.long.as_ref()?;
        Some(long.original_max_position_embeddings)
    }
}

/// LongRoPE's part of [`RopeParameters`].
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// `[R/2]` factors up to the original length.
    pub short_factor: Vec<f64>,
    /// `[R/2]` factors beyond it.
    pub long_factor: Vec<f64>,
    /// Longest sequence that uses the short factors, in tokens.
    pub original_max_position_embeddings: usize,
    /// Multiplies cos and sin of the short regime.
    pub short_mscale: f64,
    /// Multiplies cos and sin of the long regime.
    pub long_mscale: f64,
}

impl LongRope {
    /// The attention factor of phi3: `sqrt(1 + ln(s)/ln(original))` for a length ratio `s`, 1 where
    /// `s <= 1`.
    ///
    /// ```
    /// let factor = phi3_nn::rope::LongRope::attention_factor(32.0, 4096);
    /// assert!((factor - 1.1902380714238083).abs() < 1e-15);
    /// ```
    pub fn attention_factor(s: f64, original: usize) -> f64 {
        if s <= 1.0 {
            1.0
        } else {
            (1.0 + s.ln() / (original as f64).ln()).sqrt()
        }
    }

    /// Checks the raw form of a longrope config whose attention factor follows phi3's formula.
    ///
    /// # Errors
    /// [`Error::Config`] if a list is missing or has not `R/2` positive numbers, or the original
    /// length is missing.
    pub fn from_config(
        raw: &RopeScalingConfig,
        rotary_dim: usize,
        original: Option<usize>,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        // Where the original length stands beside the rope parameters the ratio of the lengths
        // rules, as in the reference; `factor` only counts where everything stands inside.
        let factor = raw.factor.filter(|_| original.is_none());
        let original = original
            .or(raw.original_max_position_embeddings)
            .filter(|&original| original > 1)
            .ok_or_else(|| {
                Error::config("longrope needs original_max_position_embeddings above 1")
            })?;
        let s = factor.unwrap_or(max_position_embeddings as f64 / original as f64);
        let (short_factor, long_factor) = match (
            &raw.short_factor,
            &raw.long_factor,
            raw.factor_rule,
        ) {
            (None, None, Some(rule)) => {
                if !(s.is_finite() && s > 0.0) {
                    return Err(Error::config(format!(
                        "longrope length ratio {s} is not positive"
                    )));
                }
                (vec![1.0; rotary_dim / 2], rule.factors(rotary_dim, s))
            }
            (Some(short), Some(long), _) => (short.clone(), long.clone()),
            _ => {
                return Err(Error::config(
                    "longrope needs short_factor and long_factor, or neither and a factor_rule (`power` or `piecewise`)",
                ));
            }
        };
        check_factors("short_factor", &short_factor, rotary_dim)?;
        check_factors("long_factor", &long_factor, rotary_dim)?;
        let mscale = raw
            .attention_factor
            .unwrap_or_else(|| Self::attention_factor(s, original));
        if !mscale.is_finite() {
            return Err(Error::config(format!(
                "attention_factor {mscale} is not finite"
            )));
        }
        Ok(Self {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            short_mscale: mscale,
            long_mscale: mscale,
        })
    }
}

fn check_factors(name: &str, factors: &[f64], rotary_dim: usize) -> Result<()> {
    if factors.len() != rotary_dim / 2 {
        return Err(Error::config(format!(
            "rope_scaling.{name} has {} numbers, but {} are rotated in pairs and need {}",
            factors.len(),
            rotary_dim,
            rotary_dim / 2
        )));
    }
    match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        Some(bad) => Err(Error::config(format!(
            "rope_scaling.{name} holds {bad}, not a positive number"
        ))),
        None => Ok(()),
    }
}

/// Frequencies of both regimes, ready to make tables for any packed batch.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    /// Multiplies positions.
    position_scale: f32,
    short: Frequencies,
    long: Option<Frequencies>,
}

#[derive(Clone, Debug)]
struct Frequencies {
    inv_freq: Vec<f32>, // [R/2]
    mscale: f32,
}

/// cos and sin of a packed batch, `[n, R/2]` each, f32: computed once and used by every layer.
#[derive(Clone, Debug)]
pub struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// The frequencies of `parameters`.
    pub fn new(parameters: &RopeParameters) -> Self {
        let RopeParameters {
            theta,
            rotary_dim,
            long,
        } = parameters;
        let frequencies = |factors: Option<&[f64]>, mscale: f64| Frequencies {
            inv_freq: (0..rotary_dim / 2)
                .map(|j| {
                    // Rounded to f32 at the places where the reference rounds.
                    let power = theta.powf(f64::from(2.0 * j as f32 / *rotary_dim as f32)) as f32;
                    let factor = factors.map_or(1.0, |factors| factors[j] as f32);
                    1.0 / (factor * power)
                })
                .collect(),
            mscale: mscale as f32,
        };
        match long {
            None => Self {
                position_scale: 1.0,
                short: frequencies(None, 1.0),
                long: None,
            },
            Some(long) => Self {
                position_scale: 1.0,
                short: frequencies(Some(&long.short_factor), long.short_mscale),
                long: Some(frequencies(Some(&long.long_factor), long.long_mscale)),
            },
        }
    }

    /// The same frequencies for positions multiplied by `scale`.
    pub fn with_position_scale(mut self, scale: f64) -> Self {
        self.position_scale = scale as f32;
        self
    }

    /// Tables for rows at `positions`, each with the regime of its sequence.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device refuses the tables.
    pub fn tables(
        &self,
        positions: impl Iterator<Item = (usize, Regime)>,
        device: &Device,
    ) -> Result<RopeTables> {
        let half = self.short.inv_freq.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for (position, regime) in positions {
            let Frequencies { inv_freq, mscale } = match regime {
                Regime::Long => self.long.as_ref().unwrap_or(&self.short),
                Regime::Short => &self.short,
            };
            let position = position as f32 * self.position_scale;
            for frequency in inv_freq {
                let (s, c) = (position * frequency).sin_cos();
                cos.push(c * mscale);
                sin.push(s * mscale);
            }
        }
        let shape = (cos.len() / half.max(1), half);
        Ok(RopeTables {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }
}

impl RopeTables {
    /// Rotates `x` `[n, h, d]`: the first R dimensions of every head.
    ///
    /// # Errors
    /// [`Error::Candle`] if the shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() && !x.track_op() {
            let (_, heads, head_dim) = x.dims3()?;
            let taken: Vec<usize> = (0..heads).collect();
            return self.take(x, (heads, head_dim), &taken);
        }
        self.apply_with_candle(x)
    }

    /// Some heads of rows `x` of `in_row` heads, on the CPU, rotated: `[n, taken, d]`.
    pub(crate) fn take(
        &self,
        x: &Tensor,
        (in_row, head_dim): (usize, usize),
        taken: &[usize],
    ) -> Result<Tensor> {
        let half = self.cos.dim(1)?;
        host::with_f32(&self.cos, |cos| {
            host::with_f32(&self.sin, |sin| {
                let rotation = Rotation { cos, sin, half };
                heads::take(x, (in_row, head_dim), taken, Some(rotation))
            })
        })??
    }

    /// [`RopeTables::apply`] in candle operations: any device, differentiable.
    ///
    /// # Errors
    /// [`Error::Candle`] if the shapes do not fit.
    pub fn apply_with_candle(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, head_dim) = x.dims3()?;
        let half = self.cos.dim(1)?;
        let cos = self.cos.unsqueeze(1)?.to_dtype(x.dtype())?; // [n, 1, R/2]
        let sin = self.sin.unsqueeze(1)?.to_dtype(x.dtype())?;
        let low = x.narrow(2, 0, half)?;
        let high = x.narrow(2, half, half)?;
        let rotated_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let rotated_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        if 2 * half == head_dim {
            return Ok(Tensor::cat(&[rotated_low, rotated_high], 2)?);
        }
        let rest = x.narrow(2, 2 * half, head_dim - 2 * half)?;
        Ok(Tensor::cat(&[rotated_low, rotated_high, rest], 2)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_rope() -> LongRope {
        LongRope {
            short_factor: vec![1.0, 1.5],
            long_factor: vec![2.0, 4.0],
            original_max_position_embeddings: 16,
            short_mscale: 1.25,
            long_mscale: 1.5,
        }
    }

    #[test]
    fn factors_divide_the_frequency_and_the_attention_factor_multiplies() -> Result<()> {
        let parameters = RopeParameters {
            theta: 100.0,
            rotary_dim: 4,
            long: Some(long_rope()),
        };
        let rotary = RotaryEmbedding::new(&parameters);
        let rows = [(3, Regime::Short), (3, Regime::Long)];
        let tables = rotary.tables(rows.into_iter(), &Device::Cpu)?;
        let cos = tables.cos.to_vec2::<f32>()?;
        let close = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-6, "{a} {b}");
        close(cos[0][0], 1.25 * 3f64.cos());
        close(cos[0][1], 1.25 * (3f64 / (1.5 * 10.0)).cos());
        close(cos[1][0], 1.5 * (3f64 / 2.0).cos());
        close(cos[1][1], 1.5 * (3f64 / (4.0 * 10.0)).cos());
        Ok(())
    }

    #[test]
    fn kernels_equal_the_candle_form_and_leave_the_rest_of_a_head() -> Result<()> {
        let parameters = RopeParameters {
            theta: 1e4,
            rotary_dim: 4,
            long: Some(long_rope()),
        };
        let rows = (0..5).map(|position| (position, Regime::Long));
        let tables = RotaryEmbedding::new(&parameters).tables(rows, &Device::Cpu)?;
        let x = Tensor::randn(0f32, 1.0, (5, 3, 6), &Device::Cpu)?;
        let (fast, slow) = (tables.apply(&x)?, tables.apply_with_candle(&x)?);
        let difference = (&fast - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-6, "{difference}");
        let rest = |x: &Tensor| x.narrow(2, 4, 2)?.flatten_all()?.to_vec1::<f32>();
        assert_eq!(rest(&fast)?, rest(&x)?);
        Ok(())
    }

    #[test]
    fn broken_configs_are_refused_by_name() {
        let parse = |json: &str| serde_json::from_str::<RopeScalingConfig>(json);
        let message = |json: &str, original| {
            let raw = parse(json).map_err(Error::config);
            let result = raw.and_then(|raw| {
                raw.kind()?;
                LongRope::from_config(&raw, 4, original, 64)
            });
            result.err().map(|e| e.to_string()).unwrap_or_default()
        };
        let good = r#"{"type":"su","short_factor":[1,1],"long_factor":[1,2]}"#;
        assert_eq!(message(good, Some(16)), "");
        assert!(message(good, None).contains("original_max_position_embeddings"));
        for (json, part) in [
            (r#"{"type":"yarn"}"#, "yarn"),
            (
                r#"{"type":"su","short_factor":[1],"long_factor":[1,2]}"#,
                "short_factor has 1",
            ),
            (
                r#"{"type":"su","short_factor":[1,1],"long_factor":[1,0]}"#,
                "long_factor holds 0",
            ),
            (r#"{"type":"su","long_factor":[1,1]}"#, "factor_rule"),
            (r#"{"rope_type":"longrope","factor_rule":"cubic"}"#, "cubic"),
        ] {
            let found = message(json, Some(16));
            assert!(found.contains(part), "{json}: {found}");
        }
        assert_eq!(
            message(
                r#"{"rope_type":"longrope","factor_rule":"power"}"#,
                Some(16)
            ),
            ""
        );
    }
}
