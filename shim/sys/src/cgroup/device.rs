//! Which devices a cgroup may use: OCI's rules as v1's lines and as a v2 eBPF program. Pure.
//!
//! Meaning of a list of rules: for each of read, write and mknod, the last rule that matches the device decides; where
//! none does, the answer is no.

use super::resources::DeviceRule;
use super::write::unsupported;
use super::{CgroupError, Result};

/// Access bits as `struct bpf_cgroup_dev_ctx` has them (include/uapi/linux/bpf.h).
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// A rule that has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    All,
    Block,
    Char,
}

impl Rule {
    fn parse(rule: &DeviceRule) -> Result<Rule> {
        let refuse =
            |reason: &str| -> CgroupError { unsupported("devices", format!("{reason} in {rule:?}")) };
        let kind = match rule.kind.as_deref().unwrap_or("a") {
            "a" | "" => Kind::All,
            "b" => Kind::Block,
            "c" | "u" => Kind::Char,
            _ => return Err(refuse("unknown type")),
        };
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => u32::try_from(n)
                .map(Some)
                .map_err(|_| refuse("impossible device number")),
        };
        let mut access = 0;
        for c in rule.access.as_deref().unwrap_or_default().chars() {
            access |= match c {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(refuse("unknown access")),
            };
        }
        let access = if access == 0 { ALL } else { access };
        Ok(Rule {
            allow: rule.allow,
            kind,
            major: number(rule.major)?,
            minor: number(rule.minor)?,
            access,
        })
    }

    fn is_everything(&self) -> bool {
        self.kind == Kind::All && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }

    /// The line for `devices.allow` or `devices.deny`. v1 knows type "a" only for everything at once.
    fn lines(&self) -> Vec<String> {
        if self.is_everything() {
            return vec!["a".into()];
        }
        let kinds: &[char] = match self.kind {
            Kind::All => &['b', 'c'],
            Kind::Block => &['b'],
            Kind::Char => &['c'],
        };
        let number = |n: Option<u32>| n.map_or("*".to_string(), |n| n.to_string());
        let bits = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')];
        let access: String = bits
            .iter()
            .filter(|(bit, _)| self.access & bit != 0)
            .map(|(_, c)| c)
            .collect();
        kinds
            .iter()
            .map(|k| format!("{k} {}:{} {access}", number(self.major), number(self.minor)))
            .collect()
    }
}

/// Checks the rules.
///
/// # Errors
/// [`CgroupError::Unsupported`] naming the rule that makes no sense.
pub(super) fn parse(rules: &[DeviceRule]) -> Result<Vec<Rule>> {
    rules.iter().map(Rule::parse).collect()
}

/// What to write, in order: (file, line).
pub(super) fn v1_lines(rules: &[Rule]) -> Vec<(&'static str, String)> {
    let file = |r: &Rule| if r.allow { "devices.allow" } else { "devices.deny" };
    rules
        .iter()
        .flat_map(|r| r.lines().into_iter().map(move |line| (file(r), line)))
        .collect()
}

/// One eBPF instruction (`struct bpf_insn`), eight bytes in native order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Insn {
    pub(super) code: u8,
    /// Destination in the low four bits, source in the high ones (little endian).
    pub(super) regs: u8,
    pub(super) off: i16,
    pub(super) imm: i32,
}

/// Opcodes used (include/uapi/linux/bpf_common.h, bpf.h).
const LDX_W: u8 = 0x61;
const AND32_K: u8 = 0x54;
const RSH32_K: u8 = 0x74;
const MOV64_K: u8 = 0xb7;
const MOV32_X: u8 = 0xbc;
const JEQ32_K: u8 = 0x16;
const JNE32_K: u8 = 0x56;
const EXIT: u8 = 0x95;

/// The registers' roles: the context comes in r1, the answer goes out in r0.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn {
        code,
        regs: dst | src << 4,
        off,
        imm,
    }
}

/// The program: walks the rules from the last to the first; an allow takes its bits off what is wanted and says yes
/// when nothing is left, a deny says no when it has one of them.
pub(super) fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut out = vec![
        insn(LDX_W, TYPE, CONTEXT, 0, 0),
        insn(AND32_K, TYPE, 0, 0, 0xffff),
        insn(LDX_W, WANTED, CONTEXT, 0, 0),
        insn(RSH32_K, WANTED, 0, 0, 16),
        insn(LDX_W, MAJOR, CONTEXT, 4, 0),
        insn(LDX_W, MINOR, CONTEXT, 8, 0),
    ];
    let answer = |out: &mut Vec<Insn>, yes: bool| {
        out.push(insn(MOV64_K, ANSWER, 0, 0, i32::from(yes)));
        out.push(insn(EXIT, 0, 0, 0, 0));
    };
    for rule in rules.iter().rev() {
        if rule.is_everything() {
            answer(&mut out, rule.allow);
            return out;
        }
        let body = body_of(rule);
        let tests = tests_of(rule);
        for (n, (register, value)) in tests.iter().enumerate() {
            // Over the tests that follow and the body. Both are a handful.
            let skip = tests.len() - n - 1 + body.len();
            out.push(insn(JNE32_K, *register, 0, skip as i16, *value));
        }
        out.extend(body);
    }
    answer(&mut out, false);
    out
}

fn tests_of(rule: &Rule) -> Vec<(u8, i32)> {
    let kind = match rule.kind {
        Kind::All => None,
        Kind::Block => Some((TYPE, 1)),
        Kind::Char => Some((TYPE, 2)),
    };
    let number = |register, n: Option<u32>| n.map(|n| (register, n.cast_signed()));
    [kind, number(MAJOR, rule.major), number(MINOR, rule.minor)]
        .into_iter()
        .flatten()
        .collect()
}

