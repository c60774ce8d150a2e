//! Percent signs in URLs.

/// `%41` → `A`; what is no escape stays.
pub(crate) fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| bytes.get(at + 1..at + 3)).flatten();
        let digit = |d: &u8| (*d as char).to_digit(16);
        match hex.and_then(|hex| Some(digit(&hex[0])? * 16 + digit(&hex[1])?)) {
            Some(byte) => {
                out.push(byte as u8);
                at += 3;
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
    use super::decoded;

    #[test]
    fn only_whole_escapes_are_decoded() {
        assert_eq!(decoded("a%20b%C3%a9%2"), "a bé%2");
        assert_eq!(decoded("%zz%+1"), "%zz%+1");
    }
}
