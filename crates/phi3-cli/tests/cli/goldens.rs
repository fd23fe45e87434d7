//! `phi3 logits` against every golden of the phi3, phi3.5-moe, phi3small and phi4 kits, one sequence alone and all of a
//! kit packed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{DONE, Tensors, arg, assert_close, fixture, run, stdout, write_ids};

/// A kit's goldens and config, and a checkpoint that should give them.
struct Kit {
    model: PathBuf,
    goldens: Tensors,
    vocab: usize,
    limit: Option<usize>,
    /// Whether LongRoPE has two sets of factors.
    crosses: bool,
}

impl Kit {
    fn open(model: &Path, goldens: &Path) -> Result<Self> {
        let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json"))?)?;
        let number = |name: &str| config[name].as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(Self {
            model: model.to_owned(),
            goldens: Tensors::read(&goldens.join("golden.safetensors"))?,
            vocab: number("vocab_size").context("vocab_size")?,
            limit: number("original_max_position_embeddings"),
            crosses: ["rope_scaling", "rope_parameters"].iter().any(|key| {
                let kind = ["rope_type", "type"]
                    .iter()
                    .find_map(|t| config[*key][*t].as_str());
                kind.is_some_and(|kind| kind != "default")
            }),
        })
    }

    /// Cases of one sequence each.
    fn cases(&self) -> Vec<String> {
        let cases = self
            .goldens
            .names()
            .filter_map(|name| name.strip_suffix(".input_ids"));
        cases
            .filter(|case| *case != "leftpad")
            .map(str::to_owned)
            .collect()
    }

    fn input_ids(&self, case: &str) -> Result<&[i64]> {
        let name = format!("{case}.input_ids");
        self.goldens.ids(&name).with_context(|| name.clone())
    }

    fn logits(&self, files: &[PathBuf], out: &Path, flags: &[&str]) -> Result<Tensors> {
        let mut args = vec!["logits".to_owned(), "--model".to_owned(), arg(&self.model)];
        args.push("--ids".to_owned());
        args.extend(files.iter().map(|file| arg(file)));
        args.extend(["--out".to_owned(), arg(out)]);
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let printed = stdout(&args)?;
        ensure!(printed.is_empty(), "nothing belongs on stdout: {printed}");
        Tensors::read(out)
    }

    /// Prefill, hidden states and generation of a case, under the names that start with `prefix`.
    fn check(&self, case: &str, found: &Tensors, prefix: &str, hidden: bool) -> Result<()> {
        let len = self.input_ids(case)?.len();
        let shape = found.shape(&format!("{prefix}logits"))?;
        ensure!(shape == [len, self.vocab], "logits: shape {shape:?}");
        for name in [
            "logits",
            "hidden_embed",
            "hidden_layer0_attn",
            "hidden_layer0",
            "hidden_layer_last",
            "hidden_final_norm",
        ] {
            let Some(golden) = self.goldens.floats(&format!("{case}.{name}")) else {
                continue;
            };
            let found = found.floats(&format!("{prefix}{name}"));
            if name == "logits" || hidden {
                assert_close(name, found.with_context(|| format!("no {name}"))?, golden)?;
            } else {
                ensure!(found.is_none(), "{name} is there without --hidden");
            }
        }
        self.check_routing(case, found, prefix, hidden)
    }

    /// What the routers of a case saw and chose: experts exactly, weights within 1e-5, in which the
    /// rounding of the layers before is the most (2.3e-6 measured).
    fn check_routing(&self, case: &str, found: &Tensors, prefix: &str, hidden: bool) -> Result<()> {
        let case = format!("{case}.");
        for name in self.goldens.names() {
            let Some(what) = name
                .strip_prefix(&case)
                .filter(|what| what.starts_with("layer"))
            else {
                continue;
            };
            let ours = format!("{prefix}{what}");
            if !hidden {
                ensure!(
                    found.shape(&ours).is_err(),
                    "{what} is there without --hidden"
                );
                continue;
            }
            let (shape, golden_shape) = (found.shape(&ours)?, self.goldens.shape(name)?);
            ensure!(
                shape == golden_shape,
                "{what}: {shape:?}, not {golden_shape:?}"
            );
            if let Some(golden) = self.goldens.ids(name) {
                ensure!(found.ids(&ours) == Some(golden), "{what}: other experts");
                continue;
            }
            let golden = self.goldens.floats(name).context("floats")?;
            let values = found.floats(&ours).context("floats")?;
            assert_close(what, values, golden)?;
            if what.ends_with(".weights") {
                for (found, golden) in values.iter().zip(golden) {
                    ensure!((found - golden).abs() <= 1e-5, "{what}: {found}, {golden}");
                }
            }
        }
        Ok(())
    }

