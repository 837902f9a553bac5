//! How much of the writable disk is used, in all and by one container.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

/// How long an answer is good enough.
pub const FRESH: Duration = Duration::from_secs(10);
/// A walk ends here; what it has seen by then is the answer.
const MOST_ENTRIES: u64 = 200_000;

/// Disk space and files of one container's writable layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// The last answer, and when it was true.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cached {
    taken: Option<Instant>,
    usage: Usage,
}

impl Cached {
    pub fn now(usage: Usage) -> Self {
        Self { taken: Some(Instant::now()), usage }
    }

    pub fn fresh(&self) -> Option<Usage> {
        self.taken.filter(|taken| taken.elapsed() < FRESH).map(|_| self.usage)
    }
}

/// Adds up allocated blocks below a directory. Files that vanish meanwhile are passed over, hard links counted once.
pub fn walk(root: &Path) -> Usage {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut pending: Vec<PathBuf> = vec![root.into()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.nlink() > 1 && !linked.insert(metadata.ino()) {
                continue;
            }
            usage.bytes += metadata.blocks() * 512;
            usage.inodes += 1;
            if usage.inodes == MOST_ENTRIES {
                return usage;
            }
        }
    }
    usage
}

/// What a file system has, and has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    pub bytes: u64,
    pub bytes_used: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// The space of the file system that a path is on.
pub fn file_system(path: &Path) -> Option<Space> {
    let state = statvfs(path).ok()?;
    let unit = state.fragment_size();
    let used = state.blocks().saturating_sub(state.blocks_free());
    Some(Space {
        bytes: state.blocks() * unit,
        bytes_used: used * unit,
        inodes: state.files(),
        inodes_free: state.files_free(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("d/a"), vec![1; 10_000]).unwrap();
        fs::hard_link(directory.path().join("d/a"), directory.path().join("b")).unwrap();
        assert_eq!(walk(directory.path()).inodes, 2);
        assert_eq!(walk(Path::new("/nonexistent")), Usage::default());
    }

    #[test]
    fn an_answer_ages() {
        assert_eq!(Cached::default().fresh(), None);
        assert_eq!(Cached::now(Usage::default()).fresh(), Some(Usage::default()));
    }
}
