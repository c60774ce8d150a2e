//! What can be wrong with a Dockerfile, and where. Knows no exit codes and prints nothing.

use crate::lint::Warning;
use crate::span::Span;
use std::fmt;

/// A mistake in a Dockerfile (or in what was asked of it) and its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{span}: {problem}")]
pub struct Error {
    /// Where. A trigger that came with a base image is placed at the FROM that brought it.
    pub span: Span,
    /// What.
    pub problem: Problem,
}

/// What [`crate::parse`] fails with.
pub type ParseError = Error;

impl Error {
    pub(crate) fn new(span: &Span, problem: Problem) -> Error {
        Error {
            span: span.clone(),
            problem,
        }
    }
}

/// A name near to one that was not found; prints itself as an addition to a sentence, or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Suggestion(pub Option<String>);

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(name) => write!(f, " (did you mean {name}?)"),
            None => Ok(()),
        }
    }
}

/// The kinds of mistakes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the sentence says it
pub enum Problem {
    // The file.
    #[error("the Dockerfile has {size} bytes, the limit is {limit}")]
    FileTooLarge { size: usize, limit: usize },
    #[error("the line has {size} bytes, the limit is {limit}")]
    LineTooLong { size: usize, limit: usize },
    #[error("the file is UTF-16; save it as UTF-8")]
    Utf16,
    #[error("the line is not UTF-8")]
    NotUtf8,
    #[error("the line contains a NUL byte")]
    Nul,
    #[error("the file has no instructions")]
    Empty,
    #[error("the directive {name} is given twice")]
    DuplicateDirective { name: String },
    #[error("the escape directive can be \\ or `, not {value}")]
    BadEscape { value: String },
    #[error("the check directive has an option that is not understood: {option}")]
    BadCheckOption { option: String },
    #[error("the heredoc <<{name} is never ended by a line that says {name}")]
    UnterminatedHeredoc { name: String },

