//! A container's control group (version 2).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{AgentError, Context, Result};
use crate::sys;

const ROOT: &str = "/sys/fs/cgroup";
/// Below it, one group a container.
const PARENT: &str = "/vmruntime";

/// Where the OCI runtime puts a container, as its spec names it.
pub fn spec_path(id: &str) -> String {
    format!("{PARENT}/{id}")
}

#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

/// Numbers of the group's files; what a file does not have is 0.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pub cpu_usage_ns: u64,
    pub memory: u64,
    pub working_set: u64,
    pub anonymous: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// 0: none.
    pub memory_limit: u64,
    pub swap: u64,
    pub pids: u64,
}

impl Cgroup {
    pub fn of_container(id: &str) -> Self {
        Self(Path::new(ROOT).join(spec_path(id).trim_start_matches('/')))
    }

    /// Kills every process of the group at once, groups below included. A group that is gone has none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        fs::write(self.0.join("cgroup.kill"), "1").context(|| format!("kill {}", self.0.display()))
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

    fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut pending = vec![self.0.clone()];
        while let Some(group) = pending.pop() {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            let below = fs::read_dir(&group).into_iter().flatten().flatten();
            pending.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found
    }

    /// Whether the kernel's OOM killer took a process. (Whether it then takes the whole group is the spec's choice:
    /// kubelet sets memory.oom.group through `linux.resources.unified`.)
    pub fn oom_killed(&self) -> bool {
        self.table("memory.events").get("oom_kill").is_some_and(|count| *count > 0)
    }

    pub fn numbers(&self) -> Numbers {
        let memory_stat = self.table("memory.stat");
        let stat = |name: &str| memory_stat.get(name).copied().unwrap_or_default();
        let memory = self.number("memory.current");
        Numbers {
            cpu_usage_ns: self
                .table("cpu.stat")
                .get("usage_usec")
                .copied()
                .unwrap_or_default()
                .saturating_mul(1000),
            memory,
            working_set: memory.saturating_sub(stat("inactive_file")),
            anonymous: stat("anon"),
            page_faults: stat("pgfault"),
            major_page_faults: stat("pgmajfault"),
            memory_limit: self.number("memory.max"),
            swap: self.number("memory.swap.current"),
            pids: self.number("pids.current"),
        }
    }

    /// A file with one number; "max" and a missing file are 0.
    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.0.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    /// A file with a name and a number a line.
    fn table(&self, file: &str) -> HashMap<String, u64> {
        let text = fs::read_to_string(self.0.join(file)).unwrap_or_default();
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
    fn numbers_of_a_group() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        put("memory.current", "1000\n");
        put("memory.max", "max\n");
        put("memory.stat", "anon 300\ninactive_file 400\npgfault 7\npgmajfault 1\n");
        put("memory.events", "low 0\noom 1\noom_kill 0\n");
        put("pids.current", "3\n");
        let group = Cgroup(directory.path().into());
        let expected = Numbers {
            cpu_usage_ns: 1_500_000,
            memory: 1000,
            working_set: 600,
            anonymous: 300,
            page_faults: 7,
            major_page_faults: 1,
            pids: 3,
            ..Numbers::default()
        };
        assert_eq!(group.numbers(), expected);
        assert!(!group.oom_killed());
        put("memory.events", "oom 1\noom_kill 2\n");
        assert!(group.oom_killed());
    }

    #[test]
    fn a_group_that_is_gone() {
        let group = Cgroup("/nonexistent".into());
        assert_eq!(group.numbers(), Numbers::default());
        assert!(group.kill().is_ok() && group.signal(15).is_ok());
    }
}
