//! Results as JSON and as a table.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use phi3::Probe;
use phi3::nn::ModelInfo;
use serde::Serialize;

use super::measure::{Measured, Spread};
use super::seconds;
use super::weights::Weights;

/// All that was measured.
pub struct Report {
    pub model: Model,
    pub weights: Weights,
    pub processor: String,
    /// What the machine can do, by number of threads; empty where a GPU computed.
    pub probes: BTreeMap<usize, Probe>,
    pub results: Vec<Measured>,
}

/// The model that was measured.
pub struct Model {
    pub name: String,
    pub info: ModelInfo,
    pub file_type: String,
    pub load: Duration,
    /// From the start of loading to the first token after a prompt of one.
    pub first_token: Duration,
}

/// A test in JSON. Rates are per second; shares are of what the probe measured.
#[derive(Serialize)]
struct Object<'a> {
    model: &'a str,
    model_type: &'a str,
    #[serde(rename = "type")]
    file_type: &'a str,
    layers: usize,
    parameters: u64,
    weight_bytes: u64,
    processor: &'a str,
    backend: &'static str,
    threads: usize,
    n_prompt: usize,
    n_gen: usize,
    depth: usize,
    batch: usize,
    tokens_per_second: Spread,
    /// Of a repetition; for a prompt, the time to its first token.
    seconds: Spread,
    time_to_first_token: Option<f64>,
    load_seconds: f64,
    load_to_first_token_seconds: f64,
    peak_memory_bytes: Option<u64>,
    gigabytes_per_second: f64,
    share_of_read_bandwidth: Option<f64>,
    gigaops_per_second: f64,
    share_of_compute: Option<f64>,
    probe: Option<Limits>,
}

/// What the probe measured.
#[derive(Clone, Serialize)]
struct Limits {
    read_gigabytes_per_second: f64,
    read_gigabytes_per_second_median: f64,
    f32_gigaops_per_second: f64,
    int8_gigaops_per_second: f64,
    instruction_sets: Vec<SetLimits>,
}

#[derive(Clone, Serialize)]
struct SetLimits {
    name: &'static str,
    f32_gigaops_per_second: f64,
    int8_gigaops_per_second: f64,
}

/// What a test read and computed a second, at its median.
struct Rates {
    /// Bytes of weights and, in generation, of keys and values.
    bytes: f64,
    /// Additions and multiplications of the matrix products; attention is left out.
    ops: f64,
}

impl Report {
    /// A JSON array, one object a test.
    pub fn json(&self) -> Result<String> {
        let objects: Vec<Object<'_>> = self.results.iter().map(|it| self.object(it)).collect();
        Ok(serde_json::to_string_pretty(&objects)?)
    }

