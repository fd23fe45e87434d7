//! What the system tells of the machine and of this process.

use std::fs;

/// The processor's name, or its architecture where the system does not tell.
pub fn processor() -> String {
    fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| field(&text, "model name").map(str::to_owned))
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The most memory, in bytes, that the process has had so far, mapped files included; Linux tells.
pub fn peak_memory() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Memory, in bytes, that programs may still take; Linux tells.
pub fn available_memory() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let number = field(text, name)?.strip_suffix("kB")?.trim_end();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// The value of the first line `name: value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim_end() == name).then_some(value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc() {
        let text = "Name:\tphi3\nVmPeak:\t  200 kB\nVmHWM:\t    1234 kB\n";
        assert_eq!(kilobytes(text, "VmHWM"), Some(1234 * 1024));
        assert_eq!(kilobytes(text, "VmRSS"), None);
        assert_eq!(kilobytes("VmHWM:\t12\n", "VmHWM"), None);
        let cpu = "processor\t: 0\nmodel name\t: Some CPU @ 3.2 GHz\n";
        assert_eq!(field(cpu, "model name"), Some("Some CPU @ 3.2 GHz"));
        assert!(!processor().is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells() {
        assert!(peak_memory().is_some_and(|bytes| bytes > 1 << 20));
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
