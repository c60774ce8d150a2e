//! Random bytes that are the same in every run, and what is done with them to anything that reads bytes from outside.
//!
//! `make fuzz ROUNDS=1000000 SEED=7` looks for longer, and elsewhere: `NOISE_ROUNDS` and `NOISE_SEED`.

/// SplitMix64.
pub(crate) struct Noise(pub u64);

impl Noise {
    /// The noise of one test.
    #[cfg(test)]
    pub fn of(test: u64) -> Noise {
        Noise(test ^ number("NOISE_SEED").unwrap_or(0).rotate_left(32))
    }

    /// How many rounds a test makes that usually makes so many.
    #[cfg(test)]
    pub fn rounds(usually: u64) -> u64 {
        number("NOISE_ROUNDS").unwrap_or(usually)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    #[cfg(test)]
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// `bytes` with a few of them changed, removed, repeated or made up.
    #[cfg(test)]
    pub fn damage(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut damaged = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(damaged.len());
            let count = self.below(16).min(damaged.len() - at);
            match self.below(5) {
                0 if !damaged.is_empty() => damaged[at] ^= 1 << self.below(8),
                1 if !damaged.is_empty() => damaged[at] = self.next() as u8,
                2 => drop(damaged.drain(at..at + count)),
                3 => {
                    let again = damaged[at..at + count].to_vec();
                    damaged.splice(at..at, again);
                }
                _ => drop(damaged.splice(at..at + count, self.bytes(count))),
            }
        }
        damaged
    }
}

/// Writes what a fuzzer starts from into a folder of this name below `CORPUS`.
#[cfg(test)]
pub(crate) fn corpus(name: &str, mut make: impl FnMut(&mut Noise) -> Vec<u8>) {
    let dir = std::env::var_os("CORPUS").expect("CORPUS names a folder");
    let dir = std::path::Path::new(&dir).join(name);
    std::fs::create_dir_all(&dir).expect("a folder");
    for n in 0..64 {
        let mut noise = Noise(n);
        let mut bytes = make(&mut noise);
        // How it is cut, read and answered.
        bytes.extend(noise.bytes(8));
        std::fs::write(dir.join(format!("{n:02}")), bytes).expect("a file");
    }
}

#[cfg(test)]
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}
