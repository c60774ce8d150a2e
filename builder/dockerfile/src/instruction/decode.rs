//! From a line of the syntax tree to a typed instruction.

use super::flags::{Flags, Kind};
use super::{
    ArgDefinition, Command, Device, Document, From, Instruction, MountText, Network, OnBuild, Run, Security,
    Statement, Transfer, health,
};
use crate::ast::{Args, Heredoc, Node, Pair};
use crate::error::{Error, Problem};
use crate::parse::marker;
use crate::suggest::{nearest, nearest_ignoring_case};

const KEYWORDS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Understands one instruction.
///
/// # Errors
/// An unknown instruction or flag (with the nearest known one), missing or superfluous arguments,
/// values that cannot be whatever their variables hold.
pub fn decode(node: &Node) -> Result<Statement, Error> {
    Ok(Statement {
        instruction: instruction(node).map_err(|p| Error::new(&node.span, p))?,
        span: node.span.clone(),
        keyword: node.keyword.clone(),
        original: node.original.trim().to_owned(),
        comments: node.comments.clone(),
    })
}

fn instruction(node: &Node) -> Result<Instruction, Problem> {
    let Some(keyword) = KEYWORDS
        .iter()
        .copied()
        .find(|k| k.eq_ignore_ascii_case(&node.keyword))
    else {
        let suggestion = nearest_ignoring_case(&node.keyword, KEYWORDS);
        return Err(Problem::UnknownInstruction {
            keyword: node.keyword.clone(),
            suggestion,
        });
    };
    match keyword {
        "ADD" => return transfer(node, keyword).map(Instruction::Add),
        "COPY" => return transfer(node, keyword).map(Instruction::Copy),
        "FROM" => return from(node).map(Instruction::From),
        "RUN" => return run(node).map(Instruction::Run),
        "HEALTHCHECK" => return health::decode(node, words(node)).map(Instruction::Healthcheck),
        _ => Flags::none(node, keyword)?,
    }
    let one = || match words(node) {
        [word] => Ok(word.clone()),
        _ => Err(Problem::NotOneArgument { instruction: keyword }),
    };
    let some = || match words(node) {
        [] => Err(Problem::NoArguments { instruction: keyword }),
        words => Ok(words.to_vec()),
    };
    Ok(match keyword {
        "ARG" => Instruction::Arg(arg(&some()?)?),
        "CMD" => Instruction::Cmd(command(node)),
        "ENTRYPOINT" => Instruction::Entrypoint(command(node)),
        "ENV" => Instruction::Env(pairs(node, keyword)?),
        "EXPOSE" => {
            let mut ports = some()?;
            ports.sort();
            Instruction::Expose(ports)
        }
        "LABEL" => Instruction::Label(pairs(node, keyword)?),
        "MAINTAINER" => Instruction::Maintainer(one()?),
        "ONBUILD" => Instruction::OnBuild(on_build(node)?),
        "SHELL" => match (some()?, node.json) {
            (shell, true) => Instruction::Shell(shell),
            (_, false) => return Err(Problem::NotJson { instruction: keyword }),
        },
        "STOPSIGNAL" => Instruction::StopSignal(one()?),
        "USER" => Instruction::User(one()?),
        "VOLUME" => {
            let volumes: Vec<String> = some()?.iter().map(|v| v.trim().to_owned()).collect();
            if volumes.iter().any(String::is_empty) {
                return Err(Problem::EmptyVolume);
            }
            Instruction::Volume(volumes)
        }
        _ => Instruction::Workdir(one()?),
    })
}

fn words(node: &Node) -> &[String] {
    match &node.args {
        Args::Words(words) => words,
        _ => &[],
    }
}

fn command(node: &Node) -> Command {
    match node.json {
        true => Command::Exec(words(node).to_vec()),
        false => Command::Shell(words(node).join(" ")),
    }
}