    fn check_generated(&self, case: &str, found: &Tensors, prefix: &str) -> Result<()> {
        let Some(golden) = self.goldens.ids(&format!("{case}.generate_ids")) else {
            return Ok(());
        };
        let ids = found
            .ids(&format!("{prefix}generate_ids"))
            .context("generate_ids")?;
        ensure!(
            ids.starts_with(golden),
            "generate_ids: {ids:?} instead of {golden:?}"
        );
        let rows = found
            .floats(&format!("{prefix}generate_logits"))
            .context("generate_logits")?;
        ensure!(rows.len() == ids.len() * self.vocab, "a row for each id");
        let rows = &rows[..golden.len() * self.vocab];
        if let Some(golden) = self.goldens.floats(&format!("{case}.generate_logits")) {
            return assert_close("generate_logits", rows, golden);
        }
        // Where generation equals plain decoding only the latter is stored.
        let steps = format!("{case}.decode_logits");
        let golden = self.goldens.floats(&steps).with_context(|| steps.clone())?;
        assert_close("generate_logits", &rows[self.vocab..], golden)
    }

    /// Every case alone.
    fn check_alone(&self, folder: &Path) -> Result<()> {
        let out = folder.join("out.safetensors");
        for case in self.cases() {
            let check = || {
                let ids = self.input_ids(&case)?;
                let file = [write_ids(folder, &case, ids)?];
                let generated = self.goldens.ids(&format!("{case}.generate_ids"));
                let count = generated.map_or(0, <[i64]>::len).to_string();
                let found = self.logits(&file, &out, &["--generate", &count])?;
                self.check(&case, &found, "", false)?;
                self.check_generated(&case, &found, "")?;
                let found = self.logits(&file, &out, &["--hidden"])?;
                self.check(&case, &found, "", true)?;

                let name = format!("{case}.decode_logits");
                let (Some(golden), Some(steps)) = (
                    self.goldens.floats(&name),
                    self.goldens.ids(&format!("{case}.decode_ids")),
                ) else {
                    return Ok(());
                };
                let all = [ids, &steps[..steps.len() - 1]].concat();
                let file = [write_ids(folder, &case, &all)?];
                let prefill = ids.len().to_string();
                let flags = [
                    "--decode-from",
                    &prefill,
                    "--recompute",
                    "never",
                    "--hidden",
                ];
                let found = self.logits(&file, &out, &flags)?;
                let rows = found.floats("logits").context("logits")?;
                assert_close(&name, &rows[ids.len() * self.vocab..], golden)?;
                let hidden = found.shape("hidden_final_norm")?;
                ensure!(
                    hidden[0] == all.len(),
                    "a hidden state for each id: {hidden:?}"
                );
                let name = format!("{case}.nocache_last_logits");
                if let Some(golden) = self.goldens.floats(&name) {
                    let flags = ["--decode-from", &prefill, "--recompute", "always"];
                    let found = self.logits(&file, &out, &flags)?;
                    let rows = found.floats("logits").context("logits")?;
                    assert_close(&name, &rows[ids.len() * self.vocab..], golden)?;
                }
                Ok(())
            };
            check().with_context(|| format!("{}, case {case}", self.model.display()))?;
        }
        Ok(())
    }

    /// All cases in one packed call.
    fn check_packed(&self, folder: &Path) -> Result<()> {
        let out = folder.join("out.safetensors");
        let cases = self.cases();
        let files = cases
            .iter()
            .map(|case| write_ids(folder, case, self.input_ids(case)?))
            .collect::<Result<Vec<_>>>()?;
        if files.len() < 2 {
            return Ok(());
        }
        let counts = cases
            .iter()
            .filter_map(|case| self.goldens.ids(&format!("{case}.generate_ids")));
        let count = counts.map(<[i64]>::len).max().unwrap_or(0).to_string();
        let found = self.logits(&files, &out, &["--hidden", "--generate", &count])?;
        for case in &cases {
            let prefix = format!("{case}.");
            let check = || {
                self.check(case, &found, &prefix, true)?;
                self.check_generated(case, &found, &prefix)
            };
            check().with_context(|| format!("{} packed, case {case}", self.model.display()))?;
        }
        self.check_packed_steps(folder, &cases)
    }

