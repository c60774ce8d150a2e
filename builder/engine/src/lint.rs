//! The Dockerfile's checks as lines for the display.

use slipway_dockerfile::Ast;

/// What the checks of the language say about a file.
pub(crate) fn warnings(_ast: &Ast) -> Vec<String> {
    Vec::new()
}
