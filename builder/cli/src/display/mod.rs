//! How a build looks: which of the displays, and what they share. Knows nothing of how images are built.

mod plain;
mod tty;

use std::io::IsTerminal;
use std::sync::Arc;

use slipway_engine::{Built, Progress, Silent};

use crate::args::ProgressMode;
use crate::text;

/// A display that can be told that the build is over.
pub trait Display: Progress {
    /// Draws what is to stay, and nothing after it.
    fn finish(&self);
}

impl Display for Silent {
    fn finish(&self) {}
}

/// The display for a mode.
pub fn choose(mode: ProgressMode, quiet: bool) -> Arc<dyn Display> {
    if quiet {
        return Arc::new(Silent);
    }
    let terminal = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
    match mode {
        ProgressMode::Tty => tty::Tty::start(),
        ProgressMode::Auto if terminal => tty::Tty::start(),
        ProgressMode::Auto | ProgressMode::Plain => Arc::new(plain::Plain::new()),
    }
}

/// The last words of a build that went well.
pub fn summary(built: &Built) -> String {
    let image = &built.image;
    let names: Vec<String> = image.names.iter().map(|n| n.familiar()).collect();
    let layers = image.layers.len();
    let mut out = format!(
        "\nBuilt in {} (runnable {} after its last step)",
        text::time(built.elapsed),
        text::time(built.committing)
    );
    out.push_str(&format!("\n  image  {}", image.id));
    out.push_str(&format!(
        "\n  size   {} in {layers} layer{}",
        text::size(image.size),
        if layers == 1 { "" } else { "s" }
    ));
    match names.as_slice() {
        [] => out.push_str("\n  name   none (-t gives it one)"),
        names => out.push_str(&format!("\n  name   {}", names.join(", "))),
    }
    out.push('\n');
    out
}
