//! From a parsed file to the stages that a target needs and what each depends on. Knows the
//! language's rules about stages and global ARGs; reads no files and fetches nothing.
//!
//! ```text
//! parse ─▶ Plan::new ─▶ ┌ pending() ─▶ the caller reads the base images' configs ┐ ─▶ evaluate() ─▶ Program
//!                       └ resolve(stage, base) ◀─────────────────────────────────┘
//! ```
//! Base images are resolved before anything is evaluated, because their ENV takes part in expansion
//! and their ONBUILD triggers may name further stages and images; hence the loop.

use crate::ast::Ast;
use crate::error::{Error, Problem};
use crate::image::ImageConfig;
use crate::instruction::Statement;
use crate::platform::Platform;
use crate::span::Span;
use crate::step::{Source, StageId, Step};
use std::collections::{BTreeMap, BTreeSet};

/// What a build asks of a Dockerfile.
#[derive(Debug, Clone)]
pub struct PlanInput {
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--target`: a stage's name or number; None: the last one.
    pub target: Option<String>,
    /// `--platform`; None: the build platform.
    pub target_platform: Option<Platform>,
    /// The machine's own platform.
    pub build_platform: Platform,
    /// Names given with `--build-context`: they stand in for stages and images of that name.
    pub contexts: BTreeSet<String>,
    /// `--label`: added to the target's labels.
    pub labels: BTreeMap<String, String>,
}

/// The base of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// An image, named as written (after expansion; no defaults added).
    Image(String),
    /// An earlier stage.
    Stage(StageId),
    /// A named context.
    Named(String),
}

/// A stage.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Its number.
    pub id: StageId,
    /// Its name, or `stage-2`.
    pub name: String,
    /// What it starts from.
    pub base: Base,
    /// Its platform.
    pub platform: Platform,
    /// Stages whose results it needs (its base and those it takes files from), each once, ascending.
    pub stages: BTreeSet<StageId>,
    /// Images, contexts that it takes files from, its base not included.
    pub sources: Vec<Source>,
    /// FROM.
    pub span: Span,
    /// Its instructions, FROM not included; triggers first.
    pub statements: Vec<Planned>,
}

/// An instruction of a stage.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The instruction.
    pub statement: Statement,
    /// It is an ONBUILD trigger.
    pub on_build: bool,
}

/// What a base image brings, apart from files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseImage {
    /// The `config` object.
    pub config: ImageConfig,
    /// The `author` field.
    pub author: Option<String>,
    /// The image's own platform, where it says one.
    pub platform: Option<Platform>,
}

/// The stages a target needs.
#[derive(Debug, Clone)]
pub struct Plan {
    stages: Vec<Stage>,
}

/// Everything there is to do.
#[derive(Debug, Clone)]
pub struct Program {
    /// The stages the target needs, each after those it depends on.
    pub stages: Vec<StageProgram>,
    /// The target.
    pub target: StageId,
    /// SOURCE_DATE_EPOCH, in seconds.
    pub epoch: Option<i64>,
}

/// A stage, evaluated.
#[derive(Debug, Clone)]
pub struct StageProgram {
    /// The stage's number.
    pub id: StageId,
    /// Its name; empty where it is the only one.
    pub name: String,
    /// What it starts from.
    pub base: Base,
    /// FROM.
    pub span: Span,
    /// Its platform.
    pub platform: Platform,
    /// Stages whose results it needs.
    pub stages: BTreeSet<StageId>,
    /// Images and contexts that it takes files from.
    pub sources: Vec<Source>,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// How many of `steps` make a layer, plus one where a base image is loaded: the n of `[2/n]`.
    pub total: usize,
    /// The `config` object of the stage's image.
    pub config: ImageConfig,
    /// The `author` field of the stage's image.
    pub author: Option<String>,
}

impl Plan {
    /// Finds the stages that `input.target` needs.
    ///
    /// # Errors
    /// Whatever is wrong with an instruction, a stage's name or base, a `--from`, the target.
    pub fn new(ast: &Ast, _input: &PlanInput) -> Result<Plan, Error> {
        Err(Error::new(&Span::whole(&ast.file), Problem::NoStages))
    }

    /// The stages the target needs as far as is known, each after those it depends on.
    pub fn stages(&self) -> impl Iterator<Item = &Stage> {
        self.stages.iter()
    }

    /// Stages that start from an image or a named context that was not given to [`Plan::resolve`] yet.
    pub fn pending(&self) -> Vec<&Stage> {
        Vec::new()
    }

    /// Says what the base of a pending stage brings. Its ONBUILD triggers become the stage's first instructions.
    ///
    /// # Errors
    /// A trigger that is wrong, placed at the stage's FROM.
    pub fn resolve(&mut self, _stage: StageId, _base: BaseImage) -> Result<(), Error> {
        Ok(())
    }

    /// Expands and evaluates every instruction of every needed stage. Nothing may be pending.
    ///
    /// # Errors
    /// The first expansion or value that is wrong.
    pub fn evaluate(&self) -> Result<Program, Error> {
        Ok(Program {
            stages: Vec::new(),
            target: StageId(0),
            epoch: None,
        })
    }
}
