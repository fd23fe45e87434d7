//! Running a checkpoint beyond its trained length although it ships no LongRoPE factors.

use std::str::FromStr;

use phi3_nn::rope::FactorRule;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// A closed form for LongRoPE factors and the length it should reach, written `power:16384` or
/// `piecewise:16384`.
///
/// Up to the trained length nothing changes but the attention factor, which LongRoPE applies in
/// both regimes. The rules are [`FactorRule`]'s; quality at the new length is the checkpoint's, not
/// promised by the formula.
///
/// ```
/// let extension: phi3::ContextExtension = "power:16384".parse()?;
/// assert_eq!(extension.max_position_embeddings, 16384);
/// # Ok::<(), phi3::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextExtension {
    /// How the factors grow with the dimension.
    pub rule: FactorRule,
    /// The new longest sequence, in tokens.
    pub max_position_embeddings: usize,
}

impl FromStr for ContextExtension {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::Extension {
            reason: format!("`{text}` is not RULE:TOKENS with the rule power or piecewise"),
        };
        let (rule, length) = text.split_once(':').ok_or_else(wrong)?;
        let rule = match rule {
            "power" => FactorRule::Power,
            "piecewise" => FactorRule::Piecewise,
            _ => return Err(wrong()),
        };
        let max_position_embeddings = length.parse().map_err(|_| wrong())?;
        Ok(Self {
            rule,
            max_position_embeddings,
        })
    }
}

impl ContextExtension {
    /// The config.json of the extended model.
    ///
    /// # Errors
    /// [`Error::Extension`] if the checkpoint has rope scaling of its own, names no length, or is
    /// already that long.
    pub fn apply(self, config: &Value) -> Result<Value> {
        let refuse = |reason: String| Err(Error::Extension { reason });
        let scaled = ["rope_scaling", "rope_parameters"].iter().any(|key| {
            let scaling = config.get(key).filter(|scaling| !scaling.is_null());
            let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type")));
            scaling.is_some() && kind.is_some_and(|kind| kind != "default")
        });
        if scaled {
            return refuse("the checkpoint brings its own LongRoPE factors".to_owned());
        }
        let Some(trained) = config
            .get("max_position_embeddings")
            .and_then(Value::as_u64)
        else {
            return refuse("the config names no max_position_embeddings".to_owned());
        };
        if trained >= self.max_position_embeddings as u64 {
            return refuse(format!("the model already reaches {trained} tokens"));
        }
        let rule = match self.rule {
            FactorRule::Power => "power",
            FactorRule::Piecewise => "piecewise",
        };
        let mut extended = config.clone();
        let scaling = match extended.get_mut("rope_parameters") {
            Some(Value::Object(parameters)) => {
                parameters.insert("rope_type".to_owned(), json!("longrope"));
                parameters.insert("factor_rule".to_owned(), json!(rule));
                None
            }
            _ => Some(json!({ "rope_type": "longrope", "factor_rule": rule })),
        };
        if let Value::Object(fields) = &mut extended {
            if let Some(scaling) = scaling {
                fields.insert("rope_scaling".to_owned(), scaling);
            }
            fields.insert(
                "original_max_position_embeddings".to_owned(),
                json!(trained),
            );
            let length = json!(self.max_position_embeddings);
            fields.insert("max_position_embeddings".to_owned(), length);
        }
        Ok(extended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    fn config() -> Value {
        json!({
            "model_type": "phi3", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32,
            "max_position_embeddings": 4096, "rope_scaling": null, "rope_theta": 10000.0,
        })
    }

    #[test]
    fn both_rules_and_both_config_forms_extend() -> Result<()> {
        let mut new_form = config();
        new_form["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 5000.0 });
        for config in [config(), new_form] {
            for (text, slowest) in [
                ("power:16384", 4f64.powf(14.0 / 16.0)),
                ("piecewise:16384", 4.0),
            ] {
                let extended = text.parse::<ContextExtension>()?.apply(&config)?;
                let model = ModelConfig::from_json(&extended)?;
                assert_eq!(model.info().max_position_embeddings, 16384);
                assert_eq!(model.info().original_max_position_embeddings, Some(4096));
                let factors = model
                    .rope()
                    .long
                    .as_ref()
                    .map(|long| long.long_factor.clone());
                let last = factors.and_then(|factors| factors.last().copied());
                assert!(
                    last.is_some_and(|last| (last - slowest).abs() < 1e-12),
                    "{last:?}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_extended_is_said() -> Result<()> {
        let extension: ContextExtension = "power:8192".parse()?;
        let message = |config: &Value| extension.apply(config).err().map(|e| e.to_string());
        let mut own = config();
        own["rope_scaling"] = json!({ "type": "su", "short_factor": [1], "long_factor": [1] });
        assert!(message(&own).is_some_and(|m| m.contains("its own")));
        let mut long = config();
        long["max_position_embeddings"] = json!(8192);
        assert!(message(&long).is_some_and(|m| m.contains("already reaches 8192")));
        assert!("cubic:8192".parse::<ContextExtension>().is_err());
        assert!("power:many".parse::<ContextExtension>().is_err());
        Ok(())
    }
}