    /// What was measured where, and a Markdown table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let Model {
            name,
            info,
            file_type,
            load,
            first_token,
        } = &self.model;
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{name}: {}, {file_type}, {} layers, {:.1} million weights, {:.1} MB",
            info.model_type,
            info.num_hidden_layers,
            self.weights.parameters as f64 / 1e6,
            self.weights.bytes as f64 / 1e6,
        );
        let _ = write!(out, "{} ({})", self.processor, phi3::backend_name());
        for (threads, probe) in &self.probes {
            let _ = write!(
                out,
                "; {threads} {} can read {:.1} GB/s (median {:.1}) and do {:.0} Gop/s in f32, \
                 {:.0} Gop/s in int8",
                if *threads == 1 { "thread" } else { "threads" },
                probe.read_bytes / 1e9,
                probe.usual_read_bytes / 1e9,
                probe.f32_ops() / 1e9,
                probe.int8_ops() / 1e9,
            );
        }
        let peak = self.results.iter().filter_map(|it| it.peak_memory).max();
        let peak = peak.map_or(String::new(), |bytes| {
            format!("; peak memory {:.2} GB", bytes as f64 / 1e9)
        });
        let _ = writeln!(
            out,
            "\nloaded in {:.2} s, first token after {:.2} s{peak}\n",
            seconds(*load),
            seconds(*first_token),
        );
        out.push_str("| test | depth | batch | threads | tokens/s | min to max | GB/s | Gop/s |\n");
        out.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
        for result in &self.results {
            let speed = result.tokens_per_second();
            let rates = self.rates(result);
            let share = |share: Option<f64>| {
                share.map_or(String::new(), |share| format!(" ({:.0} %)", share * 100.0))
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {:.2} | {:.2} to {:.2} | {:.1}{} | {:.1}{} |",
                result.test.name(),
                result.test.depth,
                result.test.batch,
                result.threads,
                speed.median,
                speed.min,
                speed.max,
                rates.bytes / 1e9,
                share(self.share_of_reading(result, &rates)),
                rates.ops / 1e9,
                share(self.share_of_compute(result, &rates)),
            );
        }
        out
    }

    fn object(&self, result: &Measured) -> Object<'_> {
        let rates = self.rates(result);
        let test = result.test;
        let spread = Spread::of(result.seconds.iter().copied());
        Object {
            model: &self.model.name,
            model_type: &self.model.info.model_type,
            file_type: &self.model.file_type,
            layers: self.model.info.num_hidden_layers,
            parameters: self.weights.parameters,
            weight_bytes: self.weights.bytes,
            processor: &self.processor,
            backend: phi3::backend_name(),
            threads: result.threads,
            n_prompt: test.n_prompt,
            n_gen: test.n_gen,
            depth: test.depth,
            batch: test.batch,
            tokens_per_second: result.tokens_per_second(),
            seconds: spread,
            time_to_first_token: (test.n_prompt > 0).then_some(spread.median),
            load_seconds: seconds(self.model.load),
            load_to_first_token_seconds: seconds(self.model.first_token),
            peak_memory_bytes: result.peak_memory,
            gigabytes_per_second: rates.bytes / 1e9,
            share_of_read_bandwidth: self.share_of_reading(result, &rates),
            gigaops_per_second: rates.ops / 1e9,
            share_of_compute: self.share_of_compute(result, &rates),
            probe: self.probes.get(&result.threads).map(Limits::of),
        }
    }

    fn rates(&self, result: &Measured) -> Rates {
        let Weights {
            read,
            per_token,
            head,
            ..
        } = self.weights;
        let time = Spread::of(result.seconds.iter().copied()).median;
        let test = result.test;
        let (bytes, ops) = match test.n_gen {
            0 => {
                let ops = 2.0 * (per_token as f64 * test.n_prompt as f64 + head as f64);
                (read as f64, ops)
            }
            n_gen => {
                let bytes = (read as f64 + result.cache_bytes) * n_gen as f64;
                let tokens = (n_gen * test.batch) as f64;
                (bytes, 2.0 * (per_token + head) as f64 * tokens)
            }
        };
        Rates {
            bytes: bytes / time.max(1e-9),
            ops: ops / time.max(1e-9),
        }
    }

    fn share_of_reading(&self, result: &Measured, rates: &Rates) -> Option<f64> {
        let probe = self.probes.get(&result.threads)?;
        Some(rates.bytes / probe.read_bytes.max(1.0))
    }

    /// Of the int8 figure where the weights are quantized, else of the f32 one.
    fn share_of_compute(&self, result: &Measured, rates: &Rates) -> Option<f64> {
        let probe = self.probes.get(&result.threads)?;
        let limit = match self.weights.quantized {
            true => probe.int8_ops(),
            false => probe.f32_ops(),
        };
        Some(rates.ops / limit.max(1.0))
    }
}

