//! The pod's user namespace: which ids its containers have, and what these are outside.

use std::fmt::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::unistd::{Gid, Uid};

use crate::error::{AgentError, Result};
use crate::proto;

/// The kernel takes no more lines (`user_namespaces(7)`).
const MOST_RANGES: usize = 340;

/// Ids inside, each with one outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap(Vec<Range>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    length: u32,
}

impl IdMap {
    /// # Errors
    /// `InvalidArgument` for a map that lacks id 0 or goes beyond the last id.
    pub fn parse(what: &str, mappings: &[proto::IdMapping]) -> Result<Self> {
        let wrong =
            |why: &str| Err(AgentError::InvalidArgument(format!("the user namespace's {what} {why}")));
        let range = |one: &proto::IdMapping| Range {
            inside: one.container_id,
            outside: one.host_id,
            length: one.length,
        };
        let map = Self(mappings.iter().map(range).collect());
        if map.0.len() > MOST_RANGES {
            return wrong("have too many ranges");
        }
        let fits = |start: u32, length: u32| length > 0 && start.checked_add(length).is_some();
        if !map.0.iter().all(|range| fits(range.inside, range.length) && fits(range.outside, range.length)) {
            return wrong("have an empty range, or one that goes beyond the last id");
        }
        match map.outside(0) {
            Some(_) => Ok(map),
            None => wrong("do not have 0 among them, without which no container can be set up"),
        }
    }

    pub fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.length)?;
            range.outside.checked_add(offset)
        })
    }

    /// What the kernel reads from `/proc/PID/uid_map`.
    pub fn lines(&self) -> String {
        let mut text = String::new();
        for Range { inside, outside, length } in &self.0 {
            let _ = writeln!(text, "{inside} {outside} {length}");
        }
        text
    }
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Range { inside, length, .. }) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{inside} to {}", inside + (length - 1))?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub uids: IdMap,
    pub gids: IdMap,
}

impl Mapping {
    /// # Errors
    /// See `IdMap::parse`.
    pub fn parse(message: &proto::UserNamespace) -> Result<Self> {
        Ok(Self { uids: IdMap::parse("uids", &message.uids)?, gids: IdMap::parse("gids", &message.gids)? })
    }
}

/// Whom a file belongs to, as the agent's own namespace numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: Uid,
    pub gid: Gid,
}

/// A namespace that exists as long as this does.
#[derive(Debug)]
pub struct UserNamespace {
    mapping: Mapping,
    descriptor: OwnedFd,
}

impl UserNamespace {
    pub fn new(mapping: Mapping, descriptor: OwnedFd) -> Self {
        Self { mapping, descriptor }
    }

    /// By which another process can open it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd())
    }

    /// # Errors
    /// `InvalidArgument` for an id the namespace does not have.
    pub fn owner(&self, uid: u32, gid: u32) -> Result<Owner> {
        let uids = &self.mapping.uids;
        let uid = uids.outside(uid).ok_or_else(|| missing("user", uid, uids))?;
        Ok(Owner { uid: Uid::from_raw(uid), gid: Gid::from_raw(self.group(gid)?) })
    }

    /// A group's id outside.
    ///
    /// # Errors
    /// `InvalidArgument` for an id the namespace does not have.
    pub fn group(&self, gid: u32) -> Result<u32> {
        let gids = &self.mapping.gids;
        gids.outside(gid).ok_or_else(|| missing("group", gid, gids))
    }

    /// # Errors
    /// Never: every map has id 0.
    pub fn root(&self) -> Result<Owner> {
        self.owner(0, 0)
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn missing(what: &str, id: u32, map: &IdMap) -> AgentError {
    AgentError::InvalidArgument(format!("{what} {id} is not in the pod's user namespace, which has {map}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> proto::IdMapping {
        proto::IdMapping { container_id, host_id, length }
    }

    #[test]
    fn ids_inside_and_outside() {
        let map = IdMap::parse("uids", &[mapping(0, 100_000, 1000), mapping(2000, 7, 1)]).unwrap();
        assert_eq!(map.outside(0), Some(100_000));
        assert_eq!(map.outside(999), Some(100_999));
        assert_eq!(map.outside(1000), None);
        assert_eq!(map.outside(2000), Some(7));
        assert_eq!(map.lines(), "0 100000 1000\n2000 7 1\n");
        assert_eq!(map.to_string(), "0 to 999, 2000 to 2000");
    }

    #[test]
    fn maps_that_cannot_work() {
        for bad in [
            vec![],
            vec![mapping(1, 100_000, 10)],
            vec![mapping(0, 1, 0)],
            vec![mapping(0, u32::MAX, 2)],
            vec![mapping(0, 1, 1); MOST_RANGES + 1],
        ] {
            assert!(IdMap::parse("gids", &bad).unwrap_err().to_string().contains("gids"), "{}", bad.len());
        }
    }

    #[test]
    fn an_id_the_namespace_does_not_have_is_named() {
        let map = |host| IdMap::parse("uids", &[mapping(0, host, 65_536)]).unwrap();
        let namespace = UserNamespace::new(
            Mapping { uids: map(1000), gids: map(2000) },
            std::fs::File::open("/dev/null").unwrap().into(),
        );
        let owner = namespace.owner(1, 2).unwrap();
        assert_eq!((owner.uid.as_raw(), owner.gid.as_raw()), (1001, 2002));
        let error = namespace.owner(70_000, 0).unwrap_err().to_string();
        assert_eq!(error, "user 70000 is not in the pod's user namespace, which has 0 to 65535");
        assert!(namespace.owner(0, 65_536).unwrap_err().to_string().starts_with("group 65536 "));
    }
}