    // One instruction.
    #[error("unknown instruction {keyword}{suggestion}")]
    UnknownInstruction { keyword: String, suggestion: Suggestion },
    #[error("unknown flag --{flag} of {instruction}{suggestion}")]
    UnknownFlag {
        instruction: &'static str,
        flag: String,
        suggestion: Suggestion,
    },
    #[error("the flag --{flag} is given twice")]
    DuplicateFlag { flag: String },
    #[error("the flag --{flag} needs a value")]
    FlagWithoutValue { flag: String },
    #[error("the flag --{flag} is true or false, not {value}")]
    FlagNotBoolean { flag: String, value: String },
    #[error("the flag --{flag} has an invalid value {value:?}: {reason}")]
    BadFlagValue {
        flag: String,
        value: String,
        reason: String,
    },
    #[error("{instruction} needs at least one argument")]
    NoArguments { instruction: &'static str },
    #[error("{instruction} takes exactly one argument")]
    NotOneArgument { instruction: &'static str },
    #[error("{instruction} needs a source and a destination")]
    NoDestination { instruction: &'static str },
    #[error("{instruction} cannot have a heredoc as its destination")]
    HeredocDestination { instruction: &'static str },
    #[error("a JSON array of {instruction} holds strings only")]
    JsonNotStrings { instruction: String },
    #[error("{instruction} needs the form [\"program\", \"argument\"]")]
    NotJson { instruction: &'static str },
    #[error("{instruction} needs a value after {name}")]
    PairWithoutValue { instruction: &'static str, name: String },
    #[error("{instruction}: {word:?} has no =; the form is name=value")]
    PairWithoutEquals { instruction: &'static str, word: String },
    #[error("{instruction} needs a name before =")]
    EmptyName { instruction: &'static str },
    #[error("FROM takes an image, or an image AS a name (comments stand on lines of their own)")]
    FromArguments,
    #[error("{name:?} cannot name a stage: a letter first, then letters, digits, - _ .")]
    BadStageName { name: String },
    #[error("ONBUILD cannot hold {keyword}")]
    BadTrigger { keyword: String },
    #[error("HEALTHCHECK is CMD or NONE, not {kind}")]
    HealthcheckKind { kind: String },
    #[error("HEALTHCHECK NONE takes no arguments and no flags")]
    HealthcheckNone,
    #[error("HEALTHCHECK CMD has no command")]
    HealthcheckWithoutCommand,
    #[error("VOLUME cannot be an empty path")]
    EmptyVolume,
    #[error("--mount={mount}: {reason}")]
    BadMount { mount: String, reason: String },
    #[error("--device={device}: {reason}")]
    BadDevice { device: String, reason: String },

    // Expansion.
    #[error("cannot expand {word:?}: {reason}")]
    Expansion { word: String, reason: ExpansionProblem },
    #[error("expanded, the instructions up to here take more than {limit} bytes")]
    ExpansionTooLarge { limit: usize },
    #[error("unknown signal {signal}")]
    UnknownSignal { signal: String },
    #[error("invalid port {port}: {reason}")]
    BadPort { port: String, reason: &'static str },
    #[error("invalid --chmod {value}: {reason}")]
    BadChmod { value: String, reason: &'static str },
    #[error("invalid --checksum {value}: {reason}")]
    BadChecksum { value: String, reason: &'static str },
    #[error("COPY cannot take {source_path}: only ADD fetches URLs and git repositories")]
    RemoteCopy { source_path: String },
    #[error("{source_path}: {reason}")]
    BadGitReference { source_path: String, reason: String },
    #[error("a mount cannot have {target} as its target")]
    BadMountTarget { target: String },
    #[error("SOURCE_DATE_EPOCH={value} is not a number of seconds")]
    BadEpoch { value: String },

    // Stages.
    #[error("there is no FROM before this instruction")]
    NoStage,
    #[error("the file has no FROM")]
    NoStages,
    #[error("the base image {expression} is empty after expansion{suggestion}")]
    EmptyBase {
        expression: String,
        suggestion: Suggestion,
    },
    #[error("{name:?} cannot be the name of an image: {flaw}")]
    BadImageName { name: String, flaw: &'static str },
    #[error("the platform {expression} is empty after expansion{suggestion}")]
    EmptyPlatform {
        expression: String,
        suggestion: Suggestion,
    },
    #[error("invalid platform {value}{suggestion}")]
    BadPlatform { value: String, suggestion: Suggestion },
    #[error("the target stage {target} does not exist{suggestion}")]
    UnknownTarget { target: String, suggestion: Suggestion },
    #[error("there is no stage number {index}")]
    UnknownStageNumber { index: usize },
    #[error("--from={from} cannot hold a variable; give the image a stage of its own: FROM {from} AS name")]
    VariableFrom { from: String },
    #[error("the stage {from} needs to be defined before current stage {stage}")]
    LaterStage { from: String, stage: String },
    #[error("the stage {stage} depends on itself")]
    Circular { stage: String },
    #[error("the ONBUILD trigger {trigger:?} is not one instruction that may be a trigger")]
    TriggerNotOne { trigger: String },
    #[error("in the ONBUILD trigger {trigger:?}: {problem}")]
    Trigger { trigger: String, problem: Box<Problem> },
    #[error("the base image of the stage {stage} was not looked at")]
    BaseNotResolved { stage: String },
    #[error("the file wants its checks to be met: {}", list(warnings))]
    ChecksNotMet { warnings: Vec<Warning> },
}

/// Why a word with `$` in it cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the sentence says it
pub enum ExpansionProblem {
    #[error("a single quote is not closed")]
    SingleQuote,
    #[error("a double quote is not closed")]
    DoubleQuote,
    #[error("a }} is missing")]
    MissingBrace,
    #[error("a / is missing in ${{}}")]
    MissingSlash,
    #[error("bad substitution")]
    BadSubstitution,
    #[error("unsupported modifier ({modifier}) in a substitution")]
    UnsupportedModifier { modifier: String },
    #[error("invalid escape \\{escaped} in a pattern")]
    BadPattern { escaped: String },
    #[error("{name}: {message}")]
    Required { name: String, message: String },
    #[error("substitutions are nested too deep")]
    TooDeep,
    #[error("the result is larger than {limit} bytes")]
    TooLarge { limit: usize },
}

impl Problem {
    /// A problem of an instruction that the reader may not have before them.
    pub(crate) fn in_trigger(text: &str, problem: Problem) -> Problem {
        let trigger = text.lines().next().unwrap_or_default().to_owned();
        Problem::Trigger {
            trigger,
            problem: Box::new(problem),
        }
    }
}

fn list(warnings: &[Warning]) -> String {
    warnings
        .iter()
        .map(Warning::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}
