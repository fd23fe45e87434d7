//! The metadata keys of a model's architecture: typed access, and what Phi-3 layers do not do.

use super::container::Container;
use super::error::{Error, Result};
use super::names::Architecture;
use super::value::{Array, Value};

/// The metadata keys below the architecture's name.
pub(super) struct Keys<'a> {
    container: &'a Container,
    architecture: Architecture,
}

/// More would not be a transformer that anybody has.
const MAX_NUMBER: usize = 1 << 31;

impl<'a> Keys<'a> {
    pub fn new(container: &'a Container, architecture: Architecture) -> Self {
        Self {
            container,
            architecture,
        }
    }

    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name())
    }

    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.container.get(&self.key(name))
    }

    pub fn missing(&self, name: &str, hint: &'static str) -> Error {
        Error::MissingKey {
            key: self.key(name),
            hint,
        }
    }

    pub fn positive(&self, name: &str) -> Result<usize> {
        match self.optional(name)? {
            Some(0) => Err(Error::BadValue {
                key: self.key(name),
                found: "0".to_owned(),
                expected: "a positive number".to_owned(),
            }),
            Some(number) => Ok(number),
            None => Err(self.missing(name, "the model's shape follows from it")),
        }
    }

    /// A number, or an array that holds the same number for every layer.
    pub fn optional(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = match value.as_array().and_then(Array::to_u64s).as_deref() {
            Some([first, rest @ ..]) => {
                if rest.iter().any(|other| other != first) {
                    return Err(Error::Unsupported {
                        what: format!("metadata key {:?} = {value}", self.key(name)),
                        reason: "all layers of a Phi-3 model are alike".to_owned(),
                    });
                }
                Some(*first)
            }
            _ => value.as_u64(),
        };
        number
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| *number <= MAX_NUMBER)
            .map(Some)
            .ok_or_else(|| {
                bad(
                    &self.key(name),
                    value,
                    &format!("a number up to {MAX_NUMBER}"),
                )
            })
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let text = value.as_str();
        text.map(Some)
            .ok_or_else(|| bad(&self.key(name), value, "a text"))
    }

    /// A finite number that is not negative.
    pub fn float_or_zero(&self, name: &str) -> Result<Option<f64>> {
        match self.get(name).map(Value::as_f64) {
            Some(Some(0.0)) => Ok(Some(0.0)),
            _ => self.float(name),
        }
    }

    /// A finite number above 0.
    pub fn float(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .map(Some)
            .ok_or_else(|| bad(&self.key(name), value, "a positive number"))
    }

    /// Rope scaling other than `allowed`, under its current and its old keys.
    pub fn refuse_scaling(&self, allowed: &[&str]) -> Result<()> {
        let unsupported = |name: &str, value: &Value| Error::Unsupported {
            what: format!("rope scaling {:?} = {value}", self.key(name)),
            reason: "Phi-3 knows no other scaling than longrope".to_owned(),
        };
        let kind = "rope.scaling.type";
        if let Some(value) = self.get(kind) {
            // "linear" with a factor of 1 is what "none" is called elsewhere.
            let name = value.as_str().unwrap_or_default();
            if !allowed.contains(&name) && name != "linear" {
                return Err(unsupported(kind, value));
            }
        }
        for name in ["rope.scaling.factor", "rope.scale_linear"] {
            if let Some(value) = self.get(name)
                && !matches!(value.as_f64(), Some(0.0 | 1.0))
            {
                return Err(unsupported(name, value));
            }
        }
        Ok(())
    }

    /// Keys with which other models of these architectures compute something else.
    pub fn refuse_other_maths(&self) -> Result<()> {
        const NEUTRAL: [(&str, &[f64], &str); 11] = [
            ("expert_count", &[0.0], "mixtures of experts"),
            ("attention.clamp_kqv", &[0.0], "clamped projections"),
            ("attention.scale", &[0.0], "a scale of attention scores"),
            ("attention.max_alibi_bias", &[0.0], "ALiBi"),
            ("logit_scale", &[0.0, 1.0], "a scale of logits"),
            ("residual_scale", &[0.0, 1.0], "a scale of residuals"),
            ("embedding_scale", &[0.0, 1.0], "a scale of embeddings"),
            ("attn_logit_softcapping", &[0.0], "soft capping"),
            ("final_logit_softcapping", &[0.0], "soft capping"),
            (
                "leading_dense_block_count",
                &[0.0],
                "layers of different kinds",
            ),
            ("nextn_predict_layers", &[0.0], "extra prediction layers"),
        ];
        let unsupported = |name: &str, value: &Value, what: &str| {
            Err(Error::Unsupported {
                what: format!("metadata key {:?} = {value}", self.key(name)),
                reason: format!("Phi-3 layers have no {what}"),
            })
        };
        for (name, neutral, what) in NEUTRAL {
            if name == "expert_count" && self.architecture == Architecture::Phimoe {
                continue;
            }
            if let Some(value) = self.get(name)
                && !value.as_f64().is_some_and(|found| neutral.contains(&found))
            {
                return unsupported(name, value, what);
            }
        }
        for (name, neutral, what) in [
            ("use_parallel_residual", false, "parallel residuals"),
            ("attention.causal", true, "attention to later tokens"),
        ] {
            if let Some(value) = self.get(name)
                && value.as_bool() != Some(neutral)
            {
                return unsupported(name, value, what);
            }
        }
        let pattern = "attention.sliding_window_pattern";
        if let Some(value) = self.get(pattern)
            && value.as_u64() != Some(1)
        {
            return unsupported(pattern, value, "window that only some layers have");
        }
        Ok(())
    }
}

pub(super) fn bad(key: &str, value: &Value, expected: &str) -> Error {
    Error::BadValue {
        key: key.to_owned(),
        found: format!("{value} ({})", value.type_name()),
        expected: expected.to_owned(),
    }
}
