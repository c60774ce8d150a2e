//! The Dockerfile language: text → syntax tree → typed instructions → the stages a target needs →
//! steps with every variable expanded. Pure: reads no files, fetches nothing, knows no engine.
//!
//! ```text
//! bytes ─parse─▶ Ast ─Plan::new─▶ Plan ─pending/resolve─▶ Plan ─evaluate─▶ Program { stages { steps } }
//! ```
//!
//! An engine needs to know nothing of the language. It reads the configs of the base images that the plan
//! asks for, gives them to the plan, and gets for every needed stage the list of [`Step`]s to carry out
//! and the config that the stage's image has in the end:
//!
//! ```
//! use slipway_dockerfile::{Action, BaseImage, Plan, PlanInput, Platform, parse};
//!
//! let source = br#"
//! FROM python:3.12-slim AS base
//! ARG EXTRA
//! ENV HOME_DIR=/app
//! WORKDIR $HOME_DIR
//! RUN pip install -r requirements.txt $EXTRA
//! COPY --chown=1000 train.py .
//! ENTRYPOINT ["python", "-u", "train.py"]
//! "#;
//! let ast = parse(source, "Dockerfile")?;
//! let mut input = PlanInput::new(Platform::new("linux", "amd64"));
//! input.build_args.insert("EXTRA".into(), "numpy".into());
//!
//! let mut plan = Plan::new(&ast, &input)?;
//! // Triggers of a base may bring in further stages with bases of their own: until none is pending.
//! while let Some(stage) = plan.pending().first().map(|stage| stage.id) {
//!     let blob = br#"{"os":"linux","architecture":"amd64","config":{"Env":["PATH=/usr/bin"]}}"#;
//!     plan.resolve(stage, BaseImage::from_json(blob).expect("an image config"))?;
//! }
//! let program = plan.evaluate()?;
//!
//! let stage = program.stage(program.target).expect("the target is needed");
//! let run = stage.steps.iter().find_map(|step| match &step.action {
//!     Action::Run(run) => Some((step, run)),
//!     _ => None,
//! });
//! let (step, run) = run.expect("there is a RUN");
//! assert_eq!(step.name, "RUN pip install -r requirements.txt numpy");
//! assert_eq!((step.number, stage.total), (Some(3), 4)); // "[3/4]": the base image is the first
//! assert_eq!(run.argv, ["/bin/sh", "-c", "pip install -r requirements.txt $EXTRA"]);
//! assert_eq!(run.cwd, "/app");
//! assert!(run.env.contains(&("EXTRA".into(), "numpy".into())));
//! let history = step.history.as_ref().expect("RUN has an entry");
//! assert_eq!(
//!     history.created_by,
//!     "RUN |1 EXTRA=numpy /bin/sh -c pip install -r requirements.txt $EXTRA # buildkit"
//! );
//! assert_eq!(stage.config.entrypoint, ["python", "-u", "train.py"]);
//! # Ok::<(), slipway_dockerfile::Error>(())
//! ```
//!
//! What stays for the engine to decide, because it depends on files: which paths a COPY source matches, what
//! user and group names mean, where HOME is; and where it puts what a mount of type ssh or secret brings
//! (RUN with an ssh mount expects `SSH_AUTH_SOCK`).
//!
//! Where Docker's own frontend is only less strict, this one follows it to the letter: the same config and
//! history come out. It refuses what would
//! be ignored (flags of ARG, STOPSIGNAL, HEALTHCHECK NONE; a `--device` that no device can be named), it finds the nearest stage *above* where a name is
//! given twice, and a wrong ONBUILD trigger is found where it is written.
#![forbid(unsafe_code)]

pub mod ast;
pub mod chmod;
mod error;
mod evaluate;
pub mod git;
pub mod ignore;
pub mod image;
pub mod instruction;
pub mod lint;
mod parse;
mod path;
mod percent;
pub mod plan;
mod platform;
mod reference;
pub mod shell;
mod span;
pub mod step;
mod suggest;

pub use ast::Ast;
pub use error::{Error, ExpansionProblem, ParseError, Problem, Suggestion};
pub use parse::{FILE_LIMIT, LINE_LIMIT, parse};
pub use plan::{Base, BaseImage, Plan, PlanInput, Program, Stage, StageProgram};
pub use platform::Platform;
pub use span::Span;
pub use step::{Action, StageId, Step};
