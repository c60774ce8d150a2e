//! The names and values a peer opens a stream with.

/// Header fields, their names in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The value of `name`, which is given in lower case; the empty string when there is none.
    pub fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value.as_str())
    }
}
