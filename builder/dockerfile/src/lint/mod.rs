//! The checks: what a Dockerfile may say but had better not. Knows the rules, their names and which of
//! them a file switches off; what breaks a rule is found where the instruction in question is read
//! (`stages` for what needs no evaluation, `crate::evaluate` for the rest).

mod options;
mod stages;

pub use options::Options;
pub(crate) use stages::{casing, names, references, statements};

use crate::span::Span;
use std::fmt;

/// The checks, under the names that `# check=skip=…` uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // `Rule::about` says it
pub enum Rule {
    StageNameCasing,
    FromAsCasing,
    NoEmptyContinuation,
    ConsistentInstructionCasing,
    DuplicateStageName,
    ReservedStageName,
    JSONArgsRecommended,
    MaintainerDeprecated,
    UndefinedArgInFrom,
    WorkdirRelativePath,
    UndefinedVar,
    MultipleInstructionsDisallowed,
    LegacyKeyValueFormat,
    InvalidBaseImagePlatform,
    RedundantTargetPlatform,
    SecretsUsedInArgOrEnv,
    InvalidDefaultArgInFrom,
    FromPlatformFlagConstDisallowed,
    CopyIgnoredFile,
    InvalidDefinitionDescription,
    ExposeProtoCasing,
    ExposeInvalidFormat,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 22] = [
        Rule::StageNameCasing,
        Rule::FromAsCasing,
        Rule::NoEmptyContinuation,
        Rule::ConsistentInstructionCasing,
        Rule::DuplicateStageName,
        Rule::ReservedStageName,
        Rule::JSONArgsRecommended,
        Rule::MaintainerDeprecated,
        Rule::UndefinedArgInFrom,
        Rule::WorkdirRelativePath,
        Rule::UndefinedVar,
        Rule::MultipleInstructionsDisallowed,
        Rule::LegacyKeyValueFormat,
        Rule::InvalidBaseImagePlatform,
        Rule::RedundantTargetPlatform,
        Rule::SecretsUsedInArgOrEnv,
        Rule::InvalidDefaultArgInFrom,
        Rule::FromPlatformFlagConstDisallowed,
        Rule::CopyIgnoredFile,
        Rule::InvalidDefinitionDescription,
        Rule::ExposeProtoCasing,
        Rule::ExposeInvalidFormat,
    ];

    /// Whether the check is off unless `# check=experimental=…` asks for it.
    pub fn experimental(self) -> bool {
        self == Rule::InvalidDefinitionDescription
    }

    /// What the check wants.
    pub fn about(self) -> &'static str {
        match self {
            Rule::StageNameCasing => "write stage names in lower case",
            Rule::FromAsCasing => "write AS in the case of its FROM",
            Rule::NoEmptyContinuation => "leave no empty lines inside an instruction",
            Rule::ConsistentInstructionCasing => "write all keywords in one case",
            Rule::DuplicateStageName => "give every stage a name of its own",
            Rule::ReservedStageName => "don't name a stage scratch or context",
            Rule::JSONArgsRecommended => {
                "a shell between runtime and program swallows signals; use the JSON form"
            }
            Rule::MaintainerDeprecated => "use a label in the place of MAINTAINER",
            Rule::UndefinedArgInFrom => "declare the ARGs that FROM uses",
            Rule::WorkdirRelativePath => "begin with an absolute WORKDIR, whatever the base image's is",
            Rule::UndefinedVar => "define variables before their use",
            Rule::MultipleInstructionsDisallowed => {
                "write CMD, ENTRYPOINT and HEALTHCHECK once; the last one wins"
            }
            Rule::LegacyKeyValueFormat => "write ENV and LABEL with =",
            Rule::InvalidBaseImagePlatform => "use a base image of the platform that is built for",
            Rule::RedundantTargetPlatform => "the target platform is FROM's default",
            Rule::SecretsUsedInArgOrEnv => "ARG and ENV stay readable in the image; mount secrets instead",
            Rule::InvalidDefaultArgInFrom => "give ARGs defaults with which FROM names an image",
            Rule::FromPlatformFlagConstDisallowed => "a constant platform ties the stage to it",
            Rule::CopyIgnoredFile => "don't copy what .dockerignore leaves out",
            Rule::InvalidDefinitionDescription => {
                "a comment above ARG or FROM describes it: # name description"
            }
            Rule::ExposeProtoCasing => "write protocols in lower case",
            Rule::ExposeInvalidFormat => "EXPOSE names container ports, not addresses or host ports",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A place where a check is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The check.
    pub rule: Rule,
    /// Where.
    pub span: Span,
    /// What was found.
    pub message: String,
}

/// `Dockerfile:3: UndefinedVar: $foo is not defined`.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.span, self.rule, self.message)
    }
}

/// Collects warnings, dropping those that the file does not want.
#[derive(Debug, Clone, Default)]
pub(crate) struct Linter {
    options: Options,
    warnings: Vec<Warning>,
}

impl Linter {
    pub(crate) fn new(options: Options) -> Linter {
        Linter {
            options,
            warnings: Vec::new(),
        }
    }

    /// Warns, unless the file's options or those in the comments above the instruction (`# check=skip=…`) forbid it.
    pub(crate) fn warn(
        &mut self,
        rule: Rule,
        span: &Span,
        comments: &[String],
        message: impl FnOnce() -> String,
    ) {
        let allowed = match Options::in_comments(comments) {
            Some(local) => self.options.merged(&local).allows(rule),
            None => self.options.allows(rule),
        };
        if allowed {
            self.warnings.push(Warning {
                rule,
                span: span.clone(),
                message: message(),
            });
        }
    }

    pub(crate) fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The warnings where the file wants them to be errors.
    pub(crate) fn fatal(&self) -> Option<Vec<Warning>> {
        (self.options.error && !self.warnings.is_empty()).then(|| self.warnings.clone())
    }
}
