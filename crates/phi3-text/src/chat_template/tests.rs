use std::time::Duration;

use serde_json::json;

use super::*;
use crate::testing::kit_json;

fn tokens() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<s>".to_owned()),
        eos: Some("<|endoftext|>".to_owned()),
        ..SpecialTokens::default()
    }
}

fn render(source: &str) -> Result<String> {
    let messages = [Message::system("Be brief."), Message::user("Hi")];
    ChatTemplate::parse(source, tokens())?.render(&messages, true)
}

fn rendered(source: &str) -> String {
    render(source).unwrap_or_else(|error| panic!("{source}: {error}"))
}

#[test]
fn goldens() {
    let (Some(templates), Some(golden)) = (
        kit_json("chat-templates/templates.json"),
        kit_json("chat-templates/golden.json"),
    ) else {
        return;
    };
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 80, "{}", cases.len());
    for case in cases {
        let template = &templates[case["family"].as_str().unwrap()];
        let tokens = SpecialTokens::from_config(template);
        assert!(tokens.eos.is_some());
        let source = template["template"].as_str().unwrap();
        let template = ChatTemplate::parse(source, tokens).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let expected = case["rendered"].as_str().unwrap();
        assert_eq!(
            template.render(&messages, prompt).unwrap(),
            expected,
            "{case}"
        );
    }
}

#[test]
fn traps_of_the_family() {
    // The same points in which the published templates differ, in templates of our own.
    let ends_with_eos = "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' + m['content'] }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}";
    let template = ChatTemplate::parse(ends_with_eos, tokens()).unwrap();
    let user = [Message::user("  Hi \n")];
    assert_eq!(
        template.render(&user, true).unwrap(),
        "<s><|user|>  Hi \n<|assistant|>"
    );
    assert_eq!(
        template.render(&user, false).unwrap(),
        "<s><|user|>  Hi \n<|endoftext|>"
    );
    // An undefined token prints as nothing.
    let bare = ChatTemplate::parse(ends_with_eos, SpecialTokens::default()).unwrap();
    assert_eq!(bare.render(&user, false).unwrap(), "<|user|>  Hi \n");

    let last_turn = "{% for m in messages %}{{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '>' -}}{% endif %}";
    let template = ChatTemplate::parse(last_turn, tokens()).unwrap();
    assert_eq!(template.render(&user, true).unwrap(), "  Hi \n\n>");
    let answered = [Message::user("Hi"), Message::assistant("Ho")];
    assert_eq!(template.render(&answered, true).unwrap(), "Hi\nHo\n");

    let tools = "{% for m in messages %}{% if 'tools' in m and m['tools'] is not none %}{{ m['tools'] }}\
        {% else %}{{ m.content }}{% endif %}{% endfor %}";
    let mut message = Message::system("none");
    assert_eq!(
        ChatTemplate::parse(tools, tokens())
            .unwrap()
            .render(&[message.clone()], true)
            .unwrap(),
        "none"
    );
    message.extra.insert("tools".to_owned(), json!("[{}]"));
    assert_eq!(
        ChatTemplate::parse(tools, tokens())
            .unwrap()
            .render(&[message], true)
            .unwrap(),
        "[{}]"
    );
}

#[test]
fn whitespace_as_jinja_with_trimmed_blocks() {
    assert_eq!(
        rendered("a\n  {% if true %}\nb\n  {% endif %}\nc\n"),
        "a\nb\nc"
    );
    assert_eq!(rendered("a {%- if true -%} b {%- endif -%} c"), "abc");
    assert_eq!(rendered("  {%+ if true +%}\nb{% endif %}"), "  \nb");
    assert_eq!(rendered("x\n  {# note ~ + | #}\ny"), "x\ny");
    assert_eq!(
        rendered("{% generation %}\na\n{%- endgeneration -%}\n b"),
        "ab"
    );
    assert_eq!(
        rendered("{% raw %}{{ a ~ b | c }}{% endraw %}{{ 1 + 2 }}"),
        "{{ a ~ b | c }}3"
    );
}

