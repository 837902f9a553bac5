//! A container's control group: version 2 in virtual machines; on hosts also version 1, where each controller has a
//! hierarchy of its own.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{AgentError, Context, Result};
use crate::sys;

const ROOT: &str = "/sys/fs/cgroup";
/// Where version 1 has no way to kill a group at once, it is killed again and again until nobody is left.
const ROUNDS: u32 = 200;
const ROUND: Duration = Duration::from_millis(5);

/// Where the OCI runtime puts a container, as its spec names it.
pub fn spec_path(parent: &str, id: &str) -> String {
    format!("/{parent}/{id}")
}

/// The group's directory in each hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup(pub(super) Vec<PathBuf>);

impl Cgroup {
    pub fn of_container(parent: &str, id: &str) -> Self {
        let path = spec_path(parent, id);
        let below = |hierarchy: &Path| hierarchy.join(path.trim_start_matches('/'));
        let root = Path::new(ROOT);
        if root.join("cgroup.controllers").exists() {
            return Self(vec![below(root)]);
        }
        let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
        Self(hierarchies.map(|hierarchy| below(&hierarchy.path())).collect())
    }

    /// Kills every process of the group, groups below included. A group that is gone has none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> Result<()> {
        if let Some(file) = self.0.iter().map(|group| group.join("cgroup.kill")).find(|file| file.exists()) {
            return fs::write(&file, "1").context(|| format!("write {}", file.display()));
        }
        for _ in 0..ROUNDS {
            if self.processes().is_empty() {
                return Ok(());
            }
            self.signal(libc::SIGKILL)?;
            sleep(ROUND);
        }
        Ok(()) // Who waits for the container's end says that it does not come.
    }

    /// Sends a signal to every process of the group, groups below included.
    ///
    /// # Errors
    /// When the kernel refuses for a process that is still there.
    pub fn signal(&self, signal: i32) -> Result<()> {
        for pid in self.processes() {
            match sys::kill(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(AgentError::Internal(format!(
                        "send signal {signal} to process {pid}: {error}"
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut pending = self.0.clone();
        while let Some(group) = pending.pop() {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            let below = fs::read_dir(&group).into_iter().flatten().flatten();
            pending.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        // A process is in a group of every hierarchy.
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether the kernel's OOM killer took a process. (Whether it then takes the whole group is the spec's choice:
    /// kubelet sets memory.oom.group through `linux.resources.unified`.)
    pub fn oom_killed(&self) -> bool {
        self.oom_kills() > 0
    }

    /// How many processes the OOM killer took.
    pub(super) fn oom_kills(&self) -> u64 {
        let files = ["memory.events", "memory.oom_control"];
        files.iter().find_map(|file| self.table(file).get("oom_kill").copied()).unwrap_or_default()
    }

    /// A file of whichever hierarchy has it.
    pub(super) fn text(&self, file: &str) -> String {
        self.0.iter().find_map(|group| fs::read_to_string(group.join(file)).ok()).unwrap_or_default()
    }

    /// A file with one number; "max" and a missing file are 0.
    pub(super) fn number(&self, file: &str) -> u64 {
        self.text(file).trim().parse().unwrap_or_default()
    }

    /// A file with a name and a number a line.
    pub(super) fn table(&self, file: &str) -> HashMap<String, u64> {
        let text = self.text(file);
        let pair = |line: &str| {
            let (name, number) = line.split_once(' ')?;
            Some((name.to_owned(), number.trim().parse().ok()?))
        };
        text.lines().filter_map(pair).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_is_gone() {
        let group = Cgroup(vec!["/nonexistent".into()]);
        assert!(group.kill().is_ok() && group.signal(15).is_ok());
    }
}
