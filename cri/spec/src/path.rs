//! Paths inside a container: absolute, without `..`, cleaned.

use crate::error::SpecError;

/// Cleans an absolute path: no empty and no `.` components, no trailing slash.
///
/// # Errors
/// A relative path, one with a `..` component or a NUL character: they are never meant, and what
/// they resolve to depends on who looks.
pub(crate) fn clean_absolute(field: &'static str, text: &str) -> Result<String, SpecError> {
    if !text.starts_with('/') {
        return Err(SpecError::invalid(field, text, "is not an absolute path"));
    }
    if text.contains('\0') {
        return Err(SpecError::invalid(field, text, "has a NUL character"));
    }
    let mut clean = String::with_capacity(text.len());
    for part in text.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return Err(SpecError::invalid(field, text, "has a .. component"));
        }
        clean.push('/');
        clean.push_str(part);
    }
    Ok(if clean.is_empty() { "/".to_owned() } else { clean })
}

/// Whether `path` is `above` or lies below it; both clean.
pub(crate) fn is_at_or_below(path: &str, above: &str) -> bool {
    above == "/"
        || path
            .strip_prefix(above)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
