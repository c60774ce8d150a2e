//! Paths of images and contexts: strings with `/`, never looked up.

/// The shortest spelling of a path: no `.`, no empty parts, `..` taken where it can be. Empty is `.`.
pub(crate) fn clean(path: &str) -> String {
    let absolute = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|p| *p != "..") => drop(parts.pop()),
            ".." if absolute => {}
            part => parts.push(part),
        }
    }
    match (absolute, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => parts.join("/"),
    }
}

/// `path` seen from the directory `dir`, absolute and clean; `..` stops at the root.
pub(crate) fn join(dir: &str, path: &str) -> String {
    match path.starts_with('/') {
        true => clean(path),
        false => clean(&format!("/{dir}/{path}")),
    }
}

/// The last part of a path.
pub(crate) fn base(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_never_leave_the_root() {
        for (path, cleaned) in [
            ("", "."),
            ("./a//b/", "a/b"),
            ("/../a", "/a"),
            ("a/../..", ".."),
            ("/", "/"),
            ("/a/./..", "/"),
        ] {
            assert_eq!(clean(path), cleaned, "{path}");
        }
        assert_eq!(join("/w", "../../x"), "/x");
        assert_eq!(join("/w", ""), "/w");
        assert_eq!(base("/a/b/"), "b");
    }
}
