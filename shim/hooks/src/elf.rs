//! What a libcuda made for forward compatibility says about itself: a note in its file.

use std::fs::File;

use object::read::elf::{ElfFile64, FileHeader, SectionHeader};
use object::{Endianness, ReadCache};
use serde::Deserialize;

/// The note's section.
const SECTION: &[u8] = b".note.cuda.fwd_compatibility";
const NAME: &[u8] = b"NVIDIA Corporation";
/// A larger note is not one.
const MAX_NOTE: u64 = 64 << 10;

/// The note.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Note {
    /// The CUDA that the library brings.
    #[serde(default, rename = "CUDA Version")]
    pub cuda: String,
    /// The major versions of drivers that it runs on.
    #[serde(default, rename = "Driver")]
    pub drivers: Vec<u64>,
}

/// The note in a file; none also where the file is no library. The file is an image's, so nothing is believed about it.
pub fn note(file: File) -> Option<Note> {
    let cache = ReadCache::new(file);
    let elf = ElfFile64::<Endianness, _>::parse(&cache).ok()?;
    let endian = elf.endian();
    let header = elf.elf_header();
    let sections = header.sections(endian, &cache).ok()?;
    let (_, section) = sections.section_by_name(endian, SECTION)?;
    if section.sh_size(endian) > MAX_NOTE {
        return None;
    }
    let mut notes = section.notes(endian, &cache).ok()??;
    while let Ok(Some(note)) = notes.next() {
        if note.name() == NAME {
            let text = note.desc();
            let end = text.iter().rposition(|b| *b != 0).map_or(0, |n| n + 1);
            return serde_json::from_slice(&text[..end]).ok();
        }
    }
    None
}