#[test]
fn python_shows_through() {
    for (source, expected) in [
        (
            "{{ none }} {{ true }} {{ 1.0 }} {{ 1e16 }} {{ 0.00001 }}",
            "None True 1.0 1e+16 1e-05",
        ),
        ("{{ [1, 'a', \"it's\", none] }}", "[1, 'a', \"it's\", None]"),
        ("{{ {'a': [true, 1.5]} }}", "{'a': [True, 1.5]}"),
        ("{{ messages[0].content.upper().split(' ')[0] }}", "BE"),
        ("{{ ' x '.strip() ~ 'ab'.replace('a', 'b') }}", "xbb"),
        (
            "{{ ', '.join(['a', 'b']) }}{{ ['c', 'd'] | join('-') }}",
            "a, bc-d",
        ),
        (
            "{{ messages | length }}{{ messages[1:][0]['role'] }}",
            "2user",
        ),
        (
            "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{% endfor %}",
            "0False1True",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        (
            "{% macro f(x, y='!') %}{{ x + y }}{% endmacro %}{{ f('a') ~ f('b', y='?') }}",
            "a!b?",
        ),
        (
            "{{ missing }}{{ missing | default('d') }}{{ messages[0].nope is defined }}",
            "dFalse",
        ),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        (
            "{{ messages[0].content is string and messages is iterable and not (3 is string) }}",
            "True",
        ),
        (
            "{{ 2 * 3 + 4 ** 2 - 1 }} {{ -1 + 2 }} {{ 7 // 2 }} {{ 'ab' * 2 }}",
            "21 1 3 abab",
        ),
        (
            "{{ 'a' if 1 is odd else 'b' }}{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}",
            "a['Hi']",
        ),
        ("{{ '%s-%d' | format('a', 3) }}", "a-3"),
        ("{{ true ~ none ~ 1.0 ~ [1, 'a'] }}", "TrueNone1.0[1, 'a']"),
        ("{{ 'a' ~ 2 * 3 ~ -1 ~ 7 % 4 ~ 'b' + 'c' }}", "a6-13bc"),
        (
            "{{ -1 ~ 2 }}{{ 2 * 2 ~ true }}{{ 'x' ~ y is defined }}{{ not 'x' ~ none }}",
            "-124TruexFalseFalse",
        ),
        (
            "{{ ('a' ~ none) ~ {'k': true ~ 'v'}['k'] ~ [none ~ 1][0] }}",
            "aNoneTruevNone1",
        ),
        (
            "{{ 'a' ~ true if true else 'b' ~ false }}{{ 'x' ~ none == 'xNone' }}",
            "aTrueTrue",
        ),
        (
            "{{- 'a' ~ true -}}{{ [true] | trim }}{{ none | upper }}{% set x = 'n' ~ none %}{{ x }}",
            "aTrue[True]NONEnNone",
        ),
        (
            "{% for c in 'a' ~ true %}{{ c }}.{% endfor %}{{ 'a' ~ true | lower ~ 'b' }}",
            "a.T.r.u.e.atrueb",
        ),
        (
            "{{ missing ~ 'x' ~ messages[0].nope }}{{ 7 // 2 ~ 2 ** 3 }}",
            "x38",
        ),
    ] {
        assert_eq!(rendered(source), expected, "{source}");
    }
}

#[test]
fn json_as_python_dumps_it() {
    let source = |arguments: &str| {
        format!("{{{{ {{'b': [1, 2.0, 'é<\"'], 'a': {{}}, 'n': none}} | tojson{arguments} }}}}")
    };
    assert_eq!(
        rendered(&source("")),
        r#"{"b": [1, 2.0, "é<\""], "a": {}, "n": null}"#
    );
    assert_eq!(
        rendered(&source("(sort_keys=true, separators=(',', ':'))")),
        r#"{"a":{},"b":[1,2.0,"é<\""],"n":null}"#
    );
    assert_eq!(
        rendered(&source("(indent=2)")),
        "{\n  \"b\": [\n    1,\n    2.0,\n    \"é<\\\"\"\n  ],\n  \"a\": {},\n  \"n\": null\n}"
    );
    assert_eq!(
        rendered("{{ 'é😀' | tojson(ensure_ascii=true) }}"),
        r#""\u00e9\ud83d\ude00""#
    );
    assert_eq!(rendered("{{ [] | tojson(indent=4) }}"), "[]");
    // Order and content of tools reach the text unchanged.
    let options = RenderOptions {
        tools: Some(vec![json!({"name": "f", "args": {"z": 1, "a": 2}})]),
        extra: json!({"enable_thinking": false})
            .as_object()
            .unwrap()
            .clone(),
        ..RenderOptions::default()
    };
    let template =
        ChatTemplate::parse("{{ tools | tojson }}{{ enable_thinking }}", tokens()).unwrap();
    assert_eq!(
        template.render_with(&[], &options).unwrap(),
        r#"[{"name": "f", "args": {"z": 1, "a": 2}}]False"#
    );
}

#[test]
fn dates() {
    let at = |seconds: u64, format: &str| {
        let source = format!("{{{{ strftime_now('{format}') }}}}");
        ChatTemplate::parse(&source, tokens())
            .unwrap()
            .with_clock(move || SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
            .render(&[], true)
    };
    let leap_day = 951_782_400 + 13 * 3600 + 5 * 60 + 9; // 2000-02-29 13:05:09
    assert_eq!(at(leap_day, "%d %b %Y").unwrap(), "29 Feb 2000");
    assert_eq!(
        at(leap_day, "%A, %-d %B %y %H:%M:%S %I %p %j %F %T %%").unwrap(),
        "Tuesday, 29 February 00 13:05:09 01 PM 060 2000-02-29 13:05:09 %"
    );
    assert_eq!(at(0, "%a %Y-%m-%d").unwrap(), "Thu 1970-01-01");
    assert_eq!(at(1_735_689_599, "%F").unwrap(), "2024-12-31");
    assert_eq!(at(1_735_689_600, "%F").unwrap(), "2025-01-01");
    assert!(at(0, "%Q").unwrap_err().to_string().contains("%Q"));
}

#[test]
fn content_in_parts() {
    let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
        {% for part in m.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}\
        {% endif %}{% endfor %}{% endif %}{% endfor %}";
    let text = "a".to_owned();
    let message = Message::user(vec![Part::Image, Part::Text { text }]);
    let template = ChatTemplate::parse(source, tokens()).unwrap();
    assert_eq!(
        template
            .render(std::slice::from_ref(&message), true)
            .unwrap(),
        "<|image|>a"
    );
    let json = serde_json::to_value(&message).unwrap();
    assert_eq!(json["content"][0], json!({"type": "image"}));
    assert_eq!(serde_json::from_value::<Message>(json).unwrap(), message);
    // A template that adds the content to a string cannot take parts, and says so.
    let template = ChatTemplate::parse("\n{{ 'a' + messages[0]['content'] }}", tokens()).unwrap();
    let error = template.render(&[message], true).unwrap_err();
    assert!(
        matches!(error, Error::Template { line: 2, .. }),
        "{error:?}"
    );
    let empty: Message = serde_json::from_value(json!({"role": "assistant"})).unwrap();
    assert_eq!(empty.content, Content::None);
}

#[test]
fn errors_name_line_and_cause() {
    let error = render("a\n{% for m in messages %}").unwrap_err();
    assert!(
        matches!(error, Error::Template { line: 2, .. }),
        "{error:?}"
    );
    let error = render("\n\n{{ nope('x') }}").unwrap_err();
    assert_eq!(
        error.to_string(),
        "chat template, line 3: unknown function: nope is unknown"
    );
    let error = render("{{ messages.x.y }}").unwrap_err();
    assert!(
        matches!(error, Error::Template { line: 1, .. }),
        "{error:?}"
    );
    let error = render("\n{{ raise_exception('roles must alternate') }}").unwrap_err();
    match error {
        Error::TemplateRaised { line: 2, message } => assert_eq!(message, "roles must alternate"),
        other => panic!("{other:?}"),
    }
    // Through a macro as well.
    let source = "{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(source), Err(Error::TemplateRaised { .. })));
    assert!(render("{% include 'other' %}").is_err());
    assert!(render("{% extends 'chat template' %}").is_err());
}

#[test]
fn hostile_templates_end_with_an_error() {
    let doubling = |body: &str| {
        format!(
            "{{% set ns = namespace(s='abcdefgh', l=[1]) %}}{{% for i in range(99) %}}{body}{{% endfor %}}"
        )
    };
    let literal = "x".repeat(200_000);
    for source in [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}".to_owned(),
        "{% for i in range(10000000000) %}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}".to_owned(),
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}".to_owned(),
        doubling("{% set ns.s = ns.s ~ ns.s %}"),
        doubling("{% set ns.s = ns.s + ns.s %}"),
        doubling("{% set ns.s = (ns.s)~(ns.s) %}"),
        doubling("{% set ns.s = ns.s * 10 ~ '' %}"),
        doubling("{% set ns.s = [ns.s, ns.s] | join %}"),
        doubling("{% set ns.s = ns.s.join([ns.s, ns.s]) %}"),
        doubling("{% set ns.s = ns.s | replace('a', 'aa') | replace('b', 'bb') ~ ns.s %}"),
        doubling("{% set ns.s = ns.s.replace('a', 'aa') + ns.s %}"),
        doubling("{% set ns.s = '%s%s' | format(ns.s, ns.s) %}"),
        doubling("{% set ns.s = '{}{}'.format(ns.s, ns.s) %}"),
        doubling("{% set ns.l = (ns.l + ns.l) | list %}"),
        doubling("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
        doubling("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}",
        doubling("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = '' ~ ns.l %}",
        doubling("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = ns.l ~ '' %}",
        doubling("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | trim }}{{ ns.l | string }}",
        doubling("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
        format!("{{% set x %}}{{% for i in range(99999) %}}{literal}{{% endfor %}}{{% endset %}}"),
        format!("{{% set x %}}{{% for i in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "{x".repeat(100_000)),
        "{{ ([1] * 1000000000000) | list }}".to_owned(),
        "{{ [1] | batch(1000000000000000) }}".to_owned(),
        "{{ [1] | batch(3, fill_with=2) | slice(10000000000) }}".to_owned(),
        "{{ 'a\nb' | indent(1000000000000) }}".to_owned(),
        "{{ 'a\nb' | indent(width=1000000000000) }}".to_owned(),
        "{{ '%999999999d' | format(1) }}".to_owned(),
        "{{ [1] | tojson(indent=1000000000000) }}".to_owned(),
        "{{ ('a' * 90000000) ~ 'b' }}".to_owned(),
        "(".repeat(100) + "{{ " + &"(".repeat(10_000) + &")".repeat(10_000) + " }}",
        "{{ ".to_owned() + &"[".repeat(10_000),
        "{% if true %}".repeat(10_000),
        "{{ 'unclosed".to_owned(),
        "{{ 'unclosed\\".to_owned(),
        "{%".to_owned(),
        "{% raw %}".to_owned(),
        "{#".to_owned(),
        "x".repeat(limits::MAX_SOURCE + 1),
    ] {
        let shown: String = source.chars().take(90).collect();
        let started = std::time::Instant::now();
        let outcome = render(&source);
        assert!(outcome.is_err(), "{shown}");
        assert!(started.elapsed() < Duration::from_secs(20), "{shown}: {:?}", started.elapsed());
    }
}

#[test]
fn limits_are_named_as_such() {
    for source in [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set x = 'x' * 1000000 %}{% for i in range(99) %}{{ x }}{% endfor %}",
        &format!(
            "{{% for i in range(99999) %}}{}{{% endfor %}}",
            "x".repeat(500)
        ),
    ] {
        let outcome = render(source).map(|text| text.len());
        assert!(
            matches!(outcome, Err(Error::TemplateLimit { .. })),
            "{outcome:?}"
        );
    }
    // A long but honest conversation is well within them.
    let messages: Vec<_> = (0..2000)
        .map(|turn| Message::user(format!("turn {turn}")))
        .collect();
    let source = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + '<|end|>\n' }}{% endfor %}";
    let text = ChatTemplate::parse(source, tokens())
        .unwrap()
        .render(&messages, true)
        .unwrap();
    assert!(text.ends_with("turn 1999<|end|>\n"));
}

#[test]
fn where_a_template_is_found() {
    let config = json!({"chat_template": "b"});
    let named =
        json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let only = json!([{"name": "rag", "template": "r"}]);
    let source = |value| TemplateSource {
        origin: "chat_template.jinja",
        value,
    };
    let pick = |sources: &[TemplateSource<'_>]| {
        ChatTemplate::from_sources(sources, tokens()).map(|template| template.source().to_owned())
    };
    assert_eq!(
        pick(&[source(None), source(config.get("chat_template"))]).unwrap(),
        "b"
    );
    assert_eq!(
        pick(&[source(Some(&named)), source(config.get("chat_template"))]).unwrap(),
        "d"
    );
    assert_eq!(pick(&[source(Some(&only))]).unwrap(), "r");
    let other = TemplateSource {
        origin: "tokenizer_config.json",
        value: Some(&json!(3)),
    };
    let error = pick(&[source(None), other]).unwrap_err().to_string();
    assert!(
        error.contains("chat_template.jinja, tokenizer_config.json"),
        "{error}"
    );
}