impl Limits {
    fn of(probe: &Probe) -> Self {
        let sets = probe.instruction_sets.iter().map(|set| SetLimits {
            name: set.name,
            f32_gigaops_per_second: set.f32_ops / 1e9,
            int8_gigaops_per_second: set.int8_ops / 1e9,
        });
        Self {
            read_gigabytes_per_second: probe.read_bytes / 1e9,
            read_gigabytes_per_second_median: probe.usual_read_bytes / 1e9,
            f32_gigaops_per_second: probe.f32_ops() / 1e9,
            int8_gigaops_per_second: probe.int8_ops() / 1e9,
            instruction_sets: sets.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::measure::Test;
    use super::*;
    use phi3::InstructionSet;

    fn report(quantized: bool) -> Report {
        let result = |n_prompt, n_gen, batch| Measured {
            test: Test {
                n_prompt,
                n_gen,
                depth: 0,
                batch,
            },
            threads: 2,
            seconds: vec![0.5, 0.25, 1.0],
            peak_memory: Some(3_000_000_000),
            cache_bytes: 0.5e9,
        };
        Report {
            model: Model {
                name: "m.gguf".to_owned(),
                info: ModelInfo {
                    model_type: "phi3".to_owned(),
                    vocab_size: 10,
                    hidden_size: 4,
                    num_hidden_layers: 3,
                    max_position_embeddings: 100,
                    original_max_position_embeddings: None,
                },
                file_type: "Q4_0".to_owned(),
                load: Duration::from_millis(500),
                first_token: Duration::from_millis(750),
            },
            weights: Weights {
                kind: "Q4_0".to_owned(),
                bytes: 2_000_000_000,
                parameters: 3_000_000_000,
                read: 1_500_000_000,
                per_token: 2_000_000_000,
                head: 500_000_000,
                quantized,
            },
            processor: "CPU".to_owned(),
            probes: [Probe {
                threads: 2,
                read_bytes: 40e9,
                usual_read_bytes: 30e9,
                instruction_sets: vec![InstructionSet {
                    name: "avx2",
                    f32_ops: 200e9,
                    int8_ops: 500e9,
                }],
            }]
            .map(|probe| (probe.threads, probe))
            .into(),
            results: vec![result(10, 0, 1), result(0, 5, 4)],
        }
    }

    #[test]
    fn rates_are_work_by_the_median_time() {
        let report = report(true);
        let [prompt, generation] = &report.results[..] else {
            panic!("two results");
        };
        let rates = report.rates(prompt);
        assert_eq!((rates.bytes, rates.ops), (3e9, 2.0 * 20.5e9 / 0.5));
        // Five steps read the weights and the caches, and compute for four tokens each.
        let rates = report.rates(generation);
        assert_eq!((rates.bytes, rates.ops), (20e9, 2.0 * 2.5e9 * 20.0 / 0.5));
        assert_eq!(report.share_of_reading(generation, &rates), Some(0.5));
        assert_eq!(report.share_of_compute(generation, &rates), Some(0.4));
        let floats = self::report(false);
        assert_eq!(floats.share_of_compute(generation, &rates), Some(1.0));
    }

    #[test]
    fn the_table_has_a_row_a_test() {
        let table = report(true).table();
        assert!(
            table.starts_with(
                "m.gguf: phi3, Q4_0, 3 layers, 3000.0 million weights, 2000.0 MB\nCPU ("
            )
        );
        for line in [
            "; 2 threads can read 40.0 GB/s (median 30.0) and do 200 Gop/s in f32, 500 Gop/s in int8\n",
            "loaded in 0.50 s, first token after 0.75 s; peak memory 3.00 GB\n\n| test |",
            "| pp10 | 0 | 1 | 2 | 20.00 | 10.00 to 40.00 | 3.0 (8 %) | 82.0 (16 %) |\n",
            "| tg5 | 0 | 4 | 2 | 40.00 | 20.00 to 80.00 | 20.0 (50 %) | 200.0 (40 %) |\n",
        ] {
            assert!(table.contains(line), "{line:?} is not in {table}");
        }
        let mut on_gpu = report(true);
        on_gpu.probes.clear();
        assert!(on_gpu.table().contains("| 20.0 | 200.0 |\n"));
    }
}
