//! Tokenizers and chat templates that are broken, or mean harm.

use anyhow::Result;
use phi3_tests::hostile::Folder;
use serde_json::{Value, json};

use crate::{CHAT, COMPLETE, Case, LOAD, TIME_LIMIT, check_folders, cpu_time, refused};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

const TOKENIZERS: &[Case] = &[
    Case {
        name: "an empty tokenizer file",
        damage: |folder| folder.cut(TOKENIZER, 0),
        says: &[TOKENIZER, "EOF"],
    },
    Case {
        name: "a tokenizer that is cut",
        damage: |folder| folder.cut(TOKENIZER, 700),
        says: &[TOKENIZER, "EOF"],
    },
    Case {
        name: "a tokenizer that is not JSON",
        damage: |folder| folder.write(TOKENIZER, [0xff; 100]),
        says: &[TOKENIZER, "line 1"],
    },
    Case {
        name: "a tokenizer nested 100,000 deep",
        damage: |folder| folder.write(TOKENIZER, "{\"model\":".repeat(100_000)),
        says: &[TOKENIZER],
    },
    Case {
        name: "an empty vocabulary",
        damage: |folder| {
            set(folder, "/added_tokens", json!([]))?;
            set(folder, "/model/merges", json!([]))?;
            set(folder, "/model/vocab", json!({}))
        },
        says: &[TOKENIZER, "vocabulary is empty"],
    },
    Case {
        name: "a tokenizer of an unknown kind",
        damage: |folder| set(folder, "/model/type", json!("Oracle")),
        says: &[TOKENIZER],
    },
    Case {
        name: "a merge of tokens that are not there",
        damage: |folder| set(folder, "/model/merges", json!([["x", "y"]])),
        says: &[TOKENIZER, "x"],
    },
    Case {
        name: "a negative id in the vocabulary",
        damage: |folder| set(folder, "/model/vocab/hi", json!(-1)),
        says: &[TOKENIZER],
    },
    Case {
        name: "a regex that does not parse",
        damage: |folder| {
            let split = json!({"type": "Split", "pattern": {"Regex": "(unclosed"},
                "behavior": "Isolated", "invert": false});
            set(folder, "/pre_tokenizer", split)
        },
        says: &[TOKENIZER],
    },
    Case {
        name: "a tokenizer config of another tokenizer",
        damage: |folder| {
            let token = json!({"900": {"content": "<|end|>", "special": true}});
            folder.set(CONFIG, "/added_tokens_decoder", token)
        },
        says: &[CONFIG, "<|end|>", "900", "14", "do not belong together"],
    },
    Case {
        name: "an added token whose id is text",
        damage: |folder| {
            let token = json!({"first": {"content": "a"}});
            folder.set(CONFIG, "/added_tokens_decoder", token)
        },
        says: &[CONFIG, "added_tokens_decoder", "first"],
    },
    Case {
        name: "a BOS token that is not in the vocabulary",
        damage: |folder| folder.set(CONFIG, "/bos_token", json!("<start>")),
        says: &[CONFIG, "add_bos_token", "not in the vocabulary"],
    },
    Case {
        name: "a tokenizer config that is not JSON",
        damage: |folder| folder.write(CONFIG, "{'bos_token': '<s>'}"),
        says: &[CONFIG, "line 1, column 2"],
    },
];

fn set(folder: &Folder, pointer: &str, value: Value) -> Result<()> {
    folder.set(TOKENIZER, pointer, value)
}

#[test]
fn broken_tokenizers() {
    check_folders(LOAD, TOKENIZERS);
}

const OTHERS: &[Case] = &[
    Case {
        name: "a vocabulary larger than the model's",
        damage: |folder| set(folder, "/model/vocab/▁hi", json!(900)),
        says: &["token id 900", "vocabulary of 320"],
    },
    Case {
        name: "no tokenizer at all",
        damage: |folder| folder.remove(TOKENIZER),
        says: &["no tokenizer", TOKENIZER],
    },
];

#[test]
fn tokenizers_of_another_model() {
    check_folders(COMPLETE, OTHERS);
}

/// The regex engine gives up after a million steps; the tokenizer library then takes the rest of
/// the text as one piece. Nothing tells the caller, but it ends.
#[test]
fn a_regex_of_exponential_time_ends() {
    let folder = Folder::good().unwrap();
    let regex = r"(?:(?=\w)\w|(?=\w)\w\w)+(?=!)";
    let split = json!({"type": "Split", "pattern": {"Regex": regex},
        "behavior": "Isolated", "invert": false});
    set(&folder, "/pre_tokenizer", split).unwrap();
    let model = phi3::load(folder.path().to_str().unwrap()).unwrap();
    let start = cpu_time();
    let ids = model
        .tokenizer()
        .unwrap()
        .encode(&"hi".repeat(99), true)
        .unwrap();
    assert_eq!(ids.len(), 1 + 99);
    assert!(cpu_time() - start < TIME_LIMIT);
}

