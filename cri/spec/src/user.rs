//! Who a container's process is: users and groups looked up in the image's passwd and group files.
//!
//! Those files are the image author's: they may be huge, malformed, or hold ids that overflow.
//! Nothing here reads a file or writes one (a HOME with a newline in it therefore cannot reach
//! anybody's passwd file).

use crate::input::{SupplementalGroupsPolicy, UserSpec};

/// Largest passwd or group file that is looked at, in bytes (CVE-2026-47262).
pub const FILE_LIMIT: usize = 4 << 20;

/// Largest id: the kernel takes -1 as "unchanged", and ids from 2^31 become negative or wrap to
/// root in too many programs (CVE-2024-40635, CVE-2026-46680).
const MAX_ID: u32 = i32::MAX as u32;

/// The kernel's NGROUPS_MAX.
const MAX_GROUPS: usize = 65_536;

/// Longest line that is looked at; a member list of a thousand names fits.
const MAX_LINE: usize = 64 << 10;

/// A user the container's process can be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups: the primary one first (CVE-2022-2995), then the image's, then those
    /// asked for; no duplicates.
    pub additional_gids: Vec<u32>,
    /// Home directory from the passwd file; `/` when it has none that is an absolute path.
    pub home: String,
    /// Login name, when the passwd file has one for this uid.
    pub name: Option<String>,
}

/// Why a user cannot be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserError {
    /// A numeric id that is none.
    #[error("{what} {value} is outside 0..=2147483647")]
    OutOfRange {
        /// Which id ("user", "group", …).
        what: &'static str,
        /// As written.
        value: String,
    },
    /// A login name that the image's passwd file does not have.
    #[error("user {0:?} is not in the image's /etc/passwd")]
    NoSuchUser(String),
    /// A group name that the image's group file does not have.
    #[error("group {0:?} is not in the image's /etc/group")]
    NoSuchGroup(String),
    /// run_as_group without a user (the CRI contract makes it an error).
    #[error("run_as_group {0} needs run_as_user or run_as_username")]
    GroupWithoutUser(i64),
    /// Not a user: empty parts, more than one colon.
    #[error("{0:?} is not of the form user[:group]")]
    Malformed(String),
    /// A file beyond [`FILE_LIMIT`].
    #[error("the image's {file} has {size} bytes, more than the {FILE_LIMIT} that are looked at")]
    TooBig {
        /// `/etc/passwd` or `/etc/group`.
        file: &'static str,
        /// Its size.
        size: usize,
    },
    /// More groups than the kernel takes.
    #[error("{0} supplementary groups are more than the kernel's 65536")]
    TooManyGroups(usize),
}

/// Resolves a user against an image's passwd and group files (empty when it has none).
///
/// # Errors
/// Unknown names, ids of 2^31 and above, files beyond [`FILE_LIMIT`].
pub fn resolve(spec: &UserSpec, passwd: &[u8], group: &[u8]) -> Result<ResolvedUser, UserError> {
    for (file, bytes) in [("/etc/passwd", passwd), ("/etc/group", group)] {
        if bytes.len() > FILE_LIMIT {
            return Err(UserError::TooBig {
                file,
                size: bytes.len(),
            });
        }
    }
    let (user, image_group) = wanted(spec)?;
    let entry = match &user {
        Wanted::Id(uid) => passwd_entries(passwd).find(|e| e.uid == Ok(*uid)),
        Wanted::Name(name) => {
            let found = passwd_entries(passwd).find(|e| e.name == *name);
            Some(found.ok_or_else(|| UserError::NoSuchUser(name.clone()))?)
        }
    };
    let uid = match (&user, &entry) {
        (Wanted::Id(uid), _) => *uid,
        (Wanted::Name(_), Some(e)) => e.uid.map_err(|v| UserError::OutOfRange {
            what: "uid of the image's user",
            value: v.to_owned(),
        })?,
        (Wanted::Name(name), None) => return Err(UserError::NoSuchUser(name.clone())),
    };
    let gid = match (image_group, &entry) {
        (Some(Wanted::Id(gid)), _) => gid,
        (Some(Wanted::Name(name)), _) => group_by_name(group, &name)?,
        (None, Some(e)) => e.gid.map_err(|v| UserError::OutOfRange {
            what: "gid of the image's user",
            value: v.to_owned(),
        })?,
        (None, None) => 0,
    };

    let name = entry.as_ref().map(|e| e.name.to_owned());
    let mut gids = vec![gid];
    if spec.policy == SupplementalGroupsPolicy::Merge
        && let Some(name) = &name
    {
        gids.extend(groups_of(group, name));
    }
    for id in &spec.supplemental_groups {
        gids.push(checked("supplemental group", *id)?);
    }
    let gids = unique(gids);
    if gids.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups(gids.len()));
    }
    let home = entry.as_ref().map_or("/", |e| e.home);
    Ok(ResolvedUser {
        uid,
        gid,
        additional_gids: gids,
        home: absolute_or_root(home),
        name,
    })
}

