//! Kernel parameters of the pod.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{AgentError, Result};

const ROOT: &str = "/proc/sys";

/// Sets every parameter.
///
/// # Errors
/// `InvalidArgument` naming the first one the kernel does not take.
pub fn apply(parameters: &HashMap<String, String>) -> Result<()> {
    let mut names: Vec<_> = parameters.iter().collect();
    names.sort();
    for (name, value) in names {
        let path = path_of(name)?;
        fs::write(&path, value)
            .map_err(|error| AgentError::InvalidArgument(format!("sysctl {name}={value}: {error}")))?;
    }
    Ok(())
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
    fn an_unknown_parameter_is_named() {
        let parameters = HashMap::from([("net.nothing.here".into(), "1".into())]);
        let error = apply(&parameters).unwrap_err();
        assert!(error.to_string().starts_with("sysctl net.nothing.here=1: "), "{error}");
    }
}
