//! What a test that is skipped says: to standard error itself. libtest keeps what `eprintln!` prints of a test that passes, and
//! one that is skipped does.

use std::path::Path;

/// The lines of a source at which a skip is told so that nobody reads it.
fn silent(source: &str) -> Vec<usize> {
    let call = concat!("eprint", "ln!(");
    let all = source.match_indices(call).filter(|(at, _)| {
        let rest = &source[*at..];
        rest.split(");")
            .next()
            .is_some_and(|said| said.contains("SKIPPED"))
    });
    all.map(|(at, _)| 1 + source[..at].matches('\n').count())
        .collect()
}

fn sources(folder: &Path, see: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, see);
        } else if path.extension().is_some_and(|e| e == "rs") {
            see(&path);
        }
    }
}

#[test]
fn who_is_skipped_says_it_past_libtest() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent");
    let mut wrong = Vec::new();
    for part in ["agent", "builder", "cri", "shim", "tests"] {
        sources(&root.join(part), &mut |file| {
            let source = std::fs::read_to_string(file).expect("a source");
            let lines = silent(&source);
            wrong.extend(lines.iter().map(|line| format!("{}:{line}", file.display())));
        });
    }
    let advice = "use writeln!(std::io::stderr(), …): libtest keeps what passing tests print";
    assert!(wrong.is_empty(), "{advice}\n{}\n", wrong.join("\n"));
}

#[test]
fn a_skip_that_nobody_reads_is_found() {
    let call = concat!("eprint", "ln!(");
    let source = format!("a\n{call}\"x\");\n{call}\n    \"\\n*** SKIPPED: {{}}\",\n    y(),\n);\n");
    assert_eq!(silent(&source), [3]);
}