enum Wanted {
    Id(u32),
    Name(String),
}

/// Whom the request and the image ask for; the group only where it was said.
fn wanted(spec: &UserSpec) -> Result<(Wanted, Option<Wanted>), UserError> {
    let group = spec
        .gid
        .map(|g| checked("run_as_group", g))
        .transpose()?
        .map(Wanted::Id);
    let username = spec.username.as_deref().filter(|n| !n.is_empty());
    match (username, spec.uid) {
        (Some(name), _) => Ok((one(name, "user")?, group)),
        (None, Some(uid)) => Ok((Wanted::Id(checked("run_as_user", uid)?), group)),
        (None, None) => match spec.gid {
            Some(gid) => Err(UserError::GroupWithoutUser(gid)),
            None => of_image(&spec.image_user),
        },
    }
}

/// `user[:group]` as images write it; empty is root.
fn of_image(text: &str) -> Result<(Wanted, Option<Wanted>), UserError> {
    if text.is_empty() {
        return Ok((Wanted::Id(0), None));
    }
    let (user, group) = match text.split_once(':') {
        Some((_, g)) if g.contains(':') => return Err(UserError::Malformed(text.to_owned())),
        Some((u, g)) => (u, Some(g)),
        None => (text, None),
    };
    // ":group" and "user:" occur in the wild: an empty part is what was not said.
    let user = if user.is_empty() {
        Wanted::Id(0)
    } else {
        one(user, "user")?
    };
    let group = group
        .filter(|g| !g.is_empty())
        .map(|g| one(g, "group"))
        .transpose()?;
    Ok((user, group))
}

/// A name, or digits, which are always an id: never a name that happens to look like one.
fn one(text: &str, what: &'static str) -> Result<Wanted, UserError> {
    if text.bytes().any(|b| b == b':' || b < 0x20 || b == 0x7f) {
        return Err(UserError::Malformed(text.to_owned()));
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(Wanted::Name(text.to_owned()));
    }
    let id = text
        .parse::<u32>()
        .ok()
        .filter(|id| *id <= MAX_ID && digits.len() == text.len());
    id.map(Wanted::Id).ok_or_else(|| UserError::OutOfRange {
        what,
        value: text.to_owned(),
    })
}

fn checked(what: &'static str, id: i64) -> Result<u32, UserError> {
    u32::try_from(id)
        .ok()
        .filter(|id| *id <= MAX_ID)
        .ok_or_else(|| UserError::OutOfRange {
            what,
            value: id.to_string(),
        })
}

struct Entry<'a> {
    name: &'a str,
    uid: Result<u32, &'a str>,
    gid: Result<u32, &'a str>,
    home: &'a str,
}

/// Lines that are text of sane length; comments and NIS includes are not entries.
fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|b| *b == b'\n')
        .filter(|l| !l.is_empty() && l.len() <= MAX_LINE)
        .filter_map(|l| std::str::from_utf8(l).ok())
        .map(|l| l.trim_end_matches('\r'))
        .filter(|l| !l.starts_with(['#', '+', '-', ':']))
}

