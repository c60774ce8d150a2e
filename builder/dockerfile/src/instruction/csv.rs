//! Comma-separated fields, as the values of `--mount` and `--device` hold them.

/// The fields of a line; one that holds commas stands in double quotes, a quote in it doubled.
pub(super) fn fields(line: &str) -> Result<Vec<String>, &'static str> {
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted_field(quoted)?,
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                if rest[..end].contains('"') {
                    return Err("a quote stands inside a field that does not begin with one");
                }
                (rest[..end].to_owned(), &rest[end..])
            }
        };
        fields.push(field);
        match after.strip_prefix(',') {
            Some(after) => rest = after,
            None if after.is_empty() => return Ok(fields),
            None => return Err("something follows a closing quote"),
        }
    }
}

fn quoted_field(text: &str) -> Result<(String, &str), &'static str> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let Some((before, after)) = rest.split_once('"') else {
            return Err("a quote is not closed");
        };
        field.push_str(before);
        match after.strip_prefix('"') {
            Some(after) => {
                field.push('"');
                rest = after;
            }
            None => return Ok((field, after)),
        }
    }
}

/// The spellings of a truth value in Go's flag and strconv packages.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_protect_commas_and_themselves() {
        assert_eq!(fields(r#"a=1,"b=2,3",c="#).unwrap(), ["a=1", "b=2,3", "c="]);
        assert_eq!(fields(r#""say ""hi""""#).unwrap(), [r#"say "hi""#]);
        assert!(fields(r#"a="b""#).is_err() && fields(r#""a"#).is_err() && fields(r#""a"b"#).is_err());
    }
}