fn pairs(node: &Node, instruction: &'static str) -> Result<Vec<Pair>, Problem> {
    match &node.args {
        Args::Pairs(pairs) if pairs.iter().any(|p| p.key.is_empty()) => {
            Err(Problem::EmptyName { instruction })
        }
        Args::Pairs(pairs) => Ok(pairs.clone()),
        _ => Err(Problem::NoArguments { instruction }),
    }
}

fn arg(words: &[String]) -> Result<Vec<ArgDefinition>, Problem> {
    let definition = |word: &String| match word.split_once('=') {
        Some(("", _)) => Err(Problem::EmptyName { instruction: "ARG" }),
        Some((name, value)) => Ok(ArgDefinition {
            name: name.to_owned(),
            default: Some(value.to_owned()),
        }),
        None => Ok(ArgDefinition {
            name: word.clone(),
            default: None,
        }),
    };
    words.iter().map(definition).collect()
}

fn from(node: &Node) -> Result<From, Problem> {
    let (base, name) = match words(node) {
        [base] => (base, None),
        [base, keyword, name] if keyword.eq_ignore_ascii_case("as") => (base, Some(name)),
        _ => return Err(Problem::FromArguments),
    };
    let name = name.map(|name| {
        let lower = name.to_lowercase();
        let sound = lower.starts_with(|c: char| c.is_ascii_lowercase())
            && lower
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c));
        if sound {
            Ok(lower)
        } else {
            Err(Problem::BadStageName { name: name.clone() })
        }
    });
    let mut flags = Flags::read(node, "FROM", &[("platform", Kind::Text)])?;
    Ok(From {
        base: base.clone(),
        name: name.transpose()?,
        platform: flags.text("platform"),
    })
}

fn run(node: &Node) -> Result<Run, Problem> {
    const KNOWN: [(&str, Kind); 4] = [
        ("mount", Kind::Texts),
        ("network", Kind::Text),
        ("security", Kind::Text),
        ("device", Kind::Texts),
    ];
    let mut flags = Flags::read(node, "RUN", &KNOWN)?;
    let command = command(node);
    if command == Command::Exec(Vec::new()) {
        return Err(Problem::NoArguments { instruction: "RUN" });
    }
    let choice = |flags: &mut Flags, flag: &str, known: &[&str]| match flags.texts(flag).pop() {
        None => Ok(0),
        Some(value) => known.iter().position(|k| *k == value).ok_or_else(|| {
            let reason = format!(
                "it is one of {}{}",
                known.join(", "),
                nearest(&value, known.iter().copied())
            );
            Problem::BadFlagValue {
                flag: flag.to_owned(),
                value,
                reason,
            }
        }),
    };
    let network = match choice(&mut flags, "network", &["default", "none", "host"])? {
        0 => Network::Default,
        1 => Network::None,
        _ => Network::Host,
    };
    let security = match choice(&mut flags, "security", &["sandbox", "insecure"])? {
        0 => Security::Sandbox,
        _ => Security::Insecure,
    };
    Ok(Run {
        command,
        heredocs: node.heredocs.clone(),
        mounts: flags
            .texts("mount")
            .into_iter()
            .map(MountText::read)
            .collect::<Result<_, _>>()?,
        network,
        security,
        devices: flags
            .texts("device")
            .iter()
            .map(|d| Device::read(d))
            .collect::<Result<_, _>>()?,
    })
}