fn passwd_entries(file: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?;
        let gid = fields.next()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Entry {
            name,
            uid: file_id(uid),
            gid: file_id(gid),
            home,
        })
    })
}

/// An id in a file; the text itself when it is none, so that only its user is refused.
fn file_id(text: &str) -> Result<u32, &str> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse::<u32>()
        .ok()
        .filter(|id| digits && *id <= MAX_ID)
        .ok_or(text)
}

fn group_by_name(file: &[u8], name: &str) -> Result<u32, UserError> {
    for line in lines(file) {
        let mut fields = line.split(':');
        if fields.next() == Some(name) {
            let gid = fields.nth(1).unwrap_or("");
            return file_id(gid).map_err(|v| UserError::OutOfRange {
                what: "gid of the image's group",
                value: v.to_owned(),
            });
        }
    }
    Err(UserError::NoSuchGroup(name.to_owned()))
}

/// Groups that list this user as a member; entries with impossible ids are passed over.
fn groups_of<'a>(file: &'a [u8], user: &'a str) -> impl Iterator<Item = u32> + 'a {
    lines(file).filter_map(move |line| {
        let mut fields = line.split(':');
        let gid = fields.nth(2)?;
        let member = fields.next()?.split(',').any(|m| m.trim() == user);
        if member { file_id(gid).ok() } else { None }
    })
}

fn unique(ids: Vec<u32>) -> Vec<u32> {
    let mut seen = std::collections::HashSet::with_capacity(ids.len());
    ids.into_iter().filter(|id| seen.insert(*id)).collect()
}

