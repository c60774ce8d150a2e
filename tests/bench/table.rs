//! Rows of two medians and their ratio.

use std::time::Duration;

/// A table that fills up as things are measured.
pub struct Table {
    ours: &'static str,
    theirs: &'static str,
    rows: Vec<(String, f64, f64, &'static str)>,
}

impl Table {
    /// An empty one with the names of both sides.
    pub fn new(ours: &'static str, theirs: &'static str) -> Table {
        Table {
            ours,
            theirs,
            rows: Vec::new(),
        }
    }

    /// A row of two lists of durations: their medians in milliseconds.
    pub fn times(&mut self, what: &str, ours: &[Duration], theirs: &[Duration]) {
        let ms = |d: &[Duration]| median(&d.iter().map(|d| d.as_secs_f64() * 1e3).collect::<Vec<_>>());
        self.row(what, ms(ours), ms(theirs), "ms");
    }

    /// A row of two figures.
    pub fn row(&mut self, what: &str, ours: f64, theirs: f64, unit: &'static str) {
        eprintln!("   {what}: {ours:.2} {unit} / {theirs:.2} {unit}");
        self.rows.push((what.to_owned(), ours, theirs, unit));
    }

    /// Prints it as Markdown.
    pub fn print(&self) {
        println!(
            "\n| what | {} | {} | ratio |\n|---|---|---|---|",
            self.ours, self.theirs
        );
        for (what, a, b, unit) in &self.rows {
            let ratio = if *b > 0.0 {
                format!("{:.2}", a / b)
            } else {
                "–".into()
            };
            println!("| {what} | {a:.2} {unit} | {b:.2} {unit} | {ratio} |");
        }
    }
}

/// The middle of a list; 0 of an empty one.
pub fn median(v: &[f64]) -> f64 {
    let mut v = v.to_vec();
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(0.0)
}
