//! How ready the kernel is to take a process when memory runs out.

use std::fs;
use std::io;

const OWN: &str = "/proc/self/oom_score_adj";

/// Starts a process with this score, which its children inherit.
///
/// The OCI runtime would set it from within the container, where a user namespace takes the right to lower it away. So
/// the agent takes the score on for as long as the start lasts, in which it does nothing else.
///
/// # Errors
/// When the kernel refuses, or the start fails.
pub fn spawn_with<T>(score: Option<i32>, spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(score) = score else { return spawn() };
    let own = fs::read_to_string(OWN)?;
    fs::write(OWN, score.to_string())
        .map_err(|error| io::Error::new(error.kind(), format!("set oom_score_adj to {score}: {error}")))?;
    let spawned = spawn();
    fs::write(OWN, own)?;
    spawned
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_has_the_score_and_the_parent_its_own() {
        let own = fs::read_to_string(OWN).unwrap();
        let output = spawn_with(Some(700), || Command::new("cat").arg(OWN).output()).unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "700");
        assert_eq!(fs::read_to_string(OWN).unwrap(), own);
    }
}
