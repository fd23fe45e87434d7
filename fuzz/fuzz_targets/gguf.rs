//! A GGUF file through everything that reads one, up to a token of the model in it.
#![no_main]

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use phi3::ModelConfig;
use phi3::hub::ChatTemplateSource;
use phi3::hub::gguf::GgufFile;
use phi3::nn::{CausalLm, Input, LogitRows, Span, Weights};
use phi3::text::{ChatTemplate, Message, SpecialTokens, Tokenizer};
use phi3_tests::hostile::Gguf;

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    let Ok(file) = GgufFile::parse(data.to_vec().into(), "fuzz.gguf") else {
        return;
    };
    for (_, value) in file.metadata() {
        assert!(!value.to_string().is_empty() || value.as_str() == Some(""));
    }
    assert_eq!(file.tensors().len(), file.container().tensors().len());
    for tensor in file.container().tensors() {
        if let Ok(bytes) = file.container().data(tensor) {
            assert_eq!(Some(bytes.len() as u64), tensor.size);
        }
    }
    _ = file.architecture();
    _ = file.generation_config();
    if let Ok(files) = file.tokenizer()
        && let Some(json) = files.tokenizer_json
    {
        // What is made from an accepted vocabulary is always a tokenizer.
        let tokenizer = Tokenizer::from_json(&json, files.tokenizer_config.as_ref());
        if let Ok(ids) = tokenizer.and_then(|t| t.encode("hi ho<|end|>\n", true)) {
            assert!(ids.iter().all(|id| (*id as usize) < data.len()));
        }
    }
    if let Ok(Some(json)) = file.chat_template()
        && let Ok(Some(source)) = ChatTemplateSource::from_json(&json, "fuzz.gguf")
        && let Ok(template) = ChatTemplate::parse(&source.text, SpecialTokens::default())
    {
        _ = template.render(&[Message::user("hi")], true);
    }
    let weights = file.weights();
    if let Ok(weights) = &weights {
        for name in weights.names() {
            let tensor = weights.tensor(&name).ok().flatten();
            if let Some(tensor) = tensor.filter(|tensor| tensor.elements() < 1 << 20) {
                _ = tensor.to_f32();
            }
        }
    }
    if let (Ok(config), Ok(weights)) = (file.config(), weights)
        && let Ok(config) = ModelConfig::from_json(&config)
        && let Ok(model) = config.build(Weights::new(weights, Device::Cpu, DType::F32))
    {
        step(model.as_ref());
    }
});

/// A model that was built also runs, whatever its numbers are.
fn step(model: &dyn CausalLm) {
    let mut cache = model.new_cache();
    let mut spans = [Span::new(1, &mut cache).with_logits(LogitRows::Last)];
    let logits = model.forward(Input::Ids(&[0]), &mut spans, None);
    let logits = logits.expect("a model whose tensors all fit runs");
    assert_eq!(logits.dims(), [1, model.info().vocab_size]);
}

fn seeds() -> Vec<Vec<u8>> {
    let good = Gguf::good();
    let mut byte_level = Gguf::good();
    byte_level.set_byte_level();
    let mut headers = Gguf::good();
    headers.tensors.clear();
    let files = [good, byte_level, headers];
    files
        .iter()
        .map(|file| file.to_bytes().expect("the seeds are good files"))
        .collect()
}
