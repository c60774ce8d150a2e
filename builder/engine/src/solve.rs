//! All stages at once, each as far as its inputs allow; the first failure stops the rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use slipway_dockerfile::{Action, Base as PlanBase, Program, StageId, StageProgram, Step};
use slipway_image::Digest;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::build::Build;
use crate::config::{self, Entry};
use crate::error::{BuildError, Excerpt, StepError, StepFailure};
use crate::layer::{Sealer, Tip};
use crate::output::Tail;
use crate::progress::{Event, Outcome, StepId, StepLabel};
use crate::steps::{StepContext, StepResult};

/// A stage that ended well.
#[derive(Debug)]
pub(crate) struct StageDone {
    pub tip: Tip,
    pub key: Digest,
    pub history: Vec<Entry>,
    /// What its steps, and those of the stages it is based on, made in this build, in order.
    pub made: Vec<Made>,
}

/// A step whose files become a layer behind the next ones.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    tip: Tip,
    step: Step,
    label: StepLabel,
}

/// The first step of a row whose files cannot be a layer, if there is one: what lies on it only echoes that.
pub(crate) fn not_sealed(build: &Build, made: &[Made]) -> Option<Box<StepFailure>> {
    made.iter().find_map(|made| {
        let error = StepError::Layer(made.tip.failure()?);
        Some(failure(build, &made.step, made.label.clone(), error, Vec::new()))
    })
}

/// How a stage ended; why it failed is told elsewhere.
pub(crate) type StageOutcome = Result<Arc<StageDone>, ()>;

/// Runs every stage of the program; what the target made.
pub(crate) async fn solve(
    build: &Arc<Build>,
    program: &Program,
    mut senders: HashMap<StageId, watch::Sender<Option<StageOutcome>>>,
) -> Result<Arc<StageDone>, BuildError> {
    refuse_what_cannot_run(build, program)?;
    let mut tasks = JoinSet::new();
    let mut names = HashMap::new();
    for stage in &program.stages {
        let Some(sender) = senders.remove(&stage.id) else {
            continue;
        };
        let name = build.stage_name(stage.id);
        let (build, stage) = (Arc::clone(build), stage.clone());
        let task = tasks.spawn(async move {
            let outcome = run_stage(&build, &stage).await;
            match outcome {
                Ok(done) => {
                    let _ = sender.send(Some(Ok(Arc::new(done))));
                    None
                }
                Err(failure) => {
                    build.cancel.set();
                    let _ = sender.send(Some(Err(())));
                    Some(failure)
                }
            }
        });
        names.insert(task.id(), name);
    }
    let mut first: Option<Box<StepFailure>> = None;
    let mut panicked = None;
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(Some(failure)) => {
                // What others were cancelled for is the failure that counts.
                if first.as_ref().is_none_or(|f| f.error.is_cancelled()) {
                    first = Some(failure);
                }
            }
            Ok(None) => {}
            Err(source) => {
                build.cancel.set();
                tracing::error!(error = %source, "a stage's task panicked");
                let stage = names.remove(&source.id()).unwrap_or_default();
                panicked.get_or_insert(BuildError::Panicked { stage, source });
            }
        }
    }
    // The others were cancelled for it.
    if let Some(error) = panicked
        && first.as_ref().is_none_or(|failure| failure.error.is_cancelled())
    {
        return Err(error);
    }
    if let Some(failure) = first {
        return Err(if failure.error.is_cancelled() {
            BuildError::Cancelled
        } else {
            BuildError::Step(failure)
        });
    }
    build
        .stage_done(program.target)
        .await
        .map_err(|_| BuildError::Unsupported {
            what: "a target that was not solved".to_owned(),
        })
}

/// Nothing runs if something later cannot.
fn refuse_what_cannot_run(build: &Build, program: &Program) -> Result<(), BuildError> {
    for text in build.devices.empty_grants(&build.request) {
        build.progress.event(Event::Warning { text });
    }
    for stage in &program.stages {
        if let PlanBase::Named(name) = &stage.base {
            return Err(BuildError::Unsupported {
                what: format!("FROM the named build context {name}"),
            });
        }
        for step in &stage.steps {
            let wrong = crate::steps::not_built(step)
                .map(|what| StepError::Unsupported { what })
                .or_else(|| crate::steps::not_granted(&build.request, step))
                .or_else(|| without_devices(build, step))
                .or_else(|| match (&step.action, build.sandbox.no_shim()) {
                    (Action::Run(_), Some(why)) => Some(StepError::NoShim(why)),
                    _ => None,
                });
            if let Some(error) = wrong {
                let label = label(stage, step);
                return Err(BuildError::Step(failure(build, step, label, error, Vec::new())));
            }
        }
    }
    Ok(())
}

/// Why a step cannot have its devices. One that it can do without, and has to, is told.
fn without_devices(build: &Build, step: &Step) -> Option<StepError> {
    let Action::Run(run) = &step.action else {
        return None;
    };
    match build.devices.of_step(&build.request, run) {
        Ok(given) => {
            for why in given.absent {
                let text = format!(
                    "{}: RUN --device: {why}; the command runs without it (with `,required` that is an error)",
                    step.span
                );
                build.progress.event(Event::Warning { text });
            }
            build.devices.check(&given.names, run).err()
        }
        Err(error) => Some(error),
    }
}

fn failure(
    build: &Build,
    step: &Step,
    label: StepLabel,
    error: StepError,
    tail: Vec<String>,
) -> Box<StepFailure> {
    let excerpt = Excerpt::of(&build.context.dockerfile.text, &step.span);
    Box::new(StepFailure {
        span: step.span.clone(),
        label,
        excerpt,
        error,
        tail,
    })
}

