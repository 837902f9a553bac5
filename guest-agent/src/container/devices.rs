//! Device nodes a container gets besides the usual ones.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::user::Identity;
use super::user_namespace::{Owner, UserNamespace};
use crate::error::{AgentError, Context, Result};
use crate::proto::Device;
use crate::storage::disk::Disks;
use crate::validate;

/// Of a node whose source is not looked at.
const DEFAULT_MODE: u32 = 0o666;

const OWN: &[&str] = &[
    "/dev/console",
    "/dev/fd",
    "/dev/full",
    "/dev/mqueue",
    "/dev/null",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/random",
    "/dev/shm",
    "/dev/stderr",
    "/dev/stdin",
    "/dev/stdout",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];

/// A node, ready for the OCI spec.
#[derive(Debug, Clone)]
pub struct Node {
    path: String,
    source: PathBuf,
    /// Whether it is the pod's alone.
    disk: bool,
    kind: Kind,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    permissions: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block,
    Character,
    Pipe,
}

impl Kind {
    fn letter(self) -> &'static str {
        match self {
            Self::Block => "b",
            Self::Character => "c",
            Self::Pipe => "p",
        }
    }
}

/// Finds what is behind each device, for a container with this user; disks may be on their way.
///
/// # Errors
/// `InvalidArgument` when the guest has no such device, `DeadlineExceeded` for a disk that does not appear.
pub async fn find(devices: &[Device], user: &Identity) -> Result<Vec<Node>> {
    let mut nodes = Vec::with_capacity(devices.len());
    for device in devices {
        let source = if device.serial.is_empty() {
            PathBuf::from(&device.source)
        } else {
            validate::serial(&device.serial)?;
            let disk = Disks::default().wait(&device.serial).await?;
            disk.ready().await?;
            disk.device().to_path_buf()
        };
        nodes.push(node(device, &source, user)?);
    }
    Ok(nodes)
}

fn node(device: &Device, source: &Path, user: &Identity) -> Result<Node> {
    let (kind, major, minor, mode) = look(device, source)?;
    let (uid, gid) = if device.users { (user.uid, user.gid) } else { (0, 0) };
    Ok(Node {
        path: device.path.clone(),
        source: source.to_path_buf(),
        disk: !device.serial.is_empty(),
        kind,
        major,
        minor,
        mode: device.mode.unwrap_or(mode),
        uid: device.uid.unwrap_or(uid),
        gid: device.gid.unwrap_or(gid),
        permissions: device.permissions.clone(),
    })
}

/// What a device is: as it says itself, or as its source is.
fn look(device: &Device, source: &Path) -> Result<(Kind, u64, u64, u32)> {
    let said = match device.r#type.as_str() {
        "p" => return Ok((Kind::Pipe, 0, 0, DEFAULT_MODE)),
        "b" => Some(Kind::Block),
        "c" => Some(Kind::Character),
        _ => None,
    };
    if let (Some(kind), true) = (said, device.major != 0) {
        return Ok((kind, device.major.into(), device.minor.into(), DEFAULT_MODE));
    }
    let metadata = fs::metadata(source).map_err(|error| no_device(source, &error.to_string()))?;
    let found = match metadata.file_type() {
        kind if kind.is_block_device() => Kind::Block,
        kind if kind.is_char_device() => Kind::Character,
        kind if kind.is_fifo() => return Ok((Kind::Pipe, 0, 0, metadata.mode() & 0o777)),
        _ => return Err(no_device(source, "it is no device")),
    };
    if said.is_some_and(|said| said != found) {
        return Err(no_device(source, &format!("it is of type {}, not {}", found.letter(), device.r#type)));
    }
    Ok((found, major(metadata.rdev()), minor(metadata.rdev()), metadata.mode() & 0o777))
}

/// Gives disks, which are the pod's alone, to those of its user namespace that they are for.
///
/// # Errors
/// When the kernel refuses, or the namespace lacks an id.
pub fn give(nodes: &[Node], user: &UserNamespace) -> Result<()> {
    for node in nodes.iter().filter(|node| node.disk) {
        let Owner { uid, gid } = user.owner(node.uid, node.gid)?;
        chown(&node.source, Some(uid.as_raw()), Some(gid.as_raw()))
            .and_then(|()| fs::set_permissions(&node.source, Permissions::from_mode(node.mode)))
            .context(|| format!("give {} to the container", node.source.display()))?;
    }
    Ok(())
}

fn no_device(source: &Path, why: &str) -> AgentError {
    let path = source.display();
    AgentError::InvalidArgument(format!(
        "config.devices[].host_path: {path} is not a device of the pod's machine ({why}); a VM has its own \
         devices, and block devices of the host"
    ))
}

/// Every node of /dev that a privileged container gets besides those it asked for; what each container has of its own
/// (terminals, the usual devices, file systems below /dev) is left out.
pub fn all(present: &[Node]) -> Vec<Node> {
    let mut found = Vec::new();
    let mut pending = vec![PathBuf::from("/dev")];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(name) = path.to_str().map(str::to_owned) else { continue };
            if OWN.contains(&name.as_str()) || present.iter().any(|node| node.path == name) {
                continue;
            }
            // Links are not followed: what they lead to is a node of its own.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(path),
                Ok(kind) if kind.is_block_device() || kind.is_char_device() => {
                    let device = Device { path: name, permissions: "rwm".into(), ..Device::default() };
                    found.extend(node(&device, &path, &Identity::default()));
                }
                _ => {}
            }
        }
    }
    found
}

