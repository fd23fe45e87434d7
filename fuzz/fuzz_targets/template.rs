//! A chat template and a conversation: the template's source, a line `---`, and the messages as
//! JSON. Without the line, or with messages that are none, a conversation of every role.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phi3::text::{ChatTemplate, Message, SpecialTokens};
use phi3_tests::hostile::TEMPLATE;

fuzz_target!(init: phi3_fuzz::start(seeds), |data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let (source, messages) = text.split_once("\n---\n").unwrap_or((&text, ""));
    let Ok(template) = ChatTemplate::parse(source, tokens()) else {
        return;
    };
    let messages = serde_json::from_str(messages).unwrap_or_else(|_| conversation());
    for add_generation_prompt in [true, false] {
        match template.render(&messages, add_generation_prompt) {
            Ok(text) => assert!(text.len() <= 32 << 20, "{} bytes", text.len()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
});

fn tokens() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<s>".to_owned()),
        eos: Some("<|end|>".to_owned()),
        unk: None,
        pad: None,
    }
}

fn conversation() -> Vec<Message> {
    vec![
        Message::system("Be brief."),
        Message::user("Hi <é>"),
        Message::assistant("Hello!"),
        Message::user("1 + 1?"),
    ]
}

fn seeds() -> Vec<Vec<u8>> {
    let messages = r#"[{"role":"system","content":"a","tools":"[]"},{"role":"user","content":[{"type":"text","text":"b"},{"type":"image"}]},{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":{"x":1}}}]}]"#;
    let with = |source: &str| format!("{source}\n---\n{messages}").into_bytes();
    vec![
        TEMPLATE.into(),
        with(TEMPLATE),
        with(
            "{%- macro one(m, deep=false) -%}{{ m['role'] | upper | trim ~ ': ' + m.content | string }}\
             {%- endmacro -%}{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% if loop.first \
             and not m.tools is defined %}{% set ns.n = ns.n + 1 %}{{ one(m) }}{% elif m is mapping %}\
             {{ m | tojson(indent=2) }}{% else %}{{ raise_exception('no ' ~ m.role) }}{% endif %}\
             {% endfor %}{{ ns.n }}",
        ),
        with(
            "{# c #}{% if messages[0]['role'] == 'system' %}{{ bos_token + messages[0]['content'].strip() \
             }}{% endif %}{% for i in range(3) %}{{- loop.index0 * 'ab' }}{% if i > 1 %}{% break %}\
             {% endif %}{% endfor %}{{ strftime_now('%Y') | length }}{% generation %}x{% endgeneration %}",
        ),
        with(
            "{% set x = messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list \
             %}{% for a in x recursive %}{{ a | replace('a', 'b') | indent(4) }}{{ '%s' | format(a) }}\
             {% endfor %}{{ x | join(', ') }}{% raw %}{{ }}{% endraw %}{{ 'a,b'.split(',') | batch(2) | list }}",
        ),
    ]
}
