//! What the demo prints, and with which colours: none where nobody would see them.
//!
//! A terminal that has hung up, or a reader that has gone, ends nothing: what the demo made is still to be removed.

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::time::Duration;

/// A line on standard output.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// A line on standard error.
pub fn error(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The headline of a part.
pub fn title(text: &str) {
    line(&format!("\n{}", painted("1", &format!("── {text}"))));
}

/// Something done, and how long it took.
pub fn done(what: &str, took: Duration) {
    line(&format!("   {what} {}", time(took)));
}

/// How long something took, in brackets and quietly.
pub fn time(d: Duration) -> String {
    let text = if d < Duration::from_secs(1) {
        format!("({:.1} ms)", d.as_secs_f64() * 1e3)
    } else {
        format!("({:.1} s)", d.as_secs_f64())
    };
    painted("2", &text)
}

/// `text` in the style that the parameter of ECMA-48's SGR names, on a terminal that has styles.
pub fn painted(style: &str, text: &str) -> String {
    static COLOURS: OnceLock<bool> = OnceLock::new();
    let on = *COLOURS.get_or_init(|| {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        std::io::stdout().is_terminal()
            && set("NO_COLOR").is_none()
            && set("TERM").is_none_or(|t| t != "dumb")
    });
    if on {
        format!("\x1b[{style}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}