fn absolute_or_root(home: &str) -> String {
    let sound = home.starts_with('/') && !home.bytes().any(|b| b < 0x20 || b == 0x7f);
    if sound { home.to_owned() } else { "/".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        app:x:1000:1001:App:/home/app:/bin/sh\n\
        nohome:x:1002:1002::relative:/bin/sh\n\
        huge:x:4294967296:0::/:/bin/sh\n\
        two31:x:2147483648:0::/:/bin/sh\n\
        broken line\n\
        \xff\xfe:x:5:5::/:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nstaff:x:50:app,other\napp:x:1001:\nvideo:x:44:other, app\nbig:x:4294967295:app\n";

    fn image(user: &str) -> UserSpec {
        UserSpec {
            image_user: user.to_owned(),
            ..UserSpec::default()
        }
    }

    fn ids(spec: &UserSpec) -> (u32, u32, Vec<u32>) {
        let u = resolve(spec, PASSWD, GROUP).unwrap();
        (u.uid, u.gid, u.additional_gids)
    }

    #[test]
    fn an_image_without_a_user_runs_as_root() {
        let user = resolve(&image(""), PASSWD, GROUP).unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (0, 0, "/root"));
        assert_eq!(user.additional_gids, [0]);
    }

    #[test]
    fn every_form_of_an_images_user_resolves() {
        assert_eq!(ids(&image("app")), (1000, 1001, vec![1001, 50, 44]));
        assert_eq!(ids(&image("1000")), (1000, 1001, vec![1001, 50, 44]));
        assert_eq!(ids(&image("app:staff")), (1000, 50, vec![50, 44]));
        assert_eq!(ids(&image("1000:7")), (1000, 7, vec![7, 50, 44]));
        assert_eq!(ids(&image("3000:staff")), (3000, 50, vec![50]));
        assert_eq!(ids(&image("3000")), (3000, 0, vec![0]));
        assert_eq!(ids(&image(":staff")), (0, 50, vec![50]));
    }

    #[test]
    fn the_request_overrides_the_image_and_its_group() {
        let spec = UserSpec {
            uid: Some(1000),
            ..image("root:staff")
        };
        assert_eq!(ids(&spec), (1000, 1001, vec![1001, 50, 44]));
        let spec = UserSpec {
            username: Some("app".into()),
            gid: Some(9),
            ..image("root")
        };
        assert_eq!(ids(&spec), (1000, 9, vec![9, 50, 44]));
    }

    #[test]
    fn a_group_without_a_user_is_refused() {
        let spec = UserSpec {
            gid: Some(9),
            ..image("app")
        };
        assert_eq!(resolve(&spec, PASSWD, GROUP), Err(UserError::GroupWithoutUser(9)));
    }

    #[test]
    fn strict_policy_leaves_the_images_groups_out() {
        let spec = UserSpec {
            uid: Some(1000),
            supplemental_groups: vec![2000, 44, 2000],
            policy: SupplementalGroupsPolicy::Strict,
            ..UserSpec::default()
        };
        assert_eq!(ids(&spec), (1000, 1001, vec![1001, 2000, 44]));
        let merged = UserSpec {
            policy: SupplementalGroupsPolicy::Merge,
            ..spec
        };
        assert_eq!(ids(&merged), (1000, 1001, vec![1001, 50, 44, 2000]));
    }

    /// CVE-2024-40635 and CVE-2026-46680: ids that wrap to root or go negative.
    #[test]
    fn ids_from_two_to_the_31_on_are_refused_wherever_they_come_from() {
        for text in [
            "2147483648",
            "4294967295",
            "4294967296",
            "18446744073709551616",
            "-1",
            "+5",
            "0:2147483648",
        ] {
            let err = resolve(&image(text), PASSWD, GROUP).unwrap_err();
            assert!(matches!(err, UserError::OutOfRange { .. }), "{text}: {err}");
        }
        for name in ["huge", "two31", "root:big"] {
            let err = resolve(&image(name), PASSWD, GROUP).unwrap_err();
            assert!(matches!(err, UserError::OutOfRange { .. }), "{name}: {err}");
        }
        for uid in [-1, 1 << 31, 1 << 32, i64::MAX] {
            let spec = UserSpec {
                uid: Some(uid),
                ..UserSpec::default()
            };
            assert!(resolve(&spec, PASSWD, GROUP).is_err());
            let spec = UserSpec {
                uid: Some(1),
                supplemental_groups: vec![uid],
                ..UserSpec::default()
            };
            assert!(resolve(&spec, PASSWD, GROUP).is_err());
        }
        assert_eq!(ids(&image("2147483647")), (2_147_483_647, 0, vec![0]));
    }

    #[test]
    fn unknown_names_and_malformed_users_are_refused() {
        assert_eq!(
            resolve(&image("bob"), PASSWD, GROUP),
            Err(UserError::NoSuchUser("bob".into()))
        );
        assert_eq!(
            resolve(&image("app:bobs"), PASSWD, GROUP),
            Err(UserError::NoSuchGroup("bobs".into()))
        );
        assert!(matches!(
            resolve(&image("a:b:c"), PASSWD, GROUP),
            Err(UserError::Malformed(_))
        ));
        assert!(matches!(
            resolve(&image("a\nb"), PASSWD, GROUP),
            Err(UserError::Malformed(_))
        ));
    }

    #[test]
    fn a_numeric_user_needs_no_passwd_file() {
        assert_eq!(resolve(&image("1000"), b"", b"").unwrap().gid, 0);
        assert_eq!(resolve(&image("1000"), b"", b"").unwrap().home, "/");
    }

    /// CVE-2026-47262.
    #[test]
    fn huge_files_are_refused_and_long_lines_passed_over() {
        let big = vec![b'a'; FILE_LIMIT + 1];
        assert!(matches!(
            resolve(&image("app"), &big, b""),
            Err(UserError::TooBig { .. })
        ));
        let mut long = b"app:x:1:1:".to_vec();
        long.extend(std::iter::repeat_n(b'x', MAX_LINE));
        long.extend(b":/:/bin/sh\napp:x:7:8::/h:\n");
        assert_eq!(resolve(&image("app"), &long, b"").unwrap().uid, 7);
    }

    #[test]
    fn a_home_that_is_no_absolute_path_becomes_the_root() {
        assert_eq!(resolve(&image("nohome"), PASSWD, GROUP).unwrap().home, "/");
        let passwd = b"a:x:1:1::/ho\x07me:/bin/sh\n";
        assert_eq!(resolve(&image("a"), passwd, b"").unwrap().home, "/");
    }
}
