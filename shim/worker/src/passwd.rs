//! A user's home directory, read from the image's own `/etc/passwd` by our own code: libc's lookup would load libraries
//! from the container.

use slipway_sys::root::Root;
use std::path::Path;

/// A passwd file larger than this is not one (CVE-2026-47262).
const MAX_PASSWD: usize = 1 << 20;

/// The home of a user, "/" when the image does not know it or says something that cannot be one.
pub fn home(root: &Root, uid: u32) -> String {
    let text = root
        .read(Path::new("/etc/passwd"), MAX_PASSWD)
        .ok()
        .flatten()
        .unwrap_or_default();
    find(&String::from_utf8_lossy(&text), uid)
        .unwrap_or("/")
        .to_string()
}

fn find(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let same = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (same && home.starts_with('/') && !home.contains(char::is_control)).then_some(home)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_the_sixth_field_of_the_users_line() {
        let text =
            "root:x:0:0:root:/root:/bin/sh\nbad:x:7\nu:x:1000:1000::/home/u:/bin/sh\nv:x:5:5::relative:\n";
        assert_eq!(find(text, 0), Some("/root"));
        assert_eq!(find(text, 1000), Some("/home/u"));
        assert_eq!(find(text, 5), None);
        assert_eq!(find(text, 7), None);
    }
}
