//! BuildKit's parser and shell-word tables.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod corpus;

use serde_json::Value;
use slipway_dockerfile::instruction::decode;
use slipway_dockerfile::shell::{Lexer, process_word, process_words};
use std::collections::BTreeMap;

#[test]
fn every_parser_file_dumps_as_the_corpus_says() {
    let Some(folder) = corpus::folder() else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(folder.join("buildkit/parser/testfiles")).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read(path.join("Dockerfile")).unwrap();
        let expected = std::fs::read_to_string(path.join("result")).unwrap();
        let ast = slipway_dockerfile::parse(&source, "Dockerfile").unwrap();
        assert_eq!(ast.dump(), expected, "{}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 33);
}

#[test]
fn every_negative_parser_file_is_refused() {
    let Some(folder) = corpus::folder() else { return };
    for entry in std::fs::read_dir(folder.join("buildkit/parser/testfiles-negative")).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read(path.join("Dockerfile")).unwrap();
        assert!(
            slipway_dockerfile::parse(&source, "Dockerfile").is_err(),
            "{}",
            path.display()
        );
    }
}

#[test]
fn line_numbers_are_those_of_the_corpus() {
    let Some(source) = corpus::read("buildkit/parser/testfile-line/Dockerfile") else {
        return;
    };
    let ast = slipway_dockerfile::parse(source.as_bytes(), "Dockerfile").unwrap();
    let lines: Vec<_> = ast.nodes.iter().map(|n| (n.span.start, n.span.end)).collect();
    assert_eq!(lines, [(5, 5), (11, 12), (17, 31)]);
}

#[test]
fn heredocs_are_those_of_the_corpus() {
    let Some(text) = corpus::read("buildkit/parser/heredoc.json") else {
        return;
    };
    let table: Value = serde_json::from_str(&text).unwrap();
    let source = table["dockerfile"].as_str().unwrap();
    let ast = slipway_dockerfile::parse(source.as_bytes(), "Dockerfile").unwrap();
    let expected = table["expected_per_child"].as_array().unwrap();
    assert_eq!(ast.nodes.len(), expected.len() + 1);
    for (node, expected) in ast.nodes[1..].iter().zip(expected) {
        let none = Vec::new();
        let expected = expected.as_array().unwrap_or(&none);
        assert_eq!(node.heredocs.len(), expected.len(), "{}", node.original);
        for (found, expected) in node.heredocs.iter().zip(expected) {
            let flag = |name: &str| expected[name].as_bool().unwrap_or_default();
            assert_eq!(found.name, expected["Name"].as_str().unwrap());
            assert_eq!(
                found.content,
                expected["Content"].as_str().unwrap(),
                "{}",
                node.original
            );
            assert_eq!(found.expand, flag("Expand"), "{}", node.original);
            assert_eq!(found.chomp, flag("Chomp"), "{}", node.original);
            assert_eq!(
                u64::from(found.fd),
                expected["FileDescriptor"].as_u64().unwrap_or(0)
            );
        }
    }
}

#[test]
fn words_expand_as_the_env_table_says() {
    let Some(table) = corpus::read("buildkit/shell/envVarTest") else {
        return;
    };
    let env: BTreeMap<String, String> = [
        ("PWD", "/home"),
        ("SHELL", "bash"),
        ("KOREAN", "한국어"),
        ("NULL", ""),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    let mut seen = 0;
    for (number, line) in table.lines().enumerate() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let parts: Vec<&str> = line.split('|').map(str::trim).collect();
        let [platform, input, expected] = parts[..] else {
            panic!("line {}: {line}", number + 1)
        };
        if platform == "W" {
            continue;
        }
        let found = process_word(input, '\\', &env);
        let found = found.as_deref().unwrap_or("error");
        assert_eq!(found, expected, "line {}: {input}", number + 1);
        seen += 1;
    }
    assert!(seen > 100, "{seen}");
}

#[test]
fn words_split_as_the_words_table_says() {
    let Some(table) = corpus::read("buildkit/shell/wordsTest") else {
        return;
    };
    let mut env = BTreeMap::new();
    for line in table.lines().filter(|l| !l.starts_with('#')) {
        if let Some(definition) = line.strip_prefix("ENV ") {
            let (name, value) = definition.split_once('=').unwrap();
            env.insert(name.trim_start().to_owned(), value.to_owned());
            continue;
        }
        let Some((input, expected)) = line.split_once('|') else {
            continue;
        };
        let found = process_words(input.trim(), '\\', &env);
        let found = found.unwrap_or_else(|_| vec!["error".to_owned()]);
        let expected: Vec<&str> = expected.trim_start().split(',').collect();
        assert_eq!(found, expected, "{line}");
    }
}

#[test]
fn substitutions_match_and_miss_as_the_table_says() {
    let Some(text) = corpus::read("buildkit/shell/process_with_matches.json") else {
        return;
    };
    let table: Vec<Value> = serde_json::from_str(&text).unwrap();
    for case in &table {
        let input = case["input"].as_str().unwrap();
        let env: BTreeMap<String, String> = case["envs"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned()))
            .collect();
        let fails = case["expectedErr"].as_bool().unwrap_or_default();
        match Lexer::new('\\').process(input, &env) {
            Err(error) => assert!(fails, "{input}: {error}"),
            Ok(found) => {
                assert!(!fails, "{input} gives {found:?}");
                assert_eq!(found.text, case["expected"].as_str().unwrap(), "{input}");
                let names = |key: &str| -> Vec<&str> {
                    case[key]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .map(|v| v.as_str().unwrap())
                        .collect()
                };
                let mut matches = names("matches");
                matches.sort_unstable();
                assert_eq!(found.matched.iter().collect::<Vec<_>>(), matches, "{input}");
                assert_eq!(
                    found.unmatched.iter().collect::<Vec<_>>(),
                    names("unmatched"),
                    "{input}"
                );
            }
        }
    }
    assert_eq!(table.len(), 47);
}

#[test]
fn every_parser_file_decodes_or_says_why_not() {
    let Some(folder) = corpus::folder() else { return };
    for entry in std::fs::read_dir(folder.join("buildkit/parser/testfiles")).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read(path.join("Dockerfile")).unwrap();
        let ast = slipway_dockerfile::parse(&source, "Dockerfile").unwrap();
        for node in &ast.nodes {
            if let Err(error) = decode(node) {
                println!("{}: {error}", path.file_name().unwrap().display());
            }
        }
    }
}
