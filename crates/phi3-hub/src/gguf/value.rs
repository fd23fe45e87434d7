//! Metadata values: the 13 types of GGUF.

use std::borrow::Cow;
use std::fmt;

/// Text as it stands in a file: usually UTF-8, but a vocabulary may hold tokens that are not.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Text(Box<[u8]>);

impl Text {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text, if it is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The text, with U+FFFD in place of what is not UTF-8.
    pub fn to_string_lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl From<&[u8]> for Text {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().into())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string_lossy(), f)
    }
}

macro_rules! numbers {
    ($($id:literal $name:ident $ty:ty, $what:literal;)*) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Value {
            $(#[doc = $what] $name($ty),)*
            /// A truth value.
            Bool(bool),
            /// Text.
            String(Text),
            /// Values of one type.
            Array(Array),
        }

        /// An array of values of one type.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Array {
            $(#[doc = $what] $name(Vec<$ty>),)*
            /// Truth values.
            Bool(Vec<bool>),
            /// Texts.
            String(Vec<Text>),
            /// Arrays, each with its own type.
            Array(Vec<Array>),
        }

        impl Value {
            /// The type's id in the file.
            pub fn type_id(&self) -> u32 {
                match self {
                    $(Value::$name(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            /// The type's name, `u32` or `array of string`.
            pub fn type_name(&self) -> String {
                match self {
                    $(Value::$name(_) => stringify!($ty).to_owned(),)*
                    Value::Bool(_) => "bool".to_owned(),
                    Value::String(_) => "string".to_owned(),
                    Value::Array(array) => format!("array of {}", array.item_type_name()),
                }
            }

            /// An integer of any width, or `None` if the value is something else or negative.
            pub fn as_u64(&self) -> Option<u64> {
                match self {
                    Value::U8(v) => Some(u64::from(*v)),
                    Value::U16(v) => Some(u64::from(*v)),
                    Value::U32(v) => Some(u64::from(*v)),
                    Value::U64(v) => Some(*v),
                    Value::I8(v) => u64::try_from(*v).ok(),
                    Value::I16(v) => u64::try_from(*v).ok(),
                    Value::I32(v) => u64::try_from(*v).ok(),
                    Value::I64(v) => u64::try_from(*v).ok(),
                    _ => None,
                }
            }

            /// A float of either width, or an integer. A `f32` becomes the `f64` with the same
            /// shortest decimal form, so that the 1e-5 that a converter rounded to `f32` is 1e-5
            /// again and not 9.99999974e-6.
            pub fn as_f64(&self) -> Option<f64> {
                match self {
                    Value::F32(v) => Some(shortest_f64(*v)),
                    Value::F64(v) => Some(*v),
                    other => other.as_u64().map(|v| v as f64),
                }
            }

            /// A truth value.
            pub fn as_bool(&self) -> Option<bool> {
                match self {
                    Value::Bool(v) => Some(*v),
                    _ => None,
                }
            }

            /// A text that is UTF-8.
            pub fn as_str(&self) -> Option<&str> {
                match self {
                    Value::String(text) => text.as_str(),
                    _ => None,
                }
            }

            /// An array.
            pub fn as_array(&self) -> Option<&Array> {
                match self {
                    Value::Array(array) => Some(array),
                    _ => None,
                }
            }
        }

        impl Array {
            /// Number of values.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$name(v) => v.len(),)*
                    Array::Bool(v) => v.len(),
                    Array::String(v) => v.len(),
                    Array::Array(v) => v.len(),
                }
            }

            /// Whether there are no values.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// The values' type id in the file.
            pub fn item_type_id(&self) -> u32 {
                match self {
                    $(Array::$name(_) => $id,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            /// The values' type name.
            pub fn item_type_name(&self) -> &'static str {
                match self {
                    $(Array::$name(_) => stringify!($ty),)*
                    Array::Bool(_) => "bool",
                    Array::String(_) => "string",
                    Array::Array(_) => "array",
                }
            }

            /// The value at `index`, copied.
            pub fn get(&self, index: usize) -> Option<Value> {
                match self {
                    $(Array::$name(v) => v.get(index).copied().map(Value::$name),)*
                    Array::Bool(v) => v.get(index).copied().map(Value::Bool),
                    Array::String(v) => v.get(index).cloned().map(Value::String),
                    Array::Array(v) => v.get(index).cloned().map(Value::Array),
                }
            }

            /// Texts.
            pub fn as_texts(&self) -> Option<&[Text]> {
                match self {
                    Array::String(v) => Some(v),
                    _ => None,
                }
            }

            /// The values as [`Value::as_u64`] gives them, if all of them are such.
            pub fn to_u64s(&self) -> Option<Vec<u64>> {
                (0..self.len()).map(|i| self.get(i)?.as_u64()).collect()
            }

            /// The values as [`Value::as_f64`] gives them, if all of them are such.
            pub fn to_f64s(&self) -> Option<Vec<f64>> {
                (0..self.len()).map(|i| self.get(i)?.as_f64()).collect()
            }
        }

        $(
            impl From<$ty> for Value {
                fn from(value: $ty) -> Self {
                    Value::$name(value)
                }
            }
        )*
    };
}

pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

numbers! {
    0 U8 u8, "8 bits, unsigned.";
    1 I8 i8, "8 bits, signed.";
    2 U16 u16, "16 bits, unsigned.";
    3 I16 i16, "16 bits, signed.";
    4 U32 u32, "32 bits, unsigned.";
    5 I32 i32, "32 bits, signed.";
    6 F32 f32, "Single precision.";
    10 U64 u64, "64 bits, unsigned.";
    11 I64 i64, "64 bits, signed.";
    12 F64 f64, "Double precision.";
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.into())
    }
}

impl From<Array> for Value {
    fn from(value: Array) -> Self {
        Value::Array(value)
    }
}

impl<'a> FromIterator<&'a str> for Array {
    fn from_iter<I: IntoIterator<Item = &'a str>>(texts: I) -> Self {
        Array::String(texts.into_iter().map(Text::from).collect())
    }
}

/// Longest text that [`Value`]'s `Display` shows in full, and most items of an array.
const SHOWN_CHARS: usize = 80;
const SHOWN_ITEMS: usize = 8;

impl fmt::Display for Value {
    /// One line, long texts and arrays shortened.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(v) => write!(f, "{v}"),
            Value::I8(v) => write!(f, "{v}"),
            Value::U16(v) => write!(f, "{v}"),
            Value::I16(v) => write!(f, "{v}"),
            Value::U32(v) => write!(f, "{v}"),
            Value::I32(v) => write!(f, "{v}"),
            Value::F32(v) => write!(f, "{v}"),
            Value::U64(v) => write!(f, "{v}"),
            Value::I64(v) => write!(f, "{v}"),
            Value::F64(v) => write!(f, "{v}"),
            Value::Bool(v) => write!(f, "{v}"),
            Value::String(text) => {
                let text = text.to_string_lossy();
                if text.chars().count() <= SHOWN_CHARS {
                    write!(f, "{text:?}")
                } else {
                    let head: String = text.chars().take(SHOWN_CHARS).collect();
                    write!(f, "{head:?}… ({} bytes)", text.len())
                }
            }
            Value::Array(array) => {
                f.write_str("[")?;
                for i in 0..array.len().min(SHOWN_ITEMS) {
                    if let Some(item) = array.get(i) {
                        write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
                    }
                }
                if array.len() > SHOWN_ITEMS {
                    write!(f, ", … ({} in all)", array.len())?;
                }
                f.write_str("]")
            }
        }
    }
}

