//! moby/patternmatcher's tables.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod corpus;

use serde_json::Value;
use slipway_dockerfile::ignore::{Matcher, parse};

fn table(name: &str) -> Vec<Value> {
    let text = corpus::read(&format!("patternmatcher/{name}.json")).unwrap_or_else(|| "[]".to_owned());
    serde_json::from_str(&text).unwrap()
}

#[test]
fn paths_match_themselves_or_by_a_directory_above() {
    for case in table("matches_or_parent") {
        let patterns: Vec<&str> = case["patterns"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p.as_str().unwrap())
            .collect();
        let path = case["path"].as_str().unwrap();
        let found = Matcher::new(&patterns).map(|m| m.matches_or_parent(path)).ok();
        assert_eq!(found, case["match"].as_bool(), "{patterns:?} on {path}");
    }
}

#[test]
fn single_patterns_match_or_are_malformed() {
    for case in table("single_match") {
        let pattern = case["pattern"].as_str().unwrap();
        let path = case["path"].as_str().unwrap();
        match Matcher::new(&[pattern]) {
            Err(_) => assert!(case["error"].as_bool().unwrap(), "{pattern}"),
            Ok(matcher) => {
                assert!(!case["error"].as_bool().unwrap(), "{pattern} on {path}");
                let expected = case["match"].as_bool().unwrap();
                assert_eq!(matcher.matches_or_parent(path), expected, "{pattern} on {path}");
            }
        }
    }
}

#[test]
fn files_give_the_patterns_of_the_table() {
    for case in table("ignorefile") {
        let expected: Vec<&str> = case["expected"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p.as_str().unwrap())
            .collect();
        assert_eq!(parse(case["content"].as_str().unwrap().as_bytes()), expected);
    }
}
