//! Kernel parameters of the pod.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::home;
use crate::container::user_namespace::UserNamespace;
use crate::error::{AgentError, Result};
use crate::sys;

const ROOT: &str = "/proc/sys";
/// Who may send pings: two groups and those between them.
const PING_GROUPS: &str = "net.ipv4.ping_group_range";

/// Sets every parameter. In a pod with a user namespace groups are those of the namespace.
///
/// # Errors
/// `InvalidArgument` naming the first one the kernel does not take.
pub fn apply(parameters: &HashMap<String, String>, user: Option<&UserNamespace>) -> Result<()> {
    let mut names: Vec<_> = parameters.iter().collect();
    names.sort();
    for (name, value) in names {
        let path = path_of(name)?;
        let outside = match user {
            Some(user) if path == path_of(PING_GROUPS)? => {
                groups_outside(value, user).map_err(|why| refused(name, value, &why))?
            }
            _ => value.clone(),
        };
        write(&path, &outside, user).map_err(|error| refused(name, value, &error.to_string()))?;
    }
    Ok(())
}

fn refused(name: &str, value: &str, why: &str) -> AgentError {
    AgentError::InvalidArgument(format!(
        "config.linux.sysctls[{name}]: {value:?} is not taken by the pod's kernel: {why} (correct it, or leave it out)"
    ))
}

/// Some parameters of the network are the machine's; they exist in the namespace it booted with alone. Those of an IPC
/// namespace may be its user namespace's root's alone.
fn write(path: &Path, value: &str, user: Option<&UserNamespace>) -> io::Result<()> {
    let write = || OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes());
    match (write(), user.map(UserNamespace::root)) {
        (Err(error), Some(Ok(_))) if error.kind() == io::ErrorKind::NotFound => home::at_home(write),
        (Err(error), Some(Ok(root))) if error.kind() == io::ErrorKind::PermissionDenied => {
            sys::as_user(root.uid, write)
        }
        (done, _) => done,
    }
}

/// The kernel reads groups as the writer numbers them.
fn groups_outside(value: &str, user: &UserNamespace) -> std::result::Result<String, String> {
    let groups: Option<Vec<u32>> = value.split_whitespace().map(|group| group.parse().ok()).collect();
    match groups.as_deref() {
        // The kernel's way of saying nobody.
        Some([low, high]) if low > high => Ok(value.to_owned()),
        Some([low, high]) => {
            let outside = |group: u32| user.group(group).map_err(|error| error.to_string());
            Ok(format!("{} {}", outside(*low)?, outside(*high)?))
        }
        _ => Err("two groups are wanted".into()),
    }
}

/// Dots separate the parts, unless the first separator is a slash: then dots belong to the parts, as in
/// `net/ipv4/conf/eth0.1/forwarding`.
fn path_of(name: &str) -> Result<PathBuf> {
    let slashes = name.find(['.', '/']).is_some_and(|first| name.as_bytes().get(first) == Some(&b'/'));
    let separator = if slashes { '/' } else { '.' };
    let parts: Vec<String> = name
        .split(separator)
        .map(|part| if slashes { part.into() } else { part.replace('/', ".") })
        .collect();
    if parts.iter().any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(AgentError::InvalidArgument(format!("sysctl {name:?} is not a parameter's name")));
    }
    Ok(Path::new(ROOT).join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths() {
        let path = |name| path_of(name).unwrap().to_string_lossy().into_owned();
        assert_eq!(path("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), "/proc/sys/net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding"), "/proc/sys/net/ipv4/conf/eth0.1/forwarding");
        for bad in ["", "../x", "net/../../x", "net..x"] {
            assert!(path_of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn groups_are_those_of_the_user_namespace() {
        let all = crate::proto::IdMapping { container_id: 0, host_id: 100_000, length: 1000 };
        let map = crate::container::user_namespace::IdMap::parse("gids", &[all]).unwrap();
        let mapping = crate::container::user_namespace::Mapping { uids: map.clone(), gids: map };
        let user = UserNamespace::new(mapping, std::fs::File::open("/dev/null").unwrap().into());
        assert_eq!(groups_outside("0 999", &user), Ok("100000 100999".into()));
        assert_eq!(groups_outside("1\t0", &user), Ok("1\t0".into()));
        assert!(groups_outside("0 2147483647", &user).unwrap_err().contains("0 to 999"));
        assert!(groups_outside("0", &user).is_err());
    }

    #[test]
    fn an_unknown_parameter_is_named() {
        let parameters = HashMap::from([("net.nothing.here".into(), "1".into())]);
        let error = apply(&parameters, None).unwrap_err();
        assert!(error.to_string().starts_with("config.linux.sysctls[net.nothing.here]: \"1\" "), "{error}");
    }
}
