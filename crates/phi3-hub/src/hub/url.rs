//! The little of URLs that a download needs.

use ureq::http::Uri;

/// Escapes a path for a URL; `/` stays.
pub(crate) fn encode_path(path: &str) -> String {
    encode(path, true)
}

/// Escapes one segment for a URL, `/` included: branches may contain it.
pub(crate) fn encode_segment(segment: &str) -> String {
    encode(segment, false)
}

fn encode(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(byte.into())
            }
            b'/' if keep_slash => out.push('/'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Where a redirect from `base` leads: `location` may be absolute, or relative in any of the ways
/// of RFC 3986.
pub(crate) fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    let absolute = if has_scheme(location) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else if location.is_empty() {
        return None;
    } else {
        let folder = base
            .path()
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        let (path, query) = match location.split_once('?') {
            Some((path, query)) => (path, format!("?{query}")),
            None => (location, String::new()),
        };
        format!(
            "{scheme}://{authority}{}{query}",
            without_dots(&format!("{folder}/{path}"))
        )
    };
    let uri: Uri = absolute.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    (known && uri.host().is_some_and(|host| !host.is_empty())).then_some(uri)
}

fn has_scheme(location: &str) -> bool {
    location.split_once(':').is_some_and(|(scheme, _)| {
        !scheme.is_empty()
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

fn without_dots(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/').skip(1) {
        match part {
            "." => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Scheme, host and port: what a token belongs to.
pub(crate) fn origin(uri: &Uri) -> (String, String, u16) {
    let scheme = uri.scheme_str().unwrap_or_default().to_ascii_lowercase();
    let default = if scheme == "https" { 443 } else { 80 };
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    (scheme, host, uri.port_u16().unwrap_or(default))
}

/// Whether a host is this machine, which no proxy should be asked about.
pub(crate) fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped() {
        assert_eq!(
            encode_path("sub dir/ä?#%.json"),
            "sub%20dir/%C3%A4%3F%23%25.json"
        );
        assert_eq!(encode_segment("refs/pr/1"), "refs%2Fpr%2F1");
    }

    #[test]
    fn redirects_of_every_form() {
        let base: Uri = "https://hub.example:8443/org/name/resolve/main/a.bin?x=1"
            .parse()
            .unwrap();
        for (location, expected) in [
            (
                "https://cdn.example/a?sig=a%2Fb",
                "https://cdn.example/a?sig=a%2Fb",
            ),
            ("//cdn.example/a", "https://cdn.example/a"),
            ("/api/a?b=c", "https://hub.example:8443/api/a?b=c"),
            (
                "b.bin",
                "https://hub.example:8443/org/name/resolve/main/b.bin",
            ),
            (
                "../v2/./b.bin?q=../x",
                "https://hub.example:8443/org/name/resolve/v2/b.bin?q=../x",
            ),
            (
                "?y=2",
                "https://hub.example:8443/org/name/resolve/main/a.bin?y=2",
            ),
            ("/a#part", "https://hub.example:8443/a"),
        ] {
            assert_eq!(
                resolve(&base, location).unwrap().to_string(),
                expected,
                "{location}"
            );
        }
        for location in [
            "",
            "ftp://x/y",
            "file:///etc/passwd",
            "javascript:x",
            "http://",
            "ht tp://x",
        ] {
            assert_eq!(resolve(&base, location), None, "{location:?}");
        }
    }

    #[test]
    fn an_origin_has_a_port() {
        let of = |uri: &str| origin(&uri.parse().unwrap());
        assert_eq!(of("https://A.example/x"), of("https://a.example:443/y"));
        assert_ne!(of("https://a.example/x"), of("http://a.example/x"));
        assert_ne!(of("http://127.0.0.1:1/x"), of("http://127.0.0.1:2/x"));
        assert_ne!(of("https://a.example/x"), of("https://a.example.evil/x"));
    }

    #[test]
    fn loopback_hosts() {
        for (uri, expected) in [
            ("http://127.0.0.1:8080/x", true),
            ("http://localhost/x", true),
            ("http://[::1]:80/x", true),
            ("http://127.0.0.1.example/x", false),
            ("https://huggingface.co/x", false),
        ] {
            assert_eq!(is_loopback(&uri.parse().unwrap()), expected, "{uri}");
        }
    }
}