    /// All cases packed, most rows as cached steps. The rows behind the prompt must be what
    /// generation gave; those of the prompt too where no step can change the factors.
    fn check_packed_steps(&self, folder: &Path, cases: &[String]) -> Result<()> {
        let mut files = Vec::new();
        let mut kept = Vec::new();
        for case in cases {
            // Without crossing, plain decoding is generation.
            let ids = |name: &str| self.goldens.ids(&format!("{case}.{name}"));
            let decoded = ids("decode_ids").filter(|_| !self.crosses);
            let Some(generated) = ids("generate_ids").or(decoded) else {
                continue;
            };
            let all = [self.input_ids(case)?, &generated[..generated.len() - 1]].concat();
            files.push(write_ids(folder, case, &all)?);
            kept.push(case);
        }
        if files.len() < 2 {
            return Ok(());
        }
        let out = folder.join("out.safetensors");
        let found = self.logits(&files, &out, &["--decode-from", "3"])?;
        for case in kept {
            let what = format!("{} in packed steps, case {case}", self.model.display());
            let prompt = self.input_ids(case)?.len();
            let rows = found.floats(&format!("{case}.logits")).context("logits")?;
            let stored = |name: &str| self.goldens.floats(&format!("{case}.{name}"));
            let behind = &rows[prompt * self.vocab..];
            match stored("generate_logits") {
                Some(golden) => assert_close(&what, behind, &golden[self.vocab..])?,
                None => assert_close(&what, behind, stored("decode_logits").context("steps")?)?,
            }
            if !self.crosses || self.limit.is_some_and(|limit| prompt <= limit) {
                let golden = stored("logits").context("logits")?;
                assert_close(&what, &rows[..prompt * self.vocab], golden)?;
            }
        }
        Ok(())
    }

    /// A left-padded batch is a packed one here: the rows of its real tokens must agree.
    fn check_left_padded(&self, folder: &Path) -> Result<bool> {
        let (Some(ids), Some(mask), Some(golden)) = (
            self.goldens.ids("leftpad.input_ids"),
            self.goldens.ids("leftpad.attention_mask"),
            self.goldens.floats("leftpad.logits"),
        ) else {
            return Ok(false);
        };
        let width = self.goldens.shape("leftpad.input_ids")?[1];
        let mut files = Vec::new();
        let mut expected = Vec::new();
        for (idx, (ids, mask)) in ids.chunks(width).zip(mask.chunks(width)).enumerate() {
            let real: Vec<_> = (0..width).filter(|&i| mask[i] == 1).collect();
            let real_ids: Vec<_> = real.iter().map(|&i| ids[i]).collect();
            files.push(write_ids(folder, &format!("row{idx}"), &real_ids)?);
            let row = |i: usize| &golden[(idx * width + i) * self.vocab..][..self.vocab];
            expected.push(
                real.iter()
                    .flat_map(|&i| row(i))
                    .copied()
                    .collect::<Vec<_>>(),
            );
        }
        let found = self.logits(&files, &folder.join("out.safetensors"), &[])?;
        for (idx, golden) in expected.iter().enumerate() {
            let name = format!("row{idx}.logits");
            assert_close(&name, found.floats(&name).context("logits")?, golden)?;
        }
        Ok(true)
    }
}

const FIXTURES: [&str; 14] = [
    "phi3-mini-4k",
    "phi3-mini-4k-bf16",
    "phi3-mini-4k-window",
    "phi3-mini-128k-longrope",
    "phi3-medium-4k",
    "phi3-medium-128k",
    "phi4-mini",
    "phi3-other",
    "phi3-other-longrope",
    "phi3.5-moe",
    "phi3.5-moe-jitter",
    "phi3-small-8step",
    "phi3-small-homo",
    "phi3-small-128k",
];

fn fixtures() -> Result<Vec<Kit>> {
    let open = |name: &&str| Kit::open(&fixture(name), &fixture(name));
    FIXTURES.iter().map(open).collect()
}

#[test]
fn every_golden_of_the_fixtures_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fixtures()?
        .iter()
        .try_for_each(|kit| kit.check_alone(folder.path()))
}

