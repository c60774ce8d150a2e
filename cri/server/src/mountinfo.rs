//! What is mounted below a directory, from /proc/self/mountinfo.

use std::path::{Path, PathBuf};

use crate::error::Error;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Mount points at and below `dir`, the newest first: the order in which they can be unmounted.
pub fn below(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let text = std::fs::read_to_string(MOUNTINFO).map_err(Error::io("read", MOUNTINFO))?;
    let mut points = parse(&text, dir);
    points.reverse();
    Ok(points)
}

fn parse(text: &str, dir: &Path) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(dir))
        .collect()
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok())
        {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_below_is_listed_and_escapes_are_read() {
        let text = "30 25 0:26 / /run rw - tmpfs tmpfs rw\n\
                    31 30 0:27 / /run/slip\\040way/pods rw - tmpfs tmpfs rw\n\
                    32 30 0:27 / /run/slip rw - tmpfs tmpfs rw\n";
        assert_eq!(
            parse(text, Path::new("/run/slip way")),
            [PathBuf::from("/run/slip way/pods")]
        );
        assert_eq!(parse(text, Path::new("/run/slip")), [PathBuf::from("/run/slip")]);
    }
}
