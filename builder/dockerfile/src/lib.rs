//! The Dockerfile language: text → syntax tree → typed instructions → the stages a target needs →
//! steps with every variable expanded. Pure: reads no files, fetches nothing, knows no engine.
//!
//! ```text
//! bytes ─parse─▶ Ast ─Plan::new─▶ Plan ─resolve bases─▶ Plan ─evaluate─▶ Program { stages { steps } }
//! ```
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
