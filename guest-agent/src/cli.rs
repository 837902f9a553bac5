//! The command line of an agent that is a plain process.

use std::path::PathBuf;

#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Version,
    Serve { listen: PathBuf, state: PathBuf, crun: PathBuf, cgroup: String },
}

pub const USAGE: &str = "usage: vmruntime-agent --listen unix:PATH --state-dir DIR [--crun PATH] [--cgroup PATH] \
                         | --version";

/// # Errors
/// A text for the user.
pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let (mut listen, mut state, mut crun) = (None, None, PathBuf::from("/usr/bin/crun"));
    let mut cgroup = String::from("vmruntime");
    while let Some(option) = arguments.next() {
        if option == "--version" {
            return Ok(Command::Version);
        }
        let value = arguments.next().ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--listen" => match value.strip_prefix("unix:") {
                Some(path) if !path.is_empty() => listen = Some(path.into()),
                _ => return Err(format!("--listen {value}: only unix:PATH is known")),
            },
            "--state-dir" => state = Some(value.into()),
            "--crun" => crun = value.into(),
            "--cgroup" => cgroup = value.trim_matches('/').into(),
            _ => return Err(format!("{option} is not known")),
        }
    }
    match (listen, state) {
        (Some(listen), Some(state)) => Ok(Command::Serve { listen, state, crun, cgroup }),
        _ => Err("--listen and --state-dir are needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_lines() {
        let serve = Command::Serve {
            listen: "/s".into(),
            state: "/d".into(),
            crun: "/c".into(),
            cgroup: "a/b".into(),
        };
        assert_eq!(parsed("--listen unix:/s --state-dir /d --crun /c --cgroup /a/b"), Ok(serve));
        assert_eq!(parsed("--version"), Ok(Command::Version));
        for bad in ["", "--listen unix:/s", "--listen tcp:1 --state-dir /d", "--listen", "--what x"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
