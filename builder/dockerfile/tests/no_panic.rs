//! Whatever the bytes, the answer is a program or an error. Files of the goldens and of the corpora, changed
//! at random by a generator that always makes the same sequence.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod corpus;

use slipway_dockerfile::ignore::{Matcher, parse as parse_ignore};
use slipway_dockerfile::shell::process_words;
use slipway_dockerfile::{BaseImage, Plan, PlanInput, Platform, parse};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        const PIECES: [&str; 40] = [
            "$", "${", "}", "\"", "'", "\\", "\n", "\r\n", "\t", " ", "#", "<<", "<<-EOF", "EOF\n", "[\"",
            "\"]", "=", "--", "--from=", "$A", "${A:-", "${A##*", "${A//", "`", "é", "\u{a0}", "FROM a\n",
            "RUN ", "ENV ", "ONBUILD ", "\\\n", "%", "@", ":", " AS ", "/./", "*", "**", "!", "\u{feff}",
        ];
        let at = self.below(bytes.len() + 1);
        match self.below(6) {
            0 => drop(bytes.drain(at..(at + 1 + self.below(4)).min(bytes.len()).max(at))),
            1 => {
                let from = self.below(bytes.len() + 1);
                let piece = bytes[from..(from + self.below(40)).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            2 => bytes.insert(at, self.below(256) as u8),
            _ => {
                let piece = PIECES[self.below(PIECES.len())];
                drop(bytes.splice(at..at, piece.bytes()));
            }
        }
    }
}

fn files(folder: &Path, found: &mut Vec<Vec<u8>>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files(&path, found);
        } else if path.file_name().is_some_and(|name| name == "Dockerfile") {
            found.push(std::fs::read(path).unwrap());
        }
    }
}

fn all(source: &[u8]) {
    let Ok(ast) = parse(source, "Dockerfile") else {
        return;
    };
    drop(ast.dump());
    let mut input = PlanInput::new(Platform::new("linux", "amd64"));
    input.all_stages = true;
    let Ok(mut plan) = Plan::new(&ast, &input) else {
        return;
    };
    while let Some(stage) = plan.pending().first().map(|stage| stage.id) {
        let mut base = BaseImage::empty();
        base.config
            .on_build
            .push(String::from_utf8_lossy(source).into_owned());
        if plan.resolve(stage, base).is_err() {
            return;
        }
    }
    drop(plan.evaluate());
}

#[test]
fn no_bytes_make_it_panic() {
    let mut seeds = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), &mut seeds);
    if let Some(folder) = corpus::folder() {
        files(&folder, &mut seeds);
    }
    let mut random = Random(1);
    for round in 0..6000 {
        let mut source = seeds[round % seeds.len()].clone();
        for _ in 0..=random.below(6) {
            random.change(&mut source);
        }
        all(&source);
        let text = String::from_utf8_lossy(&source);
        let env = BTreeMap::from([("A".to_owned(), text.chars().take(200).collect())]);
        drop(process_words(&text, '\\', &env));
        if let Ok(matcher) = Matcher::new(&parse_ignore(&source)) {
            let path: String = text.chars().filter(|c| *c != '\n').take(40).collect();
            let _ = (matcher.matches_or_parent(&path), matcher.skips_directory(&path));
        }
    }
}

#[test]
fn hostile_files_end_soon() {
    let deep = "${A:-".repeat(10_000);
    let many = "FROM a\n".repeat(20_000);
    let chain: String = (0..20_000)
        .map(|n| format!("FROM s{} AS s{}\n", n - 1, n))
        .collect::<String>();
    let chain = chain.replacen("FROM s-1", "FROM scratch", 1);
    let grown = format!(
        "FROM scratch\nENV A={}\n{}",
        "x".repeat(60_000),
        "RUN x\n".repeat(20_000)
    );
    let doubled = format!("FROM scratch\nENV A=xx\n{}", "ENV A=$A$A\n".repeat(1000));
    let distinct: String = (0..60_000).map(|n| format!("ENV a{n}=x\n")).collect();
    let ports = format!("FROM scratch\n{}", "EXPOSE 0-65535\n".repeat(10_000));
    let stars = format!(
        "FROM scratch\nENV A={} B=${{A//{}/}}\n",
        "a".repeat(30_000),
        "*a".repeat(1000)
    );
    let inherited = format!(
        "FROM scratch AS b\nENV A={}\n{}",
        "x".repeat(60_000),
        "FROM b\n".repeat(20_000)
    );
    for source in [
        format!("FROM a\nENV X={deep}\n"),
        many,
        chain,
        grown,
        doubled,
        format!("FROM scratch\n{distinct}"),
        ports,
        stars,
        inherited,
        "ONBUILD ".repeat(100_000),
        "\\\n".repeat(400_000),
        "#\n".repeat(500_000),
        format!("FROM a\nRUN {}\n", "<<A ".repeat(10_000)),
        format!("FROM a\nCMD {}\n", "[".repeat(60_000)),
        format!("FROM a\nCOPY {} /\n", "a ".repeat(30_000)),
        "ARG a\n".repeat(50_000),
    ] {
        let started = std::time::Instant::now();
        all(source.as_bytes());
        let took = started.elapsed();
        println!(
            "{took:?}: {}…",
            source.chars().take(40).collect::<String>().escape_debug()
        );
        assert!(
            took.as_secs() < 10,
            "{took:?}: {}…",
            &source[..source.len().min(60)]
        );
    }
}
