//! A process with everything it has started.

use std::collections::BTreeMap;
use std::fs;

use crate::sys;

/// Scans until nothing new is found; each one stops what was found, so more are needed only while it forks.
const SCANS: usize = 8;

/// Kills a process and its descendants. What has left them, as a daemon does, is not among them.
pub fn kill(pid: i32) {
    let mut found: Vec<i32> = Vec::new();
    for _ in 0..SCANS {
        let tree = tree(pid, &parents());
        let new: Vec<i32> = tree.into_iter().filter(|one| !found.contains(one)).collect();
        if new.is_empty() {
            break;
        }
        for one in &new {
            // Stopped, it cannot start others before it is killed. It may have ended this moment.
            let _ = sys::kill(*one, libc::SIGSTOP);
        }
        found.extend(new);
    }
    for one in found {
        let _ = sys::kill(one, libc::SIGKILL);
    }
}

/// Every process and its parent.
fn parents() -> BTreeMap<i32, i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter_map(|pid| Some((pid, parent_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// The fourth field of a `stat`; the second is a name in parentheses that may hold anything.
fn parent_of(stat: &str) -> Option<i32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

/// A process that exists and what descends from it, parents first.
fn tree(root: i32, parents: &BTreeMap<i32, i32>) -> Vec<i32> {
    let mut found: Vec<i32> = parents.contains_key(&root).then_some(root).into_iter().collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        let children = parents.iter().filter(|(pid, of)| **of == parent && !found.contains(pid));
        let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
        found.extend(children);
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        assert_eq!(parent_of("12 (a) b (c) S 7 12 12 0"), Some(7));
        assert_eq!(parent_of("nonsense"), None);
    }

    #[test]
    fn a_tree_is_the_root_and_what_descends_from_it() {
        let parents = BTreeMap::from([(1, 0), (5, 1), (6, 5), (7, 6), (8, 1), (3, 7)]);
        assert_eq!(tree(5, &parents), [5, 6, 7, 3]);
        assert_eq!(tree(99, &parents), [0; 0]);
    }

    #[test]
    fn children_and_their_children_die() {
        let script = "sh -c 'sleep 1000 & echo $!; wait' & wait";
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let grandchild: i32 = line.trim().parse().unwrap();
        kill(child.id().cast_signed());
        child.wait().unwrap();
        let gone = |pid: i32| {
            fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !gone(grandchild) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
