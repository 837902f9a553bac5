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
pub struct Cgroup(Vec<PathBuf>);

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

    fn processes(&self) -> Vec<i32> {
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
        ["memory.events", "memory.oom_control"]
            .iter()
            .any(|file| self.table(file).get("oom_kill").is_some_and(|count| *count > 0))
    }

    pub fn numbers(&self) -> Numbers {
        let memory_stat = self.table("memory.stat");
        // Version 1 counts groups below under names of their own.
        let stat = |v2: &str, v1: &str| {
            memory_stat.get(v1).or_else(|| memory_stat.get(v2)).copied().unwrap_or_default()
        };
        let either = |v2: &str, v1: &str| match self.number(v2) {
            0 => self.number(v1),
            number => number,
        };
        let memory = either("memory.current", "memory.usage_in_bytes");
        let limit = either("memory.max", "memory.limit_in_bytes");
        let cpu = self.table("cpu.stat").get("usage_usec").map(|usage| usage.saturating_mul(1000));
        Numbers {
            cpu_usage_ns: cpu.unwrap_or_else(|| self.number("cpuacct.usage")),
            memory,
            working_set: memory.saturating_sub(stat("inactive_file", "total_inactive_file")),
            anonymous: stat("anon", "total_rss"),
            page_faults: stat("pgfault", "total_pgfault"),
            major_page_faults: stat("pgmajfault", "total_pgmajfault"),
            // Version 1 says "none" by the largest number of whole pages.
            memory_limit: if limit > (1 << 62) { 0 } else { limit },
            swap: self.number("memory.swap.current"),
            pids: self.number("pids.current"),
        }
    }

    /// A file of whichever hierarchy has it.
    fn text(&self, file: &str) -> String {
        self.0.iter().find_map(|group| fs::read_to_string(group.join(file)).ok()).unwrap_or_default()
    }

    /// A file with one number; "max" and a missing file are 0.
    fn number(&self, file: &str) -> u64 {
        self.text(file).trim().parse().unwrap_or_default()
    }

    /// A file with a name and a number a line.
    fn table(&self, file: &str) -> HashMap<String, u64> {
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
    fn numbers_of_a_group() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        put("memory.current", "1000\n");
        put("memory.max", "max\n");
        put("memory.stat", "anon 300\ninactive_file 400\npgfault 7\npgmajfault 1\n");
        put("memory.events", "low 0\noom 1\noom_kill 0\n");
        put("pids.current", "3\n");
        let group = Cgroup(vec!["/nonexistent".into(), directory.path().into()]);
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
    fn numbers_of_a_group_of_version_1() {
        let directory = tempfile::tempdir().unwrap();
        let groups = ["memory", "cpuacct"].map(|name| directory.path().join(name));
        groups.iter().for_each(|group| fs::create_dir(group).unwrap());
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put("cpuacct/cpuacct.usage", "9\n");
        put("memory/memory.usage_in_bytes", "1000\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        put("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 400\ntotal_rss 300\n");
        put("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
        let group = Cgroup(groups.into());
        let numbers = group.numbers();
        assert_eq!((numbers.cpu_usage_ns, numbers.working_set, numbers.anonymous), (9, 600, 300));
        assert_eq!((numbers.memory_limit, group.oom_killed()), (0, true));
    }

    #[test]
    fn a_group_that_is_gone() {
        let group = Cgroup(vec!["/nonexistent".into()]);
        assert_eq!(group.numbers(), Numbers::default());
        assert!(group.kill().is_ok() && group.signal(15).is_ok());
    }
}
