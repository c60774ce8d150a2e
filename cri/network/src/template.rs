//! A network configuration made from a template, once the kubelet has told which addresses the node's pods may have. The
//! language is the part of Go's text/template that such templates use, so that one written for containerd works here:
//!
//! ```text
//! {{.PodCIDR}}                               the first range
//! {{range .PodCIDRRanges}}…{{.}}…{{end}}     every range; also {{range $x := …}}, {{range $i, $x := …}}
//! {{range .Routes}}…{{end}}                  a default route for each family of the ranges
//! {{if $i}}, {{else}}…{{end}}                zero, empty and unset are false
//! {{- … -}}                                  white space on that side is dropped
//! ```
//! Anything else is refused with its line, never passed over.

use std::net::IpAddr;

/// Most bytes a template may come to.
const MAX_OUTPUT: usize = 1 << 20;
/// Most blocks in blocks.
const MAX_DEPTH: usize = 16;

/// Address ranges for pods, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCidrs(Vec<(IpAddr, u8)>);

impl PodCidrs {
    /// Reads "10.1.0.0/24" or, for two families, "10.1.0.0/24,fd00::/64".
    ///
    /// # Errors
    /// The part that is no range.
    pub fn parse(text: &str) -> Result<PodCidrs, String> {
        let one = |part: &str| {
            let (address, length) = part.trim().split_once('/')?;
            let (address, length) = (address.parse::<IpAddr>().ok()?, length.parse::<u8>().ok()?);
            let most = if address.is_ipv4() { 32 } else { 128 };
            (length <= most).then_some((address, length))
        };
        let ranges: Result<Vec<_>, String> = text
            .split(',')
            .map(|part| one(part).ok_or_else(|| format!("{part:?} is not an address with prefix length")))
            .collect();
        Ok(PodCidrs(ranges?))
    }

    fn ranges(&self) -> Vec<String> {
        self.0
            .iter()
            .map(|(address, length)| format!("{address}/{length}"))
            .collect()
    }

    /// "0.0.0.0/0" and "::/0", as the ranges have the family.
    fn routes(&self) -> Vec<String> {
        let mut routes = Vec::new();
        for (address, _) in &self.0 {
            let route = if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            if !routes.iter().any(|known| known == route) {
                routes.push(route.to_owned());
            }
        }
        routes
    }
}

/// A template that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct TemplateError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub reason: String,
}

/// Fills a template in.
///
/// # Errors
/// What this language does not have, or an end that is missing.
pub fn render(template: &str, cidrs: &PodCidrs) -> Result<String, TemplateError> {
    let tokens = lex(template)?;
    let mut rest = tokens.as_slice();
    let nodes = parse(&mut rest, MAX_DEPTH)?;
    if let [token, ..] = rest {
        return Err(token.wrong("there is nothing to end here"));
    }
    let mut scope = Scope {
        top: [
            (
                "PodCIDR",
                Value::Text(cidrs.ranges().into_iter().next().unwrap_or_default()),
            ),
            ("PodCIDRRanges", Value::List(cidrs.ranges())),
            ("Routes", Value::List(cidrs.routes())),
        ],
        dot: None,
        variables: Vec::new(),
    };
    let mut out = String::new();
    write(&nodes, &mut scope, &mut out)?;
    Ok(out)
}

#[derive(Debug, Clone)]
enum Value {
    Text(String),
    Number(usize),
    List(Vec<String>),
}

impl Value {
    fn is_true(&self) -> bool {
        match self {
            Value::Text(text) => !text.is_empty(),
            Value::Number(number) => *number != 0,
            Value::List(list) => !list.is_empty(),
        }
    }
}

struct Token<'a> {
    line: usize,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Text(&'a str),
    Action(Vec<&'a str>),
}

impl Token<'_> {
    fn wrong(&self, reason: impl Into<String>) -> TemplateError {
        TemplateError {
            line: self.line,
            reason: reason.into(),
        }
    }
}

fn lex(template: &str) -> Result<Vec<Token<'_>>, TemplateError> {
    let line = |at: usize| template[..at].matches('\n').count() + 1;
    let (mut tokens, mut at, mut trim) = (Vec::new(), 0, false);
    while at < template.len() {
        let open = template[at..]
            .find("{{")
            .map_or(template.len(), |found| at + found);
        let mut text = &template[at..open];
        if trim {
            text = text.trim_start();
        }
        let inner = open + 2;
        let left = template.get(inner..).is_some_and(|rest| rest.starts_with("- "));
        if left {
            text = text.trim_end();
        }
        if !text.is_empty() {
            tokens.push(Token {
                line: line(at),
                kind: Kind::Text(text),
            });
        }
        if open == template.len() {
            break;
        }
        let close = template[inner..].find("}}").ok_or_else(|| TemplateError {
            line: line(open),
            reason: "{{ without }}".to_owned(),
        })? + inner;
        let mut action = &template[inner..close];
        trim = action.ends_with(" -");
        if left {
            action = &action[1..];
        }
        if trim {
            action = &action[..action.len() - 1];
        }
        tokens.push(Token {
            line: line(open),
            kind: Kind::Action(words(action)),
        });
        at = close + 2;
    }
    Ok(tokens)
}