fn transfer(node: &Node, instruction: &'static str) -> Result<Transfer, Problem> {
    const COPY: [(&str, Kind); 6] = [
        ("from", Kind::Text),
        ("chown", Kind::Text),
        ("chmod", Kind::Text),
        ("link", Kind::Bool),
        ("parents", Kind::Bool),
        ("exclude", Kind::Texts),
    ];
    const ADD: [(&str, Kind); 7] = [
        ("chown", Kind::Text),
        ("chmod", Kind::Text),
        ("link", Kind::Bool),
        ("exclude", Kind::Texts),
        ("checksum", Kind::Text),
        ("unpack", Kind::Bool),
        ("keep-git-dir", Kind::Bool),
    ];
    let known: &[_] = if instruction == "ADD" { &ADD } else { &COPY };
    let mut flags = Flags::read(node, instruction, known)?;
    let (destination, sources) = match words(node).split_last() {
        Some((destination, sources)) if !sources.is_empty() => (destination, sources),
        _ => return Err(Problem::NoDestination { instruction }),
    };
    let is_document = |word: &str| !node.json && marker(word).is_some();
    if is_document(destination) {
        return Err(Problem::HeredocDestination { instruction });
    }
    let from = flags.text("from");
    // A variable here would make a stage's dependencies depend on the running build.
    if let Some(from) = from.as_ref().filter(|f| f.contains(['$', '\\', '"', '\''])) {
        return Err(Problem::VariableFrom { from: from.clone() });
    }
    let documents = sources
        .iter()
        .filter(|s| is_document(s))
        .filter_map(|s| document(s, &node.heredocs));
    Ok(Transfer {
        sources: sources.iter().filter(|s| !is_document(s)).cloned().collect(),
        documents: documents.collect(),
        destination: destination.clone(),
        from,
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.bool("link").unwrap_or_default(),
        parents: flags.bool("parents").unwrap_or_default(),
        exclude: flags.texts("exclude"),
        checksum: flags.text("checksum"),
        unpack: flags.bool("unpack"),
        keep_git_dir: flags.bool("keep-git-dir"),
    })
}

fn document(word: &str, heredocs: &[Heredoc]) -> Option<Document> {
    let found = marker(word)?;
    // The last of a name is meant, should there be two.
    let heredoc = heredocs.iter().rev().find(|h| h.name == found.name);
    Some(Document {
        name: found.name,
        content: heredoc.map(Heredoc::text).unwrap_or_default(),
        expand: found.expand,
    })
}