fn label(stage: &StageProgram, step: &Step) -> StepLabel {
    StepLabel {
        stage: Some(stage.name.clone()).filter(|n| !n.is_empty()),
        number: u32::try_from(step.number.unwrap_or(0)).unwrap_or(0),
        total: u32::try_from(stage.total).unwrap_or(0),
        text: step.name.clone(),
    }
}

async fn run_stage(build: &Arc<Build>, stage: &StageProgram) -> Result<StageDone, Box<StepFailure>> {
    let (sealer, sealing) = Sealer::start(
        build.store.clone(),
        Arc::clone(&build.lease),
        build.abandon.clone(),
    );
    let result = run_steps(build, stage, &sealer).await;
    drop(sealer);
    // Finished steps are kept for the next try, whatever happens to this one.
    build.still_sealing(sealing);
    result
}

async fn run_steps(
    build: &Arc<Build>,
    stage: &StageProgram,
    sealer: &Sealer,
) -> Result<StageDone, Box<StepFailure>> {
    let mut done = begin(build, stage).await?;
    for step in &stage.steps {
        if step.action == Action::Config {
            if let Some(history) = &step.history {
                done.history.push(Entry::Step {
                    history: history.clone(),
                    created: None,
                });
            }
            continue;
        }
        let label = label(stage, step);
        let tail = Arc::new(Tail::default());
        let id = build.step();
        if build.cancel.is_set() {
            return Err(failure(build, step, label, StepError::Cancelled, Vec::new()));
        }
        build.progress.event(Event::Started {
            step: id,
            label: label.clone(),
        });
        let began = Instant::now();
        let context = StepContext {
            build,
            stage,
            step,
            id,
            sealer,
            tip: done.tip.clone(),
            key: done.key,
            tail: Arc::clone(&tail),
        };
        let result = unless_below_fails(build, &done.tip, context.execute()).await;
        let outcome = match &result {
            Ok(result) if result.cached => Outcome::Cached,
            Ok(_) => Outcome::Done,
            Err(e) if e.is_cancelled() => Outcome::Cancelled,
            Err(StepError::Below(_)) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        build.progress.event(Event::Ended {
            step: id,
            outcome,
            elapsed: began.elapsed(),
        });
        match result {
            Ok(result) => {
                if let Some(history) = &step.history {
                    let created = Some(result.created);
                    done.history.push(Entry::Step {
                        history: history.clone(),
                        created,
                    });
                }
                if !result.cached {
                    done.made.push(Made {
                        tip: result.tip.clone(),
                        step: step.clone(),
                        label,
                    });
                }
                done.tip = result.tip;
                done.key = result.key;
            }
            Err(StepError::Below(error)) if !error.is_cancelled() => {
                let what = StepError::Below(error);
                return Err(not_sealed(build, &done.made)
                    .unwrap_or_else(|| failure(build, step, label, what, tail.lines())));
            }
            Err(error) => return Err(failure(build, step, label, error, tail.lines())),
        }
    }
    Ok(done)
}

/// Does a step; when what it lies on turns out never to be a layer, nothing can come of it: it is stopped.
async fn unless_below_fails(
    build: &Build,
    below: &Tip,
    work: impl Future<Output = Result<StepResult, StepError>>,
) -> Result<StepResult, StepError> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        result = &mut work => result,
        error = below.failed() => {
            build.cancel.set();
            // It ends by itself, and cleans up.
            let _ = work.await;
            Err(StepError::Below(error))
        }
    }
}

/// What the stage starts from.
async fn begin(build: &Arc<Build>, stage: &StageProgram) -> Result<StageDone, Box<StepFailure>> {
    let text = |name: &str| format!("FROM {name}");
    let failed = |name: &str, error| {
        let label = StepLabel {
            stage: Some(stage.name.clone()).filter(|n| !n.is_empty()),
            number: 1,
            total: u32::try_from(stage.total).unwrap_or(0),
            text: text(name),
        };
        Box::new(StepFailure {
            span: stage.span.clone(),
            label,
            excerpt: Excerpt::of(&build.context.dockerfile.text, &stage.span),
            error,
            tail: Vec::new(),
        })
    };
    match &stage.base {
        PlanBase::Scratch => Ok(StageDone {
            tip: Tip::scratch(),
            key: crate::key::scratch(),
            history: Vec::new(),
            made: Vec::new(),
        }),
        PlanBase::Stage(below) => {
            let below = build
                .stage_done(*below)
                .await
                .map_err(|e| failed(&build.stage_name(*below), e))?;
            Ok(StageDone {
                tip: below.tip.clone(),
                key: below.key,
                history: below.history.clone(),
                made: below.made.clone(),
            })
        }
        PlanBase::Named(name) => {
            let what = format!("FROM the named build context {name}");
            Err(failed(name, StepError::Unsupported { what }))
        }
        PlanBase::Image(name) => {
            let id: StepId = build.step();
            let began = Instant::now();
            let base = build
                .source_image(name, &stage.platform, id)
                .await
                .map_err(|e| failed(name, e))?;
            let label = StepLabel {
                text: text(&base.name),
                ..failed(name, StepError::Cancelled).label
            };
            build.progress.event(Event::Started { step: id, label });
            let elapsed = began.elapsed();
            build.progress.event(Event::Ended {
                step: id,
                outcome: Outcome::Done,
                elapsed,
            });
            Ok(StageDone {
                tip: base.tip.clone(),
                key: base.key,
                history: config::base_history(&base.config, base.layers),
                made: Vec::new(),
            })
        }
    }
}
