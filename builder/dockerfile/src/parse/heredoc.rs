//! Heredoc markers: `<<EOF`, `<<-'EOF'`, `3<<EOF`.

use crate::ast::Heredoc;
use crate::error::Problem;
use crate::shell::{Lexer, NoVariables};

/// The markers in an instruction's line, their contents still empty.
pub(super) fn markers(line: &str) -> Result<Vec<Heredoc>, Problem> {
    let lexer = Lexer {
        keep_quotes: true,
        keep_escapes: true,
        keep_unset: true,
        ..Lexer::new('\\')
    };
    // A line that is no sequence of words (`echo "`) has no heredocs; its shell will say what it thinks of it.
    let words = lexer
        .process(line, &NoVariables)
        .map(|l| l.words)
        .unwrap_or_default();
    Ok(words.iter().filter_map(|word| marker(word)).collect())
}

/// Reads a word that is a marker.
pub(crate) fn marker(word: &str) -> Option<Heredoc> {
    let digits = word.len() - word.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (fd, rest) = word.split_at(digits);
    let rest = rest.strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    // Quoted in any part, the marker asks for its content as it is; the quotes are not part of the name.
    let plain = Lexer {
        keep_unset: true,
        ..Lexer::new('\\')
    };
    let quoted = Lexer {
        keep_quotes: true,
        ..plain
    };
    let [name] = &plain.process(rest, &NoVariables).ok()?.words[..] else {
        return None;
    };
    let [raw] = &quoted.process(rest, &NoVariables).ok()?.words[..] else {
        return None;
    };
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    Some(Heredoc {
        name: name.clone(),
        content: String::new(),
        expand: quotes(name) == quotes(raw),
        chomp,
        fd: fd.parse().unwrap_or(0),
    })
}
