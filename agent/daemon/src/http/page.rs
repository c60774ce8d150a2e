//! Prometheus' text format: families of series, and values that cannot break out of their quotes. Pure.

use std::fmt::Write;

/// A page being written.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

/// Names and values.
pub type Labels<'a> = [(&'a str, &'a str)];

impl Page {
    /// Begins a family: its series follow.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One series. An empty value leaves its label out: to Prometheus that is the same.
    pub fn series(&mut self, name: &str, labels: &Labels<'_>, more: &Labels<'_>, value: f64) {
        self.text.push_str(name);
        let all = labels.iter().chain(more).filter(|(_, value)| !value.is_empty());
        let mut mark = '{';
        for (label, value) in all {
            let _ = write!(self.text, "{mark}{label}=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
            mark = ',';
        }
        if mark == ',' {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_in_their_quotes_and_empty_ones_away() {
        let mut page = Page::default();
        page.family("a_total", "counter", "What it counts.");
        page.series(
            "a_total",
            &[("x", "1\"} 7\n\\"), ("none", "")],
            &[("y", "ü")],
            0.25,
        );
        page.series("a_total", &[], &[], 8e9);
        assert_eq!(
            page.finish(),
            "# HELP a_total What it counts.\n# TYPE a_total counter\na_total{x=\"1\\\"} 7\\n\\\\\",y=\"ü\"} 0.25\na_total 8000000000\n"
        );
    }
}
