//! `--chmod`: octal and symbolic modes, as POSIX chmod(1) has them. Knows no files.

use serde::Serialize;

// All the bits a mode can have: setuid, setgid, sticky and the nine permissions.
const ALL: u32 = 0o7777;

/// A mode to give to copied files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Chmod {
    /// Permission bits, setuid, setgid and sticky: at most 0o7777.
    Octal(u32),
    /// `u+rwX,go=r`: [`Chmod::apply`] says what it makes of a mode.
    Symbolic(String),
}

impl Chmod {
    /// Reads a mode.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Chmod, &'static str> {
        const OCTAL: &str = "an octal mode lies between 0 and 07777";
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            let mode = u32::from_str_radix(text, 8).map_err(|_| OCTAL)?;
            return if mode <= ALL {
                Ok(Chmod::Octal(mode))
            } else {
                Err(OCTAL)
            };
        }
        match applied(text, 0, false) {
            Some(_) => Ok(Chmod::Symbolic(text.to_owned())),
            None => Err("it is neither octal nor symbolic like u+rwX,go=r"),
        }
    }

    /// The mode that a file of mode `mode` gets. Bits beyond 0o7777 stay as they are.
    pub fn apply(&self, mode: u32, is_directory: bool) -> u32 {
        let permissions = match self {
            Chmod::Octal(octal) => *octal,
            // Checked when it was made.
            Chmod::Symbolic(text) => applied(text, mode & ALL, is_directory).unwrap_or(mode & ALL),
        };
        mode & !ALL | permissions
    }
}

/// What a symbolic mode makes of `mode`, the umask being 0; None where it is malformed.
fn applied(text: &str, mut mode: u32, is_directory: bool) -> Option<u32> {
    let before = mode;
    for clause in text.split(',') {
        let actions = clause.find(['+', '-', '='])?;
        let (who, mut rest) = clause.split_at(actions);
        // The bits of each class, with the class's own special bit.
        let class = |c| match c {
            'u' => Some(0o4700),
            'g' => Some(0o2070),
            'o' => Some(0o0007),
            'a' => Some(0o6777),
            _ => None,
        };
        let named = who.chars().try_fold(0, |bits, c| Some(bits | class(c)?))?;
        let allowed = match who.is_empty() {
            true => 0o7777,
            // The sticky bit goes with everybody but "other" alone.
            false => named | if named & !0o0007 != 0 { 0o1000 } else { 0 },
        };
        while let Some(operator) = rest.chars().next() {
            rest = &rest[1..];
            let end = rest.find(['+', '-', '=']).unwrap_or(rest.len());
            let (permissions, after) = rest.split_at(end);
            rest = after;
            let mut bits = 0;
            for permission in permissions.chars() {
                bits |= match permission {
                    'r' => 0o444,
                    'w' => 0o222,
                    'x' => 0o111,
                    'X' if is_directory || before & 0o111 != 0 || operator == '-' => 0o111,
                    'X' => 0,
                    's' => 0o6000,
                    't' => 0o1000,
                    'u' => spread(mode >> 6),
                    'g' => spread(mode >> 3),
                    'o' => spread(mode),
                    _ => return None,
                };
            }
            let bits = bits & allowed;
            mode = match operator {
                '+' => mode | bits,
                '-' => mode & !bits,
                // `=` leaves sticky alone unless it is named.
                '=' => mode & !(allowed & 0o6777 | bits) | bits,
                _ => return None,
            };
        }
    }
    Some(mode)
}

fn spread(class: u32) -> u32 {
    (class & 7) * 0o111
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(text: &str, mode: u32, is_directory: bool) -> u32 {
        Chmod::parse(text).unwrap().apply(mode, is_directory)
    }

    #[test]
    fn modes_are_those_of_chmod() {
        for (text, before, after) in [
            ("755", 0o644, 0o755),
            ("4755", 0o644, 0o4755),
            ("u+x", 0o644, 0o744),
            ("+x", 0o644, 0o755),
            ("a=r", 0o777, 0o444),
            ("go-w", 0o666, 0o644),
            ("u=rwx,go=rx", 0o600, 0o755),
            ("go=u-w", 0o740, 0o755),
            ("u+s", 0o755, 0o4755),
            ("g+s", 0o755, 0o2755),
            ("+t", 0o777, 0o1777),
            ("o+t", 0o777, 0o777),
            ("+X", 0o644, 0o644),
            ("+X", 0o744, 0o755),
            ("u=", 0o755, 0o055),
            ("g=u,o=", 0o750, 0o770),
            ("u+r-w", 0o200, 0o400),
        ] {
            assert_eq!(apply(text, before, false), after, "{text} on {before:o}");
        }
        assert_eq!(apply("=rX", 0o600, true), 0o555);
        assert_eq!(apply("u+x", 0o100644, false), 0o100744);
    }

    #[test]
    fn what_is_no_mode_is_refused() {
        for text in ["", "999", "10000", "8", "u", "u+q", "z+x", "u+x,", "07x"] {
            assert!(Chmod::parse(text).is_err(), "{text}");
        }
    }
}