/// The words of an action; commas and := stand alone.
fn words(action: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for part in action.split_whitespace() {
        let mut rest = part;
        while !rest.is_empty() {
            let end = rest.find([',', ':']).unwrap_or(rest.len());
            if end > 0 {
                words.push(&rest[..end]);
            }
            rest = &rest[end..];
            let sign = if rest.starts_with(":=") {
                2
            } else {
                usize::from(!rest.is_empty())
            };
            if sign > 0 {
                words.push(&rest[..sign]);
            }
            rest = &rest[sign..];
        }
    }
    words
}

enum Node<'a> {
    Text(&'a str),
    Show {
        line: usize,
        what: &'a str,
    },
    Range {
        line: usize,
        index: Option<&'a str>,
        item: Option<&'a str>,
        over: &'a str,
        body: Vec<Node<'a>>,
    },
    If {
        line: usize,
        what: &'a str,
        yes: Vec<Node<'a>>,
        no: Vec<Node<'a>>,
    },
}

/// Up to the end, an else, or the last token.
fn parse<'a>(rest: &mut &[Token<'a>], depth: usize) -> Result<Vec<Node<'a>>, TemplateError> {
    let mut nodes = Vec::new();
    while let [token, more @ ..] = *rest {
        let line = token.line;
        let deeper = || {
            depth
                .checked_sub(1)
                .ok_or_else(|| token.wrong("blocks nested too deep"))
        };
        match &token.kind {
            Kind::Text(text) => nodes.push(Node::Text(text)),
            Kind::Action(words) => match words.as_slice() {
                ["end"] | ["else"] => return Ok(nodes),
                ["range", head @ .., over] => {
                    let (index, item) = match head {
                        [] => (None, None),
                        [item, ":="] => (None, Some(*item)),
                        [index, ",", item, ":="] => (Some(*index), Some(*item)),
                        _ => {
                            return Err(
                                token.wrong("a range is {{range .List}} or {{range $i, $x := .List}}")
                            );
                        }
                    };
                    if index.into_iter().chain(item).any(|name| !name.starts_with('$')) {
                        return Err(token.wrong("a variable begins with $"));
                    }
                    *rest = more;
                    let body = parse(rest, deeper()?)?;
                    end(rest, token)?;
                    nodes.push(Node::Range {
                        line,
                        index,
                        item,
                        over,
                        body,
                    });
                    continue;
                }
                ["if", what] => {
                    *rest = more;
                    let yes = parse(rest, deeper()?)?;
                    let mut no = Vec::new();
                    if let [
                        Token {
                            kind: Kind::Action(words),
                            ..
                        },
                        more @ ..,
                    ] = *rest
                        && words.as_slice() == ["else"]
                    {
                        *rest = more;
                        no = parse(rest, deeper()?)?;
                    }
                    end(rest, token)?;
                    nodes.push(Node::If { line, what, yes, no });
                    continue;
                }
                [what] if what.starts_with(['.', '$']) => nodes.push(Node::Show { line, what }),
                other => return Err(token.wrong(format!("{{{{{}}}}} is not known here", other.join(" ")))),
            },
        }
        *rest = more;
    }
    Ok(nodes)
}

