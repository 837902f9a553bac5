//! Device nodes a container gets besides the usual ones.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::user_namespace::Owner;
use crate::error::{AgentError, Context, Result};
use crate::proto::Device;
use crate::storage::disk::Disks;
use crate::validate;

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
    block: bool,
    major: u64,
    minor: u64,
    mode: u32,
    permissions: String,
}

/// Finds what is behind each device; disks may be on their way. Disks are the pod's alone, so they are given to `root`,
/// the root of its user namespace, if it has one.
///
/// # Errors
/// `InvalidArgument` when the guest has no such device, `DeadlineExceeded` for a disk that does not appear.
pub async fn find(devices: &[Device], root: Option<Owner>) -> Result<Vec<Node>> {
    let mut nodes = Vec::with_capacity(devices.len());
    for device in devices {
        let source = if device.serial.is_empty() {
            PathBuf::from(&device.source)
        } else {
            validate::serial(&device.serial)?;
            let disk = Disks::default().wait(&device.serial).await?;
            disk.ready().await?;
            if let Some(Owner { uid, gid }) = root {
                chown(disk.device(), Some(uid.as_raw()), Some(gid.as_raw()))
                    .context(|| format!("chown {}", disk.device().display()))?;
            }
            disk.device().to_path_buf()
        };
        nodes.push(node(device, &source)?);
    }
    Ok(nodes)
}

fn node(device: &Device, source: &Path) -> Result<Node> {
    let metadata = fs::metadata(source).map_err(|error| no_device(source, &error.to_string()))?;
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_char_device() {
        return Err(no_device(source, "it is no device"));
    }
    Ok(Node {
        path: device.path.clone(),
        source: source.to_path_buf(),
        block: kind.is_block_device(),
        major: major(metadata.rdev()),
        minor: minor(metadata.rdev()),
        mode: metadata.mode() & 0o777,
        permissions: device.permissions.clone(),
    })
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
                    found.extend(node(&device, &path));
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
        let kind = if node.block { "b" } else { "c" };
        json!({"path": node.path, "type": kind, "major": node.major, "minor": node.minor, "fileMode": node.mode,
               "uid": 0, "gid": 0})
    }));
    let mounts = self::list(spec, "", "mounts")?;
    mounts.extend(bound.iter().map(|node| {
        json!({"destination": node.path, "type": "bind", "source": node.source.to_string_lossy(),
               "options": ["bind", "rprivate", "nosuid", "noexec"]})
    }));
    let rules = self::list(spec, "/linux/resources", "devices")?;
    rules.extend(nodes.iter().map(|node| {
        let kind = if node.block { "b" } else { "c" };
        json!({"allow": true, "type": kind, "major": node.major, "minor": node.minor, "access": node.permissions})
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
        let nodes = find(&[device], None).await.unwrap();
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
    async fn what_is_no_device_is_refused() {
        for source in ["/dev/none", "/proc/self/status"] {
            let device = Device { source: source.into(), ..Device::default() };
            assert!(find(&[device], None).await.unwrap_err().to_string().contains(source));
        }
    }
}
