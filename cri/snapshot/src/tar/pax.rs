//! pax extended headers: the records, and what they change in a header. Knows no I/O.

use super::{Header, Time};
use std::collections::BTreeMap;

/// The prefix of a record that carries an extended attribute.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What is wrong with a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PaxError {
    /// Not `length key=value newline`.
    #[error("a pax record is malformed")]
    Malformed,
    /// A value that its key does not allow.
    #[error("the pax record {key} has a value that is not allowed")]
    Value {
        /// The key.
        key: String,
    },
    /// A sparse file: its contents are not what they seem.
    #[error("sparse files (pax {key}) are not supported")]
    Sparse {
        /// The key.
        key: String,
    },
}

/// Records by key; an empty value takes back what a global header said.
#[derive(Clone, Debug, Default)]
pub(super) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

impl Records {
    /// Reads the body of an extended header.
    pub(super) fn parse(mut body: &[u8]) -> Result<Records, PaxError> {
        let mut records = BTreeMap::new();
        while !body.is_empty() {
            // Some writers pad the body with NULs.
            if body.iter().all(|b| *b == 0) {
                break;
            }
            let blank = body
                .iter()
                .take(20)
                .position(|b| *b == b' ')
                .ok_or(PaxError::Malformed)?;
            let length = decimal(&body[..blank])
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| *n > blank + 1 && *n <= body.len())
                .ok_or(PaxError::Malformed)?;
            let (record, rest) = body.split_at(length);
            let record = record[blank + 1..]
                .strip_suffix(b"\n")
                .ok_or(PaxError::Malformed)?;
            let equals = record
                .iter()
                .position(|b| *b == b'=')
                .ok_or(PaxError::Malformed)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key.is_empty() || key.contains(&0) {
                return Err(PaxError::Malformed);
            }
            records.insert(key.to_vec(), value.to_vec());
            body = rest;
        }
        Ok(Records(records))
    }

    /// Later global headers add to and override earlier ones. What belongs to a single entry is not taken from
    /// one: a global path or size makes no sense, and a global link target is an attempt.
    pub(super) fn merge_global(&mut self, newer: Records) {
        for (key, value) in newer.0 {
            if matches!(key.as_slice(), b"mtime" | b"uid" | b"gid") {
                self.0.insert(key, value);
            }
        }
    }

    /// The size an extended header gives the entry: needed before the rest.
    pub(super) fn size(&self) -> Result<Option<u64>, PaxError> {
        match self.0.get(b"size".as_slice()) {
            None => Ok(None),
            Some(value) if value.is_empty() => Ok(None),
            Some(value) => decimal(value).map(Some).ok_or(PaxError::Value {
                key: "size".to_owned(),
            }),
        }
    }

    /// Applies everything but the size.
    pub(super) fn apply(&self, header: &mut Header) -> Result<(), PaxError> {
        for (key, value) in &self.0 {
            let bad = || PaxError::Value {
                key: String::from_utf8_lossy(key).chars().take(80).collect(),
            };
            if key.starts_with(b"GNU.sparse.") {
                return Err(PaxError::Sparse {
                    key: String::from_utf8_lossy(key).into_owned(),
                });
            }
            if let Some(name) = key.strip_prefix(XATTR) {
                if name.is_empty() {
                    return Err(bad());
                }
                header.xattrs.push((name.to_vec(), value.clone()));
                continue;
            }
            if value.is_empty() {
                continue;
            }
            match key.as_slice() {
                b"path" => header.path = no_nul(value).ok_or_else(bad)?,
                b"linkpath" => header.link = no_nul(value).ok_or_else(bad)?,
                b"uid" => header.uid = id(value).ok_or_else(bad)?,
                b"gid" => header.gid = id(value).ok_or_else(bad)?,
                b"mtime" => header.mtime = time(value).ok_or_else(bad)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Adds a record to be written.
    pub(super) fn put(&mut self, key: &[u8], value: Vec<u8>) {
        self.0.insert(key.to_vec(), value);
    }

    /// Adds an extended attribute to be written.
    pub(super) fn put_xattr(&mut self, name: &[u8], value: &[u8]) {
        self.0.insert([XATTR, name].concat(), value.to_vec());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The body of an extended header, by key.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (key, value) in &self.0 {
            let bare = key.len() + value.len() + 3; // blank, equals, newline
            // The length counts its own digits.
            let mut length = bare + 1;
            while bare + length.to_string().len() != length {
                length = bare + length.to_string().len();
            }
            body.extend_from_slice(format!("{length} ").as_bytes());
            body.extend_from_slice(key);
            body.push(b'=');
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        body
    }
}

fn no_nul(value: &[u8]) -> Option<Vec<u8>> {
    (!value.contains(&0)).then(|| value.to_vec())
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits)
        .ok()?
        .parse()
        .ok()
        .filter(|n| i64::try_from(*n).is_ok())
}

/// An owner; the largest value means "none" to the kernel.
fn id(value: &[u8]) -> Option<u32> {
    decimal(value)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|n| *n != u32::MAX)
}

fn time(value: &[u8]) -> Option<Time> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (whole, fraction) = match digits.iter().position(|b| *b == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &[][..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0u32, |n, place| {
        n * 10 + u32::from(fraction.get(place).unwrap_or(&b'0') - b'0')
    });
    Some(match (negative, nanos) {
        (false, _) => Time { seconds, nanos },
        (true, 0) => Time {
            seconds: -seconds,
            nanos: 0,
        },
        (true, _) => Time {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_the_digits_of_its_own_length() {
        for length in [1usize, 3, 4, 5, 85, 86, 87, 88, 89, 90, 980, 990, 995] {
            let mut records = Records::default();
            records.put(b"path", vec![b'x'; length]);
            let body = records.encode();
            let read = Records::parse(&body).unwrap();
            assert_eq!(read.0, records.0, "length {length}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=\n5",
            b"999 path=x\n",
            b"6 path\n",
            b"9 path=xy",
            b"-9 path=x\n",
            b"6 =xx\n",
        ] {
            assert!(Records::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
        let size = Records::parse(b"12 size=-1a\n").unwrap();
        assert!(size.size().is_err());
    }

    #[test]
    fn times_before_1970_and_fractions_are_read() {
        assert_eq!(
            time(b"1.5"),
            Some(Time {
                seconds: 1,
                nanos: 500_000_000
            })
        );
        assert_eq!(
            time(b"-1.25"),
            Some(Time {
                seconds: -2,
                nanos: 750_000_000
            })
        );
        assert_eq!(
            time(b"-3"),
            Some(Time {
                seconds: -3,
                nanos: 0
            })
        );
        assert_eq!(
            time(b"1.1234567899"),
            Some(Time {
                seconds: 1,
                nanos: 123_456_789
            })
        );
        assert_eq!(time(b"1e3"), None);
    }

    #[test]
    fn a_global_header_cannot_give_every_entry_one_path_or_size() {
        let mut global = Records::default();
        global.merge_global(Records::parse(b"10 path=x\n9 size=5\n8 uid=7\n").unwrap_or_default());
        global.merge_global(Records::parse(b"9 uid=42\n").unwrap());
        let mut header = Header::new("a", super::super::Kind::File);
        global.apply(&mut header).unwrap();
        assert_eq!((header.path.as_slice(), header.uid), (b"a".as_slice(), 42));
        assert_eq!(global.size().unwrap(), None);
    }
}
