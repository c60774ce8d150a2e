//! Golden lines, and what happens when the disk is full.

use super::*;
use std::io::Write as _;

const AT: i64 = 1_767_225_600_000_000_000;
const T: &str = "2026-01-01T00:00:00.000000000Z";

fn lines(chunks: &[&[u8]]) -> String {
    let mut out = Vec::new();
    let mut splitter = Splitter::new(Source::Stdout);
    for chunk in chunks {
        splitter.feed(chunk, AT, &mut out);
    }
    splitter.finish(AT, &mut out);
    String::from_utf8(out).expect("text")
}

#[test]
fn whole_lines_are_written_as_cri_wants_them() {
    assert_eq!(
        lines(&[b"one\ntwo\n\n"]),
        format!("{T} stdout F one\n{T} stdout F two\n{T} stdout F \n")
    );
}

#[test]
fn a_line_that_comes_in_pieces_is_one_line() {
    assert_eq!(
        lines(&[b"o", b"n", b"e\nt", b"wo", b"\n"]),
        format!("{T} stdout F one\n{T} stdout F two\n")
    );
}

#[test]
fn the_end_of_a_stream_in_the_middle_of_a_line_is_a_partial_line() {
    assert_eq!(lines(&[b"no end"]), format!("{T} stdout P no end\n"));
}

#[test]
fn a_carriage_return_before_the_line_feed_goes_also_across_chunks() {
    assert_eq!(
        lines(&[b"a\r\nb\r", b"\nc\rd\n"]),
        format!("{T} stdout F a\n{T} stdout F b\n{T} stdout F c\rd\n")
    );
}

#[test]
fn a_line_of_exactly_the_limit_is_whole_and_one_byte_more_is_two() {
    let full = vec![b'x'; MAX_LINE];
    let text = String::from_utf8(full.clone()).expect("text");
    assert_eq!(lines(&[&full, b"\n"]), format!("{T} stdout F {text}\n"));
    assert_eq!(
        lines(&[&full, b"y\n"]),
        format!("{T} stdout P {text}\n{T} stdout F y\n")
    );
    let whole: Vec<u8> = [full.as_slice(), b"y\n"].concat();
    assert_eq!(lines(&[&whole]), format!("{T} stdout P {text}\n{T} stdout F y\n"));
}

#[test]
fn a_line_feed_is_found_wherever_it_is() {
    for length in 0..40 {
        let mut bytes = vec![0x0b; length];
        assert_eq!(line_feed(&bytes), None);
        for at in (0..length).rev() {
            bytes[at] = b'\n';
            assert_eq!(line_feed(&bytes), Some(at), "{length}");
        }
    }
    assert_eq!(
        line_feed(&[0xff, 0x8a, 0x09, 0x0b, 0x00, 0x80, 0x0a, 0x0a]),
        Some(6)
    );
}

#[test]
fn an_endless_line_holds_no_more_than_one_part() {
    let mut splitter = Splitter::new(Source::Stderr);
    let mut out = Vec::new();
    let chunk = vec![b'z'; 5000];
    for _ in 0..1000 {
        splitter.feed(&chunk, AT, &mut out);
        assert!(splitter.held.len() <= MAX_LINE && splitter.held.capacity() <= 2 * MAX_LINE);
        out.clear();
    }
}

#[test]
fn an_idle_stream_keeps_no_memory() {
    let mut splitter = Splitter::new(Source::Stdout);
    let mut out = Vec::new();
    splitter.feed(b"begin", AT, &mut out);
    splitter.feed(b" end\n", AT, &mut out);
    assert_eq!(splitter.held.capacity(), 0);
}

#[test]
fn a_renamed_log_goes_on_in_a_new_file_and_loses_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, old) = (dir.path().join("0.log"), dir.path().join("0.log.1"));
    let mut log = LogFile::open(&path).expect("made");
    log.write(b"a\n");
    std::fs::rename(&path, &old).expect("renamed");
    log.write(b"b\n");
    log.reopen().expect("reopened");
    log.write(b"c\n");
    assert_eq!(std::fs::read(&old).expect("old"), b"a\nb\n");
    assert_eq!(std::fs::read(&path).expect("new"), b"c\n");
}

#[test]
fn a_log_that_cannot_be_reopened_creates_nothing_and_is_written_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let sub = dir.path().join("pod");
    std::fs::create_dir(&sub).expect("made");
    let path = sub.join("0.log");
    let mut log = LogFile::open(&path).expect("made");
    let moved = dir.path().join("moved");
    std::fs::rename(&sub, &moved).expect("renamed");
    assert_eq!(
        log.reopen().expect_err("no directory").kind(),
        io::ErrorKind::NotFound
    );
    assert!(!sub.exists());
    assert!(!log.write(b"still\n"));
    assert_eq!(std::fs::read(moved.join("0.log")).expect("old"), b"still\n");
}

#[test]
fn a_log_path_that_is_a_fifo_or_a_link_is_refused_without_waiting() {
    let dir = tempfile::tempdir().expect("a directory");
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a fifo");
    assert!(LogFile::open(&fifo).is_err());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("target", &link).expect("a link");
    assert!(LogFile::open(&link).is_err());
    assert!(!dir.path().join("target").exists());
}

/// A mount of a tiny file system that goes with the value.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn new() -> Option<Tiny> {
        let dir = tempfile::tempdir().expect("a directory");
        match slipway_sys::mount::tmpfs(dir.path(), 64 * 1024, 0o755) {
            Ok(()) => Some(Tiny(dir)),
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "SKIPPED: this test needs root: {error}");
                None
            }
        }
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        slipway_sys::mount::unmount(self.0.path(), true).expect("unmounted");
    }
}

#[test]
fn root_a_full_disk_drops_counts_and_tells_once_there_is_space() {
    let Some(tiny) = Tiny::new() else { return };
    let path = tiny.0.path().join("0.log");
    let ballast = tiny.0.path().join("ballast");
    let mut log = LogFile::open(&path).expect("made");
    std::fs::write(&ballast, vec![0u8; 40 * 1024]).expect("ballast");
    let line = [vec![b'x'; 999], vec![b'\n']].concat();
    let mut began = 0;
    for _ in 0..100 {
        began += u32::from(log.write(&line));
    }
    assert_eq!(began, 1, "a loss begins once");
    let text = std::fs::read(&path).expect("log");
    assert_eq!(text.len() % line.len(), 0, "only whole lines are there");
    assert_eq!(log.lost(), 100 * line.len() as u64 - text.len() as u64);
    let loss = log.take_loss().expect("a loss");
    assert_eq!(loss.bytes, log.lost());
    assert!(loss.reason.contains("No space"), "{}", loss.reason);
    assert_eq!(log.take_loss(), None, "told once");

    std::fs::remove_file(&ballast).expect("space");
    assert!(!log.write(&line));
    let text = String::from_utf8(std::fs::read(&path).expect("log")).expect("text");
    let told: Vec<_> = text
        .lines()
        .filter(|l| l.contains("bytes of log were lost here"))
        .collect();
    assert_eq!(told.len(), 1);
    assert!(
        told[0].contains(&format!(" stderr F [slipway: {} bytes", log.lost())),
        "{}",
        told[0]
    );
    assert!(text.ends_with("x\n"));
}
