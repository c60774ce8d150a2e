//! Who owns what is copied: `--chown` and `USER` looked up in an image's passwd and group files.

use slipway_snapshot::Root;

use super::CopyError;

/// Passwd and group files larger than this are refused (CVE-2026-47262).
pub const FILE_LIMIT: usize = 10 << 20;

/// User and group numbers.
pub type Ids = (u32, u32);

/// Who asks: for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    /// `--chown` of a COPY or ADD.
    Chown(&'a str),
    /// USER.
    User(&'a str),
}

impl std::fmt::Display for Asked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Asked::Chown(value) => write!(f, "--chown={value}"),
            Asked::User(value) => write!(f, "USER {value}"),
        }
    }
}

/// Resolves `user[:group]` as BuildKit does: a number alone is user and group, a name brings its own group, an explicit
/// group wins.
///
/// # Errors
/// When a name is not in the image, or a number is out of range.
pub fn resolve(root: &Root, value: Asked<'_>) -> Result<Ids, CopyError> {
    let (Asked::Chown(text) | Asked::User(text)) = value;
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (text, None),
    };
    let (uid, own_gid) = match number(value, user)? {
        Some(uid) => (uid, uid),
        None => by_name(root, value, user, "/etc/passwd", 4)
            .and_then(|fields| Ok((field(value, fields.first())?, field(value, fields.get(1))?)))?,
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match number(value, group)? {
            Some(gid) => gid,
            None => field(value, by_name(root, value, group, "/etc/group", 3)?.first())?,
        },
    };
    Ok((uid, gid))
}

/// A number, `root`, or `None` for a name.
fn number(value: Asked<'_>, text: &str) -> Result<Option<u32>, CopyError> {
    if text == "root" || text.is_empty() {
        return Ok(Some(0));
    }
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    // Ids of 2^31 and more wrap around in programs that hold them in an int (CVE-2024-40635).
    match text.parse::<u32>() {
        Ok(id) if id < 1 << 31 => Ok(Some(id)),
        _ => Err(CopyError::BadOwner {
            asked: value.to_string(),
            reason: "ids end at 2147483647",
        }),
    }
}

fn field(value: Asked<'_>, text: Option<&String>) -> Result<u32, CopyError> {
    let id = text
        .and_then(|t| t.parse::<u32>().ok())
        .filter(|id| *id < 1 << 31);
    id.ok_or(CopyError::BadOwner {
        asked: value.to_string(),
        reason: "its entry in the image holds no valid id",
    })
}

/// The fields from the third on (ids) of the line that `name` has in `file`.
fn by_name(
    root: &Root,
    value: Asked<'_>,
    name: &str,
    file: &'static str,
    fields: usize,
) -> Result<Vec<String>, CopyError> {
    let unknown = || CopyError::UnknownOwner {
        asked: value.to_string(),
        name: name.to_owned(),
        file,
    };
    let content = root
        .read(file.as_ref(), FILE_LIMIT)
        .map_err(|e| CopyError::at("read", "the image", file.as_ref(), e))?
        .ok_or_else(unknown)?;
    String::from_utf8_lossy(&content)
        .lines()
        .map(|line| line.trim().split(':').map(str::to_owned).collect::<Vec<_>>())
        .find(|line| line.len() >= fields.min(3) && line[0] == name)
        .map(|line| line[2..].to_vec())
        .ok_or_else(unknown)
}
