//! Choosing the device by one switch: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::error::{Error, Result};

/// A device as the user names it.
///
/// ```
/// use phi3_nn::device::DeviceSpec;
/// assert_eq!("cuda:1".parse(), Ok(DeviceSpec::Cuda(1)));
/// assert!("tpu".parse::<DeviceSpec>().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The first GPU that this build supports and the machine has, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The Metal device.
    Metal,
}

/// A name that is no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device; use auto, cpu, cuda, cuda:N or metal")]
pub struct UnknownDevice(String);

impl FromStr for DeviceSpec {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> std::result::Result<Self, UnknownDevice> {
        match name.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| UnknownDevice(name.to_owned())),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl DeviceSpec {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] if this build lacks the feature, which it names, or the machine lacks the
    /// device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto if cfg!(feature = "cuda") => Ok(or_cpu(Device::new_cuda(0))),
            Self::Auto if cfg!(feature = "metal") => Ok(or_cpu(Device::new_metal(0))),
            Self::Auto => Ok(Device::Cpu),
            Self::Cuda(_) if !cfg!(feature = "cuda") => Err(self.missing_feature("cuda")),
            Self::Metal if !cfg!(feature = "metal") => Err(self.missing_feature("metal")),
            Self::Cuda(number) => Device::new_cuda(number).map_err(|error| self.absent(error)),
            Self::Metal => Device::new_metal(0).map_err(|error| self.absent(error)),
        }
    }

    fn missing_feature(self, feature: &str) -> Error {
        Error::Device {
            device: self.to_string(),
            reason: format!(
                "this build has no {feature} support; build with `--features {feature}`, or use --device cpu"
            ),
        }
    }

    fn absent(self, error: candle_core::Error) -> Error {
        Error::Device {
            device: self.to_string(),
            reason: format!("it cannot be opened ({error}); use --device cpu"),
        }
    }
}

fn or_cpu(device: candle_core::Result<Device>) -> Device {
    device.unwrap_or_else(|error| {
        tracing::info!("no GPU can be opened ({error}); using the CPU");
        Device::Cpu
    })
}

/// The dtype of dense weights and activations where the user names none: f32 on the CPU, bf16 on
/// CUDA, f16 on Metal.
pub fn default_dtype(device: &Device) -> DType {
    match device {
        Device::Cpu => DType::F32,
        Device::Cuda(_) => DType::BF16,
        Device::Metal(_) => DType::F16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_missing_feature_is_named() {
        let error = DeviceSpec::Cuda(0).open().err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("--features cuda")));
    }
}
