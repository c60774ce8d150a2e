//! From a parsed file to the stages that a target needs and what each depends on. Knows the
//! language's rules about stages and global ARGs; reads no files and fetches nothing.
//!
//! ```text
//! parse ─▶ Plan::new ─▶ ┌ pending() ─▶ the caller reads the base images' configs ┐ ─▶ evaluate() ─▶ Program
//!                       └ resolve(stage, base) ◀─────────────────────────────────┘
//! ```
//! Base images are resolved before anything is evaluated, because their ENV takes part in expansion
//! and their ONBUILD triggers may name further stages and images; hence the loop.

pub(crate) mod args;
mod reach;
mod stages;

pub(crate) use stages::Outline;

use crate::ast::Ast;
use crate::error::Error;
use crate::ignore::Matcher;
use crate::image::ImageConfig;
use crate::instruction::Statement;
use crate::lint::{Linter, Rule, Warning};
use crate::platform::Platform;
use crate::span::Span;
use crate::step::{Source, StageId, Step};
use serde::Deserialize;
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
    /// The context's .dockerignore, for the check that nothing ignored is copied.
    pub ignore: Option<Matcher>,
    /// Take every stage for needed: what `--check` does.
    pub all_stages: bool,
}

impl PlanInput {
    /// A build of the last stage on and for `build_platform` with no options.
    pub fn new(build_platform: Platform) -> PlanInput {
        PlanInput {
            build_args: BTreeMap::new(),
            target: None,
            target_platform: None,
            build_platform,
            contexts: BTreeSet::new(),
            labels: BTreeMap::new(),
            ignore: None,
            all_stages: false,
        }
    }
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
    /// Images and named contexts that it takes files from, its base not included, each once.
    pub sources: Vec<Source>,
    /// FROM.
    pub span: Span,
    /// FROM as written.
    pub original: String,
    /// Its instructions, FROM not included; triggers first.
    pub statements: Vec<Planned>,
    comments: Vec<String>,
}

/// An instruction of a stage.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The instruction.
    pub statement: Statement,
    /// It is an ONBUILD trigger.
    pub on_build: bool,
    /// What `--from` of a COPY means, or `from` of each mount of a RUN. Filled in for needed stages.
    pub from: Vec<Option<Source>>,
}

/// What a base image brings, apart from files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "image::BaseJson")]
pub struct BaseImage {
    /// The `config` object.
    pub config: ImageConfig,
    /// The `author` field.
    pub author: Option<String>,
    /// The image's own platform, where it says one.
    pub platform: Option<Platform>,
}

impl BaseImage {
    /// The base of `FROM scratch`, and of a named context that is only files.
    pub fn empty() -> BaseImage {
        let config = ImageConfig {
            working_dir: "/".to_owned(),
            ..ImageConfig::default()
        };
        BaseImage {
            config,
            author: None,
            platform: None,
        }
    }

    /// Reads an image config (the JSON blob that the image's id is the digest of).
    ///
    /// # Errors
    /// It is not such JSON.
    pub fn from_json(blob: &[u8]) -> Result<BaseImage, serde_json::Error> {
        serde_json::from_slice(blob)
    }
}

mod image {
    //! The fields of an image config that a base has to say.

    use super::{BaseImage, ImageConfig, Platform};
    use serde::Deserialize;

    #[derive(Deserialize)]
    pub(super) struct BaseJson {
        #[serde(default)]
        config: Option<ImageConfig>,
        #[serde(default)]
        author: Option<String>,
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        variant: String,
    }

    impl From<BaseJson> for BaseImage {
        fn from(json: BaseJson) -> BaseImage {
            let BaseJson {
                config,
                author,
                os,
                architecture,
                variant,
            } = json;
            let known = !os.is_empty() && !architecture.is_empty();
            BaseImage {
                config: config.unwrap_or_default(),
                author: author.filter(|a| !a.is_empty()),
                platform: known.then(|| {
                    Platform {
                        os,
                        architecture,
                        variant,
                    }
                    .normalized()
                }),
            }
        }
    }
}

