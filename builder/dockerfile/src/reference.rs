//! Whether a string can name an image. What it then names is not for this crate to know.

/// What keeps `text` from being `[host[:port]/]path[:tag][@digest]` as container registries have it.
pub(crate) fn flaw(text: &str) -> Option<&'static str> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    let (name, tag) = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (name, None),
    };
    let path = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => {
            if !is_host(host) {
                return Some("what is before its first / is no registry's host");
            }
            path
        }
        _ => name,
    };
    if path.contains(|c: char| c.is_ascii_uppercase()) {
        return Some("its letters must be lower case, but for those of a tag");
    }
    if !path.split('/').all(is_component) {
        return Some("it must be of a-z and 0-9, joined by '.', '_', '__' or '-', with '/' between them");
    }
    if !tag.is_none_or(is_tag) {
        return Some("a tag is 1 to 128 letters, digits, '_', '.' and '-', the first neither '.' nor '-'");
    }
    let is_digest = |d: &str| {
        d.split_once(':')
            .is_some_and(|(a, hex)| !a.is_empty() && is_hex(hex))
    };
    (!digest.is_none_or(is_digest)).then_some("a digest is an algorithm, ':' and its hexadecimal digits")
}

fn is_hex(text: &str) -> bool {
    text.len() >= 32 && text.chars().all(|c| c.is_ascii_hexdigit())
}

fn is_host(host: &str) -> bool {
    let (name, port) = host.rsplit_once(':').unwrap_or((host, "0"));
    let sound = |c: char| c.is_ascii_alphanumeric() || "-.[]:".contains(c);
    !name.is_empty()
        && name.chars().all(sound)
        && !port.is_empty()
        && port.chars().all(|c| c.is_ascii_digit() || c == ']')
}

fn is_tag(tag: &str) -> bool {
    tag.len() <= 128
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

// Lower-case letters and digits, single `.`, `_` or `__`, or any number of `-` between them.
fn is_component(component: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separators = component.split(plain).filter(|s| !s.is_empty());
    component.starts_with(plain)
        && component.ends_with(plain)
        && separators
            .into_iter()
            .all(|s| matches!(s, "." | "_" | "__") || s.chars().all(|c| c == '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_are_known() {
        let digest = format!("alpine@sha256:{}", "a".repeat(64));
        for text in [
            "alpine",
            "python:3.12-slim",
            "nvcr.io/nvidia/l4t-pytorch:r32.4.3-pth1.6-py3",
            "localhost:5000/a__b/c-d",
            &digest,
        ] {
            assert_eq!(flaw(text), None, "{text}");
        }
        for text in [
            "",
            "busybox:",
            "Alpine",
            "a//b",
            "a:b c",
            "-a",
            "a..b",
            "a@b",
            "host.x:/a",
            "a/",
        ] {
            assert!(flaw(text).is_some(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said() {
        for (text, part) in [
            ("Bad::", "lower case"),
            ("a//b", "'/' between"),
            ("busybox:", "a tag"),
            ("a@b", "a digest"),
            ("host.x:/a", "host"),
        ] {
            assert!(flaw(text).is_some_and(|f| f.contains(part)), "{text}");
        }
    }
}
