//! Reading a config.json into a model's own struct, with errors that name the field.

use std::cell::Cell;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess};
use serde_json::{Value, map};

use crate::error::{Error, Result};

/// Reads the fields of `config` into `T`.
///
/// ```
/// #[derive(Debug, serde::Deserialize)]
/// struct Config {
///     hidden_size: usize,
/// }
/// let config = serde_json::json!({"hidden_size": 64, "use_cache": true});
/// assert_eq!(phi3_nn::config::from_json::<Config>(&config)?.hidden_size, 64);
///
/// let config = serde_json::json!({"hidden_size": "64"});
/// let error = phi3_nn::config::from_json::<Config>(&config).unwrap_err().to_string();
/// assert_eq!(error, "config: hidden_size: invalid type: string \"64\", expected usize");
/// # Ok::<(), phi3_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] naming the field that is missing or malformed, or if `config` has no fields
/// at all.
pub fn from_json<T: DeserializeOwned>(config: &Value) -> Result<T> {
    let Value::Object(fields) = config else {
        return Err(Error::config("it is not a JSON object"));
    };
    let current = Cell::new(None);
    let fields = Fields {
        rest: fields.iter(),
        value: &Value::Null,
        current: &current,
    };
    T::deserialize(MapAccessDeserializer::new(fields)).map_err(|error| match current.get() {
        Some(field) => Error::config(format!("{field}: {error}")),
        None => Error::config(error),
    })
}

/// Most layers, or experts of a layer: what is allocated for each before any weight is read stays
/// small.
pub const MAX_COUNT: usize = 1 << 16;

/// Any other number of a model: far above all of them, while the product of two stays within usize.
pub const MAX_SIZE: usize = 1 << 28;

/// Checks that every number, given with its name, is from 1 to `limit`.
///
/// # Errors
/// [`Error::Config`] naming the first that is not.
pub fn check_sizes(limit: usize, sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| !(1..=limit).contains(size)) {
        Some((name, size)) => Err(Error::config(format!(
            "{name} is {size}, which is no model's"
        ))),
        None => Ok(()),
    }
}

/// Checks that the first number is a multiple of the second, which is not 0.
///
/// # Errors
/// [`Error::Config`] naming both.
pub fn check_multiple((name, number): (&str, usize), (of, divisor): (&str, usize)) -> Result<()> {
    match number.is_multiple_of(divisor) {
        true => Ok(()),
        false => Err(Error::config(format!(
            "{name} {number} is not a multiple of {of} {divisor}"
        ))),
    }
}

/// Checks that a number is above 0 and finite.
///
/// # Errors
/// [`Error::Config`] naming it.
pub fn check_positive(name: &str, number: f64) -> Result<()> {
    match number.is_finite() && number > 0.0 {
        true => Ok(()),
        false => Err(Error::config(format!(
            "{name} is {number}, not a positive number"
        ))),
    }
}

/// Checks that a number is 0 or above and finite.
///
/// # Errors
/// [`Error::Config`] naming it.
pub fn check_not_negative(name: &str, number: f64) -> Result<()> {
    match number.is_finite() && number >= 0.0 {
        true => Ok(()),
        false => Err(Error::config(format!("{name} is {number}"))),
    }
}

/// Checks that a field, where there is one, has the only value that the model type knows.
///
/// # Errors
/// [`Error::Config`] naming both values.
pub fn check_only(
    model_type: &str,
    name: &str,
    found: Option<&str>,
    supported: &str,
) -> Result<()> {
    match found {
        Some(found) if found != supported => Err(Error::config(format!(
            "{name} `{found}` is not supported; {model_type} uses `{supported}`"
        ))),
        _ => Ok(()),
    }
}

/// Width of a head: as configured, else `hidden_size / num_attention_heads`. Both are checked before.
///
/// # Errors
/// [`Error::Config`] if the one does not divide the other, or the width is no model's.
pub fn head_dim(
    configured: Option<usize>,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<usize> {
    let heads = ("num_attention_heads", num_attention_heads);
    let head_dim = match configured {
        Some(head_dim) => head_dim,
        None => {
            check_multiple(("hidden_size", hidden_size), heads)?;
            hidden_size / num_attention_heads
        }
    };
    check_sizes(MAX_COUNT, &[("head_dim", head_dim)])?;
    Ok(head_dim)
}

/// The fields of an object, with a note of the one being read.
struct Fields<'a> {
    rest: map::Iter<'a>,
    value: &'a Value,
    current: &'a Cell<Option<&'a str>>,
}

impl<'a> MapAccess<'a> for Fields<'a> {
    type Error = serde_json::Error;

    fn next_key_seed<K: DeserializeSeed<'a>>(
        &mut self,
        seed: K,
    ) -> std::result::Result<Option<K::Value>, Self::Error> {
        let next = self.rest.next();
        self.current.set(next.map(|(name, _)| name.as_str()));
        let Some((name, value)) = next else {
            return Ok(None);
        };
        self.value = value;
        seed.deserialize(name.as_str().into_deserializer())
            .map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(
        &mut self,
        seed: V,
    ) -> std::result::Result<V::Value, Self::Error> {
        seed.deserialize(self.value)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Rope {
        factor: Option<f64>,
    }

    #[derive(Debug, Deserialize)]
    struct Config {
        hidden_size: usize,
        rope_scaling: Option<Rope>,
    }

    #[test]
    fn fields_are_read_and_others_ignored() {
        let config = json!({"a": [1], "rope_scaling": {"factor": 2}, "hidden_size": 8, "z": null});
        let config: Config = from_json(&config).unwrap();
        assert_eq!(config.hidden_size, 8);
        assert_eq!(config.rope_scaling.unwrap().factor, Some(2.0));
    }

    #[test]
    fn errors_name_the_field() {
        for (config, expected) in [
            (
                json!({"hidden_size": -1}),
                "hidden_size: invalid value: integer `-1`",
            ),
            (
                json!({"hidden_size": 8, "rope_scaling": {"factor": "a"}}),
                "rope_scaling: invalid type",
            ),
            (
                json!({"rope_scaling": null}),
                "config: missing field `hidden_size`",
            ),
            (json!([8]), "not a JSON object"),
        ] {
            let error = from_json::<Config>(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