fn shortest_f64(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_f32_keeps_its_decimal_form() {
        assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
        assert_eq!(Value::F32(1.190_238).as_f64(), Some(1.190_238));
        assert_eq!(Value::F32(f32::INFINITY).as_f64(), Some(f64::INFINITY));
        assert!(Value::F32(f32::NAN).as_f64().unwrap().is_nan());
        assert_eq!(Value::U32(7).as_f64(), Some(7.0));
        assert_eq!(Value::from("7").as_f64(), None);
    }

    #[test]
    fn integers_of_every_width_are_read_and_negative_ones_refused() {
        for value in [
            Value::U8(3),
            Value::I8(3),
            Value::U16(3),
            Value::I16(3),
            Value::U32(3),
            Value::I32(3),
            Value::U64(3),
            Value::I64(3),
        ] {
            assert_eq!(value.as_u64(), Some(3), "{}", value.type_name());
        }
        assert_eq!(Value::I32(-1).as_u64(), None);
        assert_eq!(Value::Bool(true).as_u64(), None);
        assert_eq!(Array::I32(vec![1, -1]).to_u64s(), None);
        assert_eq!(Array::I8(vec![1, 2]).to_u64s(), Some(vec![1, 2]));
    }

    #[test]
    fn long_values_are_shown_shortened() {
        let long = "x".repeat(1000);
        let shown = Value::from(long.as_str()).to_string();
        assert!(
            shown.len() < 120 && shown.ends_with("(1000 bytes)"),
            "{shown}"
        );
        let array = Value::Array(Array::U8((0..100).collect()));
        assert_eq!(
            array.to_string(),
            "[0, 1, 2, 3, 4, 5, 6, 7, … (100 in all)]"
        );
        assert_eq!(array.type_name(), "array of u8");
        let nested = Value::Array(Array::Array(vec![["a", "b"].into_iter().collect()]));
        assert_eq!(nested.to_string(), "[[\"a\", \"b\"]]");
        assert_eq!(format!("{:?}", Text::from(&b"a\xff"[..])), "\"a\u{fffd}\"");
    }
}