/// A template, and what the error says.
const TEMPLATES: &[(&str, &str, &[&str])] = &[
    (
        "loops in loops",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}\
         {% endfor %}{% endfor %}",
        &["line 1", "limit", "instructions"],
    ),
    (
        "a macro that calls itself",
        "{% macro again() %}\n{{ again() }}{% endmacro %}{{ again() }}",
        &["line 2", "limit", "nested calls"],
    ),
    (
        "two macros that call each other",
        "{% macro a() %}{{ b() }}{% endmacro %}\n{% macro b() %}{{ a() }}{% endmacro %}\n{{ a() }}",
        &["chat template, line"],
    ),
    (
        "a template that includes itself",
        "{% include 'chat template' %}",
        &["line 1", "chat template"],
    ),
    (
        "a template that extends itself",
        "{% extends 'chat template' %}",
        &["line 1", "chat template"],
    ),
    (
        "a recursive loop without end",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        &["line 1", "limit"],
    ),
    (
        "a range of 2^62",
        "\n{% for i in range(4611686018427387904) %}{% endfor %}",
        &["line 2", "range"],
    ),
    (
        "text that doubles",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        &["line 1", "limit", "bytes of text"],
    ),
    (
        "text that is repeated",
        "{{ 'abcdefgh' * 9000000000000000000 }}",
        &["line 1"],
    ),
    (
        "a list that doubles",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        &["line 1", "limit", "items"],
    ),
    (
        "padding of a billion spaces",
        "{{ '%999999999d' | format(1) }}",
        &["line 1", "limit", "width"],
    ),
    (
        "an indent of 2^60",
        "{{ 'a\\nb' | indent(1152921504606846976) }}",
        &["line 1", "limit", "width"],
    ),
    (
        "output without end",
        "{% for i in range(99999) %}{{ 'x' | indent(9000, true) }}{% endfor %}",
        &["line 1", "limit", "bytes of text"],
    ),
    (
        "a tag that is not closed",
        "Hello\n{% for m in messages %}{{ m.content }}",
        &["line 2", "end of input"],
    ),
    (
        "an expression that is none",
        "\n\n{{ messages[ }}",
        &["line 3", "syntax error"],
    ),
    (
        "a filter that nobody knows",
        "{{ messages | obfuscate }}",
        &["line 1", "obfuscate"],
    ),
    (
        "a function that nobody knows",
        "{{ open('/etc/passwd').read() }}",
        &["line 1", "open"],
    ),
    (
        "a field of something undefined",
        "\n{{ nothing.at.all }}",
        &["line 2", "undefined"],
    ),
    (
        "a template that refuses",
        "{{ raise_exception('Roles must alternate') }}",
        &["refuses", "Roles must alternate"],
    ),
    (
        "a template that writes nothing",
        "{% set x = 1 %}",
        &["prompt has no token"],
    ),
    ("a division by zero", "{{ 1 // 0 }}", &["line 1"]),
];

#[test]
fn templates_that_are_broken_or_mean_harm() {
    let failures: Vec<String> = TEMPLATES
        .iter()
        .filter_map(|(name, template, says)| {
            let folder = Folder::good().unwrap();
            folder.write("chat_template.jinja", template).unwrap();
            refused(name, folder.path(), CHAT, says)
        })
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

const TEMPLATE_FILES: &[Case] = &[
    Case {
        name: "a template that is not UTF-8",
        damage: |folder| folder.write("chat_template.jinja", b"{{ messages }}\xff"),
        says: &["chat_template.jinja", "UTF-8", "byte 14"],
    },
    Case {
        name: "a template of 2 megabytes",
        damage: |folder| folder.write("chat_template.jinja", vec![b'a'; 2 << 20]),
        says: &["chat_template.jinja", "2097152", "1048576"],
    },
    Case {
        name: "a template that is a number",
        damage: |folder| folder.set(CONFIG, "/chat_template", json!(7)),
        says: &[CONFIG, "chat template", "neither a text nor a list"],
    },
    Case {
        name: "a list of templates without names",
        damage: |folder| folder.set(CONFIG, "/chat_template", json!([{"template": "a"}])),
        says: &[CONFIG, "chat template", "entry 0"],
    },
    Case {
        name: "no template at all",
        damage: |folder| folder.set(CONFIG, "/chat_template", Value::Null),
        says: &["no chat template", "chat_template.jinja"],
    },
];

#[test]
fn template_files_of_another_kind() {
    check_folders(CHAT, TEMPLATE_FILES);
}

#[test]
fn a_broken_template_is_said_when_the_model_is_loaded() {
    let folder = Folder::good().unwrap();
    folder.write("chat_template.jinja", "{% if %}").unwrap();
    let failure = refused(
        "template",
        folder.path(),
        COMPLETE,
        &["chat template, line 1"],
    );
    assert_eq!(failure, None);
}