fn on_build(node: &Node) -> Result<OnBuild, Problem> {
    let Args::Trigger(trigger) = &node.args else {
        return Err(Problem::NoArguments {
            instruction: "ONBUILD",
        });
    };
    let keyword = trigger.keyword.to_uppercase();
    if matches!(keyword.as_str(), "ONBUILD" | "FROM" | "MAINTAINER") {
        return Err(Problem::BadTrigger { keyword });
    }
    let original = node.original.trim_start();
    let mut text = original[node.keyword.len().min(original.len())..]
        .trim_start()
        .to_owned();
    for heredoc in &node.heredocs {
        text.push('\n');
        text.push_str(&heredoc.content);
        text.push_str(&heredoc.name);
    }
    let with_documents = Node {
        heredocs: node.heredocs.clone(),
        ..(**trigger).clone()
    };
    Ok(OnBuild {
        text,
        trigger: Box::new(instruction(&with_documents)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    fn decoded(line: &str) -> Result<Instruction, String> {
        let ast = parse(line.as_bytes(), "D").map_err(|e| e.to_string())?;
        decode(&ast.nodes[0])
            .map(|s| s.instruction)
            .map_err(|e| e.to_string())
    }

    fn copy(line: &str) -> Transfer {
        match decoded(line) {
            Ok(Instruction::Copy(transfer) | Instruction::Add(transfer)) => transfer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn slips_in_keywords_and_flags_are_named() {
        for (line, expected) in [
            ("FORM x", "D:1: unknown instruction FORM (did you mean FROM?)"),
            (
                "wrokdir /x",
                "D:1: unknown instruction wrokdir (did you mean workdir?)",
            ),
            (
                "COPY --form=x a b",
                "D:1: unknown flag --form of COPY (did you mean from?)",
            ),
            ("COPY --checksum=x a b", "D:1: unknown flag --checksum of COPY"),
            ("ARG --x y", "D:1: unknown flag --x of ARG"),
            (
                "RUN --network=hots x",
                "D:1: the flag --network has an invalid value \"hots\": it is one of default, none, host (did you mean host?)",
            ),
            ("RUN --mount x", "D:1: the flag --mount needs a value"),
            (
                "COPY --link=maybe a b",
                "D:1: the flag --link is true or false, not maybe",
            ),
            (
                "COPY --from=a --from=b a b",
                "D:1: the flag --from is given twice",
            ),
        ] {
            assert_eq!(decoded(line), Err(expected.to_owned()), "{line}");
        }
    }

    #[test]
    fn arguments_are_counted() {
        for line in [
            "ADD x",
            "ARG",
            "ENV",
            "EXPOSE",
            "FROM",
            "FROM a b",
            "FROM a AS b c",
            "FROM a AS 1x",
            "LABEL",
            "MAINTAINER",
            "ONBUILD",
            "RUN []",
            "SHELL",
            "SHELL []",
            "SHELL /bin/sh",
            "STOPSIGNAL",
            "USER",
            "VOLUME",
            "VOLUME [\" \"]",
            "WORKDIR",
            "ENV =x",
            "ARG =x",
            "COPY a <<E\nE",
            "HEALTHCHECK",
            "HEALTHCHECK NONE x",
            "HEALTHCHECK CMD",
            "HEALTHCHECK TCP 80",
            "CMD [1]",
        ] {
            assert!(decoded(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_flag_of_copy_and_add_has_its_field() {
        let all =
            copy("COPY --from=b --chown=1:2 --chmod=u+x --link --parents --exclude=*.o --exclude=x a b c/");
        assert_eq!(all.sources, ["a", "b"]);
        assert_eq!(
            (all.from.as_deref(), all.chown.as_deref()),
            (Some("b"), Some("1:2"))
        );
        assert_eq!((all.chmod.as_deref(), all.exclude.len()), (Some("u+x"), 2));
        assert!(all.link && all.parents);
        let all = copy("ADD --checksum=sha256:0 --unpack=false --keep-git-dir https://x/y.git /d");
        assert_eq!((all.unpack, all.keep_git_dir), (Some(false), Some(true)));
        assert_eq!(all.checksum.as_deref(), Some("sha256:0"));
        assert!(decoded("COPY --from=$X a b").is_err_and(|e| e.contains("FROM $X AS name")));
    }

    #[test]
    fn documents_are_sources_of_their_own() {
        let found = copy("COPY <<-A x <<'B' /d/\n\tone $V\n\tA\ntwo $V\nB\n");
        assert_eq!(found.sources, ["x"]);
        let documents = found
            .documents
            .iter()
            .map(|d| (d.name.as_str(), d.content.as_str(), d.expand));
        assert_eq!(
            documents.collect::<Vec<_>>(),
            [("A", "one $V\n", true), ("B", "two $V\n", false)]
        );
    }

    #[test]
    fn broken_json_is_a_shell_command() {
        assert_eq!(decoded("RUN ['a']"), decoded("RUN  ['a']"));
        assert_eq!(
            decoded("CMD [\"a\", "),
            Ok(Instruction::Cmd(Command::Shell("[\"a\",".into())))
        );
        assert_eq!(
            decoded("CMD [ \"a b\" ]"),
            Ok(Instruction::Cmd(Command::Exec(vec!["a b".into()])))
        );
        assert_eq!(
            decoded("ENTRYPOINT []"),
            Ok(Instruction::Entrypoint(Command::Exec(vec![])))
        );
    }

    #[test]
    fn triggers_keep_their_text_and_their_documents() {
        let Ok(Instruction::OnBuild(found)) = decoded("OnBuild   RUN --mount=type=ssh <<E cat\nx\nE\n")
        else {
            panic!()
        };
        assert_eq!(found.text, "RUN --mount=type=ssh <<E cat\nx\nE");
        assert!(matches!(*found.trigger, Instruction::Run(run) if run.heredocs.len() == 1));
        for line in [
            "ONBUILD ONBUILD RUN x",
            "ONBUILD FROM x",
            "ONBUILD MAINTAINER x",
            "ONBUILD RUM x",
        ] {
            assert!(decoded(line).is_err(), "{line}");
        }
    }
}
