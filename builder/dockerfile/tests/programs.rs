//! Golden programs: `seeds/` (the Dockerfiles of tutorials) and `golden/` (the language's corners). Beside each
//! Dockerfile stand `expected` (rewritten with `UPDATE=1`), and where there is something to ask for, `options`:
//! `--build-arg=K=V`, `--target=T`, `--context=NAME`, `--label=K=V`, `--platform=P`, `--ignore=PATTERN`, `--check=all`,
//! `--base-onbuild=…`, one a line.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use slipway_dockerfile::ignore::Matcher;
use slipway_dockerfile::{Action, Base, BaseImage, Plan, PlanInput, Platform, Program, parse};
use std::fmt::Write as _;
use std::path::Path;

const BASE: &[u8] = include_bytes!("base.json");

#[test]
fn seeds_become_the_steps_that_are_expected() {
    let seen = golden("seeds");
    assert!(seen >= 10, "{seen}");
}

#[test]
fn corners_of_the_language_become_the_steps_that_are_expected() {
    let seen = golden("golden");
    assert!(seen >= 12, "{seen}");
}

fn golden(folder: &str) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let mut cases: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.sort();
    for case in &cases {
        let source = std::fs::read(case.join("Dockerfile")).unwrap();
        let options = std::fs::read_to_string(case.join("options")).unwrap_or_default();
        let found = match program(&source, &options) {
            Ok(program) => shown(&program),
            Err(error) => format!("error: {error}\n"),
        };
        let expected = case.join("expected");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&expected, &found).unwrap();
        }
        let expected = std::fs::read_to_string(&expected).unwrap_or_default();
        assert_eq!(found, expected, "{} (UPDATE=1 rewrites it)", case.display());
    }
    cases.len()
}

fn program(source: &[u8], options: &str) -> Result<Program, slipway_dockerfile::Error> {
    let mut input = PlanInput::new(Platform::new("linux", "amd64"));
    let mut base = BaseImage::from_json(BASE).unwrap();
    for option in options.lines() {
        let (name, value) = option.split_once('=').unwrap();
        let pair = || {
            value
                .split_once('=')
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .unwrap()
        };
        match name {
            "--build-arg" => input.build_args.extend([pair()]),
            "--label" => input.labels.extend([pair()]),
            "--target" => input.target = Some(value.to_owned()),
            "--context" => drop(input.contexts.insert(value.to_owned())),
            "--platform" => input.target_platform = Platform::parse(value, &input.build_platform),
            "--ignore" => input.ignore = Some(Matcher::new(&[value]).unwrap()),
            "--check" => input.all_stages = value == "all",
            "--base-onbuild" => base.config.on_build.push(value.to_owned()),
            _ => panic!("{option}"),
        }
    }
    let mut plan = Plan::new(&parse(source, "Dockerfile")?, &input)?;
    while let Some(stage) = plan.pending().first().map(|stage| stage.id) {
        plan.resolve(stage, base.clone())?;
    }
    plan.evaluate()
}

fn shown(program: &Program) -> String {
    let mut out = String::new();
    for stage in &program.stages {
        let target = if stage.id == program.target {
            " (target)"
        } else {
            ""
        };
        let base = match &stage.base {
            Base::Scratch => "nothing".to_owned(),
            Base::Image(name) => format!("the image {name}"),
            Base::Stage(id) => format!("stage {}", id.0),
            Base::Named(name) => format!("the context {name}"),
        };
        writeln!(
            out,
            "stage {} {:?} on {base} for {}{target}",
            stage.id.0, stage.name, stage.platform
        )
        .unwrap();
        let needs: Vec<String> = stage.stages.iter().map(|id| id.0.to_string()).collect();
        if !needs.is_empty() {
            writeln!(out, "  needs stages {}", needs.join(", ")).unwrap();
        }
        if !stage.sources.is_empty() {
            writeln!(out, "  needs {}", serde_json::to_string(&stage.sources).unwrap()).unwrap();
        }
        for step in &stage.steps {
            let number = step
                .number
                .map_or("-".to_owned(), |n| format!("{n}/{}", stage.total));
            let trigger = if step.on_build { "ONBUILD " } else { "" };
            writeln!(out, "  [{number}] {trigger}{} ({})", step.name, step.span).unwrap();
            if step.action != Action::Config {
                writeln!(out, "    {}", serde_json::to_string(&step.action).unwrap()).unwrap();
            }
            if let Action::Run(run) = &step.action
                && !run.proxy_env.is_empty()
            {
                writeln!(out, "    proxies {:?}", run.proxy_env).unwrap();
            }
            if let Some(history) = &step.history {
                let layer = if history.empty_layer { "" } else { " (layer)" };
                writeln!(out, "    history{layer} {:?}", history.created_by).unwrap();
            }
        }
        let author = stage.author.as_deref().unwrap_or_default();
        writeln!(out, "  author {author:?}").unwrap();
        writeln!(out, "  config {}", serde_json::to_string(&stage.config).unwrap()).unwrap();
    }
    if let Some(epoch) = program.epoch {
        writeln!(out, "epoch {epoch}").unwrap();
    }
    for name in &program.unused_build_args {
        writeln!(out, "unused build argument {name}").unwrap();
    }
    for warning in &program.warnings {
        writeln!(out, "warning {warning}").unwrap();
    }
    out
}