/// The stages a target needs.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) outline: Outline,
    pub(crate) stages: Vec<Stage>,
    pub(crate) bases: BTreeMap<StageId, BaseImage>,
    pub(crate) target: StageId,
    pub(crate) needed: BTreeSet<StageId>,
    pub(crate) linter: Linter,
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
    /// What the checks found.
    pub warnings: Vec<Warning>,
    /// Build arguments that no ARG of a needed stage asks for.
    pub unused_build_args: Vec<String>,
}

impl Program {
    /// The stage of that number, where it is needed.
    pub fn stage(&self, id: StageId) -> Option<&StageProgram> {
        self.stages.iter().find(|stage| stage.id == id)
    }
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
    /// FROM as written.
    pub original: String,
    /// Its platform.
    pub platform: Platform,
    /// Stages whose results it needs.
    pub stages: BTreeSet<StageId>,
    /// Images and named contexts that it takes files from.
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
    pub fn new(ast: &Ast, input: &PlanInput) -> Result<Plan, Error> {
        let mut plan = stages::plan(ast, input)?;
        plan.check_sources()?;
        let wanted = match input.all_stages {
            true => plan.stages.iter().map(|stage| stage.id).collect(),
            false => vec![plan.target],
        };
        plan.reach(wanted)?;
        Ok(plan)
    }

    /// The stages the target needs as far as is known, each after those it depends on.
    pub fn stages(&self) -> impl Iterator<Item = &Stage> {
        self.needed.iter().map(|id| &self.stages[id.0])
    }

    /// Needed stages that start from an image or a named context that was not given to [`Plan::resolve`] yet.
    pub fn pending(&self) -> Vec<&Stage> {
        let fetched = |stage: &&Stage| matches!(stage.base, Base::Image(_) | Base::Named(_));
        self.stages()
            .filter(fetched)
            .filter(|stage| !self.bases.contains_key(&stage.id))
            .collect()
    }

    /// Says what the base of a pending stage brings. Its ONBUILD triggers become the stage's first instructions.
    ///
    /// # Errors
    /// A trigger that is wrong, placed at the stage's FROM.
    pub fn resolve(&mut self, stage: StageId, base: BaseImage) -> Result<(), Error> {
        let Some(found) = self.stages.get(stage.0) else {
            return Ok(());
        };
        if !matches!(found.base, Base::Image(_) | Base::Named(_)) || self.bases.contains_key(&stage) {
            return Ok(());
        }
        if let (Base::Image(name), Some(actual)) = (&found.base, &base.platform) {
            let wanted = &found.platform;
            if (&wanted.os, &wanted.architecture) != (&actual.os, &actual.architecture) {
                self.linter.warn(
                    Rule::InvalidBaseImagePlatform,
                    &found.span,
                    &found.comments,
                    || format!("the base image {name} is for \"{actual}\", the build for \"{wanted}\""),
                );
            }
        }
        let triggers = base.config.on_build.clone();
        self.bases.insert(stage, base);
        let span = self.stages[stage.0].span.clone();
        let triggers: Vec<(String, Span)> = triggers.into_iter().map(|t| (t, span.clone())).collect();
        self.add_triggers(stage, &triggers)?;
        self.reach(vec![stage])
    }

    /// What the checks found so far; [`Program::warnings`] has the rest, too.
    pub fn warnings(&self) -> &[Warning] {
        self.linter.warnings()
    }

    /// Expands and evaluates every instruction of every needed stage. Nothing may be pending.
    ///
    /// # Errors
    /// The first expansion or value that is wrong; checks that are not met where the file wants that to
    /// be an error.
    pub fn evaluate(&self) -> Result<Program, Error> {
        crate::evaluate::program(self)
    }
}
