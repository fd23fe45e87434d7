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