fn end(rest: &mut &[Token<'_>], opened: &Token<'_>) -> Result<(), TemplateError> {
    match *rest {
        [
            Token {
                kind: Kind::Action(words),
                ..
            },
            more @ ..,
        ] if words.as_slice() == ["end"] => {
            *rest = more;
            Ok(())
        }
        _ => Err(opened.wrong("the block that begins here has no {{end}}")),
    }
}

struct Scope<'a> {
    top: [(&'static str, Value); 3],
    dot: Option<String>,
    variables: Vec<(&'a str, Value)>,
}

impl Scope<'_> {
    fn get(&self, line: usize, what: &str) -> Result<Value, TemplateError> {
        let found = match what.strip_prefix('.') {
            Some("") => self.dot.clone().map(Value::Text),
            // Within a range the dot is its item, which has no fields.
            Some(field) if self.dot.is_none() => self
                .top
                .iter()
                .find(|(name, _)| *name == field)
                .map(|(_, value)| value.clone()),
            Some(_) => None,
            None => match what.strip_prefix("$.") {
                Some(field) => self
                    .top
                    .iter()
                    .find(|(name, _)| *name == field)
                    .map(|(_, value)| value.clone()),
                None => self
                    .variables
                    .iter()
                    .rev()
                    .find(|(name, _)| *name == what)
                    .map(|(_, value)| value.clone()),
            },
        };
        found.ok_or_else(|| TemplateError {
            line,
            reason: format!("{what} is not known here; .PodCIDR, .PodCIDRRanges and .Routes are"),
        })
    }
}

fn write<'a>(nodes: &[Node<'a>], scope: &mut Scope<'a>, out: &mut String) -> Result<(), TemplateError> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Show { line, what } => match scope.get(*line, what)? {
                Value::Text(text) => out.push_str(&text),
                Value::Number(number) => out.push_str(&number.to_string()),
                Value::List(list) => out.push_str(&format!("[{}]", list.join(" "))),
            },
            Node::If { line, what, yes, no } => {
                let branch = if scope.get(*line, what)?.is_true() {
                    yes
                } else {
                    no
                };
                write(branch, scope, out)?;
            }
            Node::Range {
                line,
                index,
                item,
                over,
                body,
            } => {
                let Value::List(list) = scope.get(*line, over)? else {
                    return Err(TemplateError {
                        line: *line,
                        reason: format!("{over} is no list"),
                    });
                };
                let (dot, depth) = (scope.dot.take(), scope.variables.len());
                for (number, text) in list.into_iter().enumerate() {
                    scope.dot = Some(text.clone());
                    scope
                        .variables
                        .extend(index.map(|name| (name, Value::Number(number))));
                    scope.variables.extend(item.map(|name| (name, Value::Text(text))));
                    write(body, scope, out)?;
                    scope.variables.truncate(depth);
                }
                scope.dot = dot;
            }
        }
        if out.len() > MAX_OUTPUT {
            return Err(TemplateError {
                line: 1,
                reason: format!("it comes to more than {MAX_OUTPUT} bytes"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(template: &str, cidrs: &str) -> Result<String, TemplateError> {
        render(template, &PodCidrs::parse(cidrs).unwrap())
    }

    #[test]
    fn a_template_of_containerds_is_filled_in() {
        let template = r#"{"name": "k8s", "cniVersion": "1.0.0", "plugins": [{"type": "ptp", "mtu": 1460,
            "ipam": {"type": "host-local", "subnet": "{{.PodCIDR}}",
              "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
              "routes": [{{- range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end -}}   ]}}]}"#;
        let text = filled(template, "10.1.0.0/24,fd00::/64").unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let ipam = &value["plugins"][0]["ipam"];
        assert_eq!(ipam["subnet"], "10.1.0.0/24");
        assert_eq!(
            ipam["ranges"],
            serde_json::json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]])
        );
        assert_eq!(
            ipam["routes"],
            serde_json::json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}])
        );
        assert!(text.contains("[{\"dst\""), "white space is dropped: {text}");
    }

    #[test]
    fn blocks_branch_and_nest() {
        let template =
            "{{range .Routes}}<{{.}}{{if $.PodCIDR}}+{{else}}-{{end}}>{{end}}{{if .Routes}}r{{end}}";
        assert_eq!(filled(template, "10.0.0.0/8").unwrap(), "<0.0.0.0/0+>r");
    }

    #[test]
    fn what_is_not_known_is_refused_with_its_line() {
        for (template, line, reason) in [
            ("a\n{{.Hostname}}", 2, "not known"),
            ("{{template \"x\"}}", 1, "not known"),
            ("\n\n{{range .Routes}}", 3, "no {{end}}"),
            ("{{end}}", 1, "nothing to end"),
            ("x {{", 1, "without }}"),
            ("{{range .PodCIDR}}{{end}}", 1, "no list"),
            ("{{$x}}", 1, "not known"),
        ] {
            let error = filled(template, "10.0.0.0/8").unwrap_err();
            assert_eq!(error.line, line, "{template}: {error}");
            assert!(error.reason.contains(reason), "{template}: {error}");
        }
        let deep = "{{if .PodCIDR}}".repeat(40) + &"{{end}}".repeat(40);
        assert!(filled(&deep, "10.0.0.0/8").unwrap_err().reason.contains("deep"));
    }

    #[test]
    fn ranges_are_checked() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0/8",
            "a/8",
            "10.0.0.0/8,",
            "10.0.0.0/8\n",
        ] {
            let parsed = PodCidrs::parse(bad);
            assert!(bad.ends_with('\n') == parsed.is_ok(), "{bad:?}: {parsed:?}");
        }
    }
}
