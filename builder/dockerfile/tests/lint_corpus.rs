//! BuildKit's table of checks. What a check says is said in our own words: compared are its name, its line and
//! the things it names.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod corpus;

use serde_json::Value;
use slipway_dockerfile::ignore::{Matcher, parse as parse_ignore};
use slipway_dockerfile::lint::Warning;
use slipway_dockerfile::{BaseImage, Error, Plan, PlanInput, Platform, parse};

fn check(case: &Value, source: &str) -> Result<Vec<Warning>, Error> {
    let mut input = PlanInput::new(Platform::new("linux", "amd64"));
    for (name, value) in case["FrontendAttrs"].as_object().into_iter().flatten() {
        if let (Some(name), Some(value)) = (name.strip_prefix("build-arg:"), value.as_str()) {
            input.build_args.insert(name.to_owned(), value.to_owned());
        }
    }
    if let Some(file) = case["DockerIgnore"].as_str() {
        input.ignore = Some(Matcher::new(&parse_ignore(file.as_bytes())).unwrap());
    }
    let mut plan = Plan::new(&parse(source.as_bytes(), "Dockerfile")?, &input)?;
    while let Some(stage) = plan.pending().first().map(|stage| stage.id) {
        plan.resolve(stage, BaseImage::empty())?;
    }
    Ok(plan.evaluate()?.warnings)
}

/// The things between quotes, and what is suggested.
fn named(detail: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for quote in ['\'', '"'] {
        let parts: Vec<&str> = detail.split(quote).collect();
        names.extend(parts.chunks(2).filter(|c| c.len() == 2).map(|c| c[1].to_owned()));
    }
    names.extend(
        detail
            .split_once("(did you mean ")
            .map(|(_, rest)| rest.trim_end_matches("?)").to_owned()),
    );
    // `"ENV key=value" should be used`: two forms, not things of the file; `keywords' casing`: an apostrophe.
    names.retain(|name| !name.contains("key") && !name.starts_with(' ') && !name.is_empty());
    names
}

#[test]
fn the_checks_find_what_the_table_says() {
    let Some(text) = corpus::read("buildkit/lint/lint_cases.json") else {
        return;
    };
    let table: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut judged = 0;
    for case in &table {
        // Some rows are references into the program they come from, and some carry the file of another row.
        let Some(source) = case["Dockerfile"]
            .as_str()
            .filter(|s| !s.contains("integration."))
        else {
            continue;
        };
        let none = Vec::new();
        let expected = case["Warnings"].as_array().unwrap_or(&none);
        let unreadable = |w: &Value| w["Line"].is_null() || !w["Detail"].is_string();
        let ambiguous = |other: &Value| {
            ["Dockerfile", "DockerIgnore", "FrontendAttrs"]
                .iter()
                .all(|key| other[*key] == case[*key])
                && other["Warnings"] != case["Warnings"]
        };
        let computed = |(_, value): (&String, &Value)| !value.is_string();
        if case["FrontendAttrs"]
            .as_object()
            .into_iter()
            .flatten()
            .any(computed)
            || expected.iter().any(unreadable)
            || table.iter().any(ambiguous)
        {
            continue;
        }
        judged += 1;
        let found = check(case, source);
        match (&found, case["BuildErr"].as_str()) {
            (Err(_), Some(_)) => continue,
            (Ok(_), None) | (Err(_), None) | (Ok(_), Some(_)) => {}
        }
        let found = found.unwrap_or_else(|error| panic!("{source}\n{error}"));
        let mut wanted: Vec<(String, u64)> = expected
            .iter()
            .map(|w| {
                (
                    w["RuleName"].as_str().unwrap().to_owned(),
                    w["Line"].as_u64().unwrap(),
                )
            })
            .collect();
        let mut rules: Vec<(String, u64)> = found
            .iter()
            .map(|w| (w.rule.to_string(), u64::from(w.span.start)))
            .collect();
        wanted.sort();
        rules.sort();
        assert_eq!(rules, wanted, "{source}");
        for warning in expected {
            let detail = warning["Detail"].as_str().unwrap();
            let same =
                |w: &&Warning| warning["RuleName"] == *w.rule.to_string() && warning["Line"] == w.span.start;
            for name in named(detail) {
                let said = found.iter().filter(same).any(|w| w.message.contains(&name));
                assert!(said, "{name:?} of {detail:?} is not in {found:?}");
            }
        }
    }
    assert!(judged >= 60, "{judged} of {}", table.len());
}