fn body_of(rule: &Rule) -> Vec<Insn> {
    let bits = i32::from(rule.access);
    if rule.allow {
        vec![
            insn(AND32_K, WANTED, 0, 0, !bits),
            insn(JNE32_K, WANTED, 0, 2, 0),
            insn(MOV64_K, ANSWER, 0, 0, 1),
            insn(EXIT, 0, 0, 0, 0),
        ]
    } else {
        vec![
            insn(MOV32_X, SCRATCH, WANTED, 0, 0),
            insn(AND32_K, SCRATCH, 0, 0, bits),
            insn(JEQ32_K, SCRATCH, 0, 2, 0),
            insn(MOV64_K, ANSWER, 0, 0, 0),
            insn(EXIT, 0, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> DeviceRule {
        DeviceRule {
            allow,
            kind: Some(kind.into()),
            major: Some(major),
            minor: Some(minor),
            access: Some(access.into()),
        }
    }

    /// What a container gets: nothing, then /dev/null, all mknod, ptys; and a later denial.
    fn usual() -> Vec<Rule> {
        let deny_all = DeviceRule {
            allow: false,
            access: Some("rwm".into()),
            ..DeviceRule::default()
        };
        parse(&[
            deny_all,
            rule(true, "c", -1, -1, "m"),
            rule(true, "b", -1, -1, "m"),
            rule(true, "c", 1, 3, "rwm"),
            rule(true, "c", 136, -1, "rw"),
            rule(true, "c", 195, 0, "r"),
            rule(true, "c", 195, 0, "w"),
            rule(true, "c", 4_000_000_000, 7, "rwm"),
            rule(false, "c", 136, 9, "w"),
        ])
        .unwrap()
    }

    /// An interpreter of the few instructions used; also proves that every path ends.
    fn run(program: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0u64; 11];
        let mut pc = 0usize;
        loop {
            let i = program[pc];
            let (dst, src) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
            pc += 1;
            let imm = i.imm as u32;
            let jump = match i.code {
                LDX_W => {
                    assert_eq!(src, usize::from(CONTEXT));
                    r[dst] = context[usize::try_from(i.off / 4).unwrap()].into();
                    false
                }
                AND32_K => {
                    r[dst] = u64::from(r[dst] as u32 & imm);
                    false
                }
                RSH32_K => {
                    r[dst] = u64::from(r[dst] as u32 >> imm);
                    false
                }
                MOV32_X => {
                    r[dst] = u64::from(r[src] as u32);
                    false
                }
                MOV64_K => {
                    r[dst] = i64::from(i.imm) as u64;
                    false
                }
                JEQ32_K => r[dst] as u32 == imm,
                JNE32_K => r[dst] as u32 != imm,
                EXIT => return r[0] == 1,
                other => panic!("opcode {other:#x}"),
            };
            if jump {
                pc += usize::try_from(i.off).unwrap();
            }
        }
    }

    /// The meaning, said once more without instructions.
    fn meaning(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE]
            .into_iter()
            .filter(|bit| access & u32::from(*bit) != 0)
            .all(|bit| {
                let matches = |r: &&Rule| {
                    let kinds = match r.kind {
                        Kind::All => true,
                        Kind::Block => kind == 1,
                        Kind::Char => kind == 2,
                    };
                    kinds
                        && r.access & bit != 0
                        && r.major.is_none_or(|n| n == major)
                        && r.minor.is_none_or(|n| n == minor)
                };
                rules.iter().rev().find(matches).is_some_and(|r| r.allow)
            })
    }

    #[test]
    fn the_program_answers_as_the_rules_mean() {
        let rules = usual();
        let program = program(&rules);
        for kind in [1, 2] {
            for access in 1..8 {
                for major in [1, 3, 136, 195, 4_000_000_000] {
                    for minor in [0, 3, 7, 9] {
                        let expected = meaning(&rules, kind, access, major, minor);
                        let got = run(&program, kind, access, major, minor);
                        assert_eq!(got, expected, "{kind} {access} {major}:{minor}");
                    }
                }
            }
        }
        assert!(
            run(&program, 2, 6, 195, 0),
            "read and write granted by two rules together"
        );
        assert!(run(&program, 2, 6, 136, 1) && !run(&program, 2, 4, 136, 9));
    }

    #[test]
    fn nothing_is_reachable_behind_a_rule_for_everything() {
        let deny = parse(&[rule(true, "c", 1, 3, "r"), rule(false, "a", -1, -1, "rwm")]).unwrap();
        assert_eq!(program(&deny).len(), 8);
        assert!(!run(&program(&deny), 2, 2, 1, 3));
        let allow = parse(&[rule(true, "a", -1, -1, "rwm")]).unwrap();
        assert!(run(&program(&allow), 1, 7, 8, 0));
    }

    #[test]
    fn v1_lines_keep_the_order_and_split_what_v1_cannot_say() {
        let rules = parse(&[
            rule(false, "a", -1, -1, "rwm"),
            rule(true, "a", 5, -1, "rw"),
            rule(true, "c", 1, 3, ""),
        ])
        .unwrap();
        let lines = v1_lines(&rules);
        let expected = [
            ("devices.deny", "a"),
            ("devices.allow", "b 5:* rw"),
            ("devices.allow", "c 5:* rw"),
            ("devices.allow", "c 1:3 rwm"),
        ];
        assert_eq!(lines, expected.map(|(f, l)| (f, l.to_string())));
    }

    #[test]
    fn senseless_rules_are_refused() {
        for bad in [
            rule(true, "x", 1, 1, "r"),
            rule(true, "c", -2, 1, "r"),
            rule(true, "c", 1, 1, "rq"),
        ] {
            assert!(parse(&[bad]).is_err());
        }
    }
}