/// Adds nodes and the right to use them to an OCI spec.
///
/// In a user namespace nobody can make nodes. The OCI runtime binds those of the same path then; with another path a node
/// has to be bound by the spec.
///
/// # Errors
/// `InvalidArgument` when the spec's members have the wrong type.
pub fn add(spec: &mut Value, nodes: &[Node], bind: bool) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let (bound, made): (Vec<_>, Vec<_>) =
        nodes.iter().partition(|node| bind && node.source.as_os_str() != node.path.as_str());
    let list = list(spec, "/linux", "devices")?;
    list.extend(made.iter().map(|node| {
        json!({"path": node.path, "type": node.kind.letter(), "major": node.major, "minor": node.minor,
               "fileMode": node.mode, "uid": node.uid, "gid": node.gid})
    }));
    let mounts = self::list(spec, "", "mounts")?;
    mounts.extend(bound.iter().map(|node| {
        json!({"destination": node.path, "type": "bind", "source": node.source.to_string_lossy(),
               "options": ["bind", "rprivate", "nosuid", "noexec"]})
    }));
    let rules = self::list(spec, "/linux/resources", "devices")?;
    rules.extend(nodes.iter().filter(|node| node.kind != Kind::Pipe).map(|node| {
        json!({"allow": true, "type": node.kind.letter(), "major": node.major, "minor": node.minor,
               "access": node.permissions})
    }));
    Ok(())
}

fn list<'a>(spec: &'a mut Value, parent: &str, name: &str) -> Result<&'a mut Vec<Value>> {
    let wrong = || AgentError::InvalidArgument(format!("oci_spec: {parent}/{name} has the wrong type"));
    let parent = spec.pointer_mut(parent).and_then(Value::as_object_mut).ok_or_else(wrong)?;
    parent.entry(name).or_insert_with(|| json!([])).as_array_mut().ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_of_the_guest_is_added_with_its_right() {
        let device = Device {
            path: "/dev/mine".into(),
            source: "/dev/null".into(),
            permissions: "rw".into(),
            ..Device::default()
        };
        let nodes = find(&[device], &Identity::default()).await.unwrap();
        let mut spec = json!({"linux": {"resources": {}}});
        add(&mut spec, &nodes, false).unwrap();
        assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/mine");
        assert_eq!(spec["linux"]["devices"][0]["major"], 1);
        assert_eq!(spec["linux"]["resources"]["devices"][0]["access"], "rw");
        assert!(add(&mut json!({}), &nodes, false).is_err());
        let mut spec = json!({"linux": {"resources": {}}, "mounts": []});
        add(&mut spec, &nodes, true).unwrap();
        assert_eq!(spec["linux"]["devices"], json!([]));
        assert_eq!(spec["mounts"][0]["source"], "/dev/null");
        assert_eq!(spec["linux"]["resources"]["devices"][0]["access"], "rw");
    }

    #[tokio::test]
    async fn a_node_may_say_what_it_is_and_whose() {
        let user = Identity { uid: 7, gid: 8, ..Identity::default() };
        let numbers = Device {
            path: "/dev/x".into(),
            source: "/nonexistent".into(),
            r#type: "b".into(),
            major: 240,
            minor: 3,
            users: true,
            gid: Some(9),
            mode: Some(0o640),
            permissions: "r".into(),
            ..Device::default()
        };
        let pipe = Device { r#type: "p".into(), path: "/dev/p".into(), ..Device::default() };
        let nodes = find(&[numbers, pipe], &user).await.unwrap();
        let mut spec = json!({"linux": {"resources": {}}});
        add(&mut spec, &nodes, false).unwrap();
        let expected = json!({"path": "/dev/x", "type": "b", "major": 240, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 9});
        assert_eq!(spec["linux"]["devices"][0], expected);
        assert_eq!(spec["linux"]["devices"][1]["type"], "p");
        assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 1);
        let other = Device { r#type: "b".into(), source: "/dev/null".into(), ..Device::default() };
        assert!(find(&[other], &user).await.unwrap_err().to_string().contains("type c, not b"));
    }

    #[tokio::test]
    async fn what_is_no_device_is_refused() {
        for source in ["/dev/none", "/proc/self/status"] {
            let device = Device { source: source.into(), ..Device::default() };
            assert!(find(&[device], &Identity::default()).await.unwrap_err().to_string().contains(source));
        }
    }
}