#[test]
fn every_golden_of_the_fixtures_packed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fixtures()?
        .iter()
        .try_for_each(|kit| kit.check_packed(folder.path()))
}

/// The kit through a GGUF file of f32 that `phi3 quantize` wrote.
fn check_gguf(mut kit: Kit, folder: &Path) -> Result<()> {
    let path = folder.join("model.gguf");
    let args = ["quantize", &arg(&kit.model), &arg(&path), "--type", "F32"];
    run(args.iter().chain(&["--force"]))?.says(DONE, &[])?;
    kit.model = path;
    kit.check_alone(folder)?;
    kit.check_packed(folder)
}

#[test]
fn every_golden_of_phi_3_small_from_gguf() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in FIXTURES
        .iter()
        .filter(|name| name.starts_with("phi3-small"))
    {
        let kit = Kit::open(&fixture(name), &fixture(name))?;
        check_gguf(kit, folder.path()).with_context(|| (*name).to_owned())?;
    }
    Ok(())
}

#[test]
fn left_padded_goldens_as_packed_sequences() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut checked = 0;
    for kit in fixtures()? {
        checked += usize::from(kit.check_left_padded(folder.path())?);
    }
    ensure!(checked == 3, "{checked} fixtures have a left-padded case");
    Ok(())
}

#[test]
fn every_golden_of_the_full_kit() -> Result<()> {
    let full = std::env::var_os("PHI3_KIT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kit"),
        PathBuf::from,
    );
    if !full.is_dir() {
        eprintln!("skipped: no full kit of goldens; set PHI3_KIT to its folder");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut kits = Vec::new();
    for entry in std::fs::read_dir(full)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !(name.starts_with("phi3-mini")
            || name.starts_with("phi3-medium")
            || (name.starts_with("phi3-small") && path.join("config.json").exists())
            || ["phi3.5-moe", "phi3.5-moe-jitter", "phi4-mini"].contains(&name.as_str()))
        {
            continue;
        }
        kits.push(Kit::open(&path, &path)?);
        let sharded = path.join("sharded");
        if sharded.is_dir() {
            kits.push(Kit::open(&sharded, &path)?);
        }
    }
    ensure!(kits.len() >= 16, "only {} kits were found", kits.len());
    for kit in &kits {
        kit.check_alone(folder.path())?;
        kit.check_packed(folder.path())?;
        kit.check_left_padded(folder.path())?;
    }
    for kit in kits {
        if kit.model.to_string_lossy().contains("phi3-small") {
            check_gguf(kit, folder.path())?;
        }
    }
    Ok(())
}

#[test]
fn threads_and_kernels_do_not_change_the_logits() -> Result<()> {
    let kit = Kit::open(&fixture("phi3-mini-4k"), &fixture("phi3-mini-4k"))?;
    let folder = tempfile::tempdir()?;
    let file = write_ids(folder.path(), "long", kit.input_ids("long")?)?;
    let out = folder.path().join("out.safetensors");
    for flags in [
        &["--threads", "1"][..],
        &["--threads", "3"],
        &["--device", "cpu", "--dtype", "F32"],
    ] {
        let found = kit.logits(std::slice::from_ref(&file), &out, flags)?;
        kit.check("long", &found, "", false)?;
    }
    for (variable, value) in [("PHI3_KERNELS", "scalar"), ("PHI3_THREADS", "2")] {
        let args = [
            "logits",
            "--model",
            &arg(&kit.model),
            "--ids",
            &arg(&file),
            "--out",
            &arg(&out),
        ];
        let mut command = crate::support::command(args);
        let run = crate::support::run_with(b"", command.env(variable, value))?;
        ensure!(run.code == Some(DONE), "{run:?}");
        kit.check("long", &Tensors::read(&out)?, "", false)?;
    }
    Ok(())
}

#[test]
fn a_dtype_that_has_no_effect_is_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = write_ids(folder.path(), "ids", &[1, 2])?;
    let out = folder.path().join("out.safetensors");
    let model = arg(&fixture("phi3-mini-4k"));
    let args = [
        "logits",
        "--model",
        &model,
        "--ids",
        &arg(&file),
        "--out",
        &arg(&out),
    ];
    let run = run(args.iter().chain(&["--dtype", "bf16"]))?;
    ensure!(
        run.code == Some(DONE) && run.stderr.contains("--dtype"),
        "{run:?}"
    );
    Ok(())
}
