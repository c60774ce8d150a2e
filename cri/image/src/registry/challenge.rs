//! `WWW-Authenticate`: what a registry wants before it answers (RFC 9110, section 11; distribution token spec).
//! Pure.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token of a token service.
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// The challenge to answer: a bearer token where one is wanted, else a password. Others are not known.
pub(crate) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let texts = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let all: Vec<Challenge> = texts.flat_map(parse).collect();
    let bearer = all.iter().find(|c| matches!(c, Challenge::Bearer { .. }));
    bearer.or_else(|| all.first()).cloned()
}

/// All known challenges of one header value. A scheme is a word that is not followed by `=`.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut scheme: Option<String> = None;
    let mut parameters: Vec<(String, String)> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let word = &rest[..end];
        if word.is_empty() {
            break;
        }
        rest = rest[end..].trim_start_matches([' ', '\t']);
        match rest.strip_prefix('=') {
            Some(value) => {
                let (value, after) = parameter(value.trim_start());
                parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            None => {
                found.extend(finish(scheme.replace(word.to_ascii_lowercase()), &mut parameters));
            }
        }
    }
    found.extend(finish(scheme, &mut parameters));
    found
}

/// One parameter's value, quoted or not, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match (escaped, c) {
            (false, '\\') => escaped = true,
            (false, '"') => return (value, &quoted[at + 1..]),
            _ => {
                value.push(c);
                escaped = false;
            }
        }
    }
    (value, "")
}

fn finish(scheme: Option<String>, parameters: &mut Vec<(String, String)>) -> Option<Challenge> {
    let parameters = std::mem::take(parameters);
    let get = |name: &str| {
        let found = parameters.iter().find(|(key, _)| key == name);
        found
            .map(|(_, value)| value.clone())
            .filter(|value| !value.is_empty())
    };
    match scheme?.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: get("realm")?,
            service: get("service"),
            scope: get("scope"),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        challenge(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: own(service),
            scope: own(scope),
        })
    }

    #[test]
    fn a_bearer_challenge_has_realm_service_and_scope() {
        let text = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull,push""#;
        let scope = Some("repository:library/x:pull,push");
        assert_eq!(
            of(&[text]),
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), scope)
        );
    }

    #[test]
    fn spaces_quotes_and_case_do_not_matter() {
        assert_eq!(
            of(&[r#"bearer  realm = "a\"b" , service=s"#]),
            bearer("a\"b", Some("s"), None)
        );
        assert_eq!(of(&["BASIC realm=x"]), Some(Challenge::Basic));
        assert_eq!(of(&[r#"Basic realm="unended"#]), Some(Challenge::Basic));
    }

    #[test]
    fn of_several_challenges_the_bearer_one_is_taken() {
        assert_eq!(
            of(&["Basic realm=\"x\"", "Bearer realm=\"r\""]),
            bearer("r", None, None)
        );
        assert_eq!(
            of(&["Basic realm=\"x\", Bearer realm=\"r\",scope=\"s\""]),
            bearer("r", None, Some("s"))
        );
    }

    #[test]
    fn what_is_not_known_is_no_challenge() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["Negotiate abc=="]), None);
        assert_eq!(of(&["Bearer service=x"]), None);
    }
}
