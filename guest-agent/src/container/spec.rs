//! Fits the host's OCI spec to the guest. Pure: a JSON value in, a JSON value out.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::cgroup;
use super::user::Identity;
use super::user_namespace::UserNamespace;
use crate::config::Paths;
use crate::error::{AgentError, Result};
use crate::storage::volumes;

/// What the agent knows and the host does not.
pub struct Adaptation<'a> {
    pub id: &'a str,
    pub paths: &'a Paths,
    pub identity: &'a Identity,
    pub readonly_rootfs: bool,
    pub tty: bool,
    pub pid_namespace: &'a PidNamespace,
    /// The pod's, if it is not the agent's.
    pub user_namespace: Option<&'a UserNamespace>,
    /// The parent of the container's control group.
    pub cgroup: &'a str,
}

/// Which PID namespace a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    Own,
    /// The agent's.
    Host,
    Of(i32),
}

/// # Errors
/// `InvalidArgument` when the text is not a JSON object.
pub fn parse(text: &[u8]) -> Result<Value> {
    match serde_json::from_slice(text) {
        Ok(spec @ Value::Object(_)) => Ok(spec),
        Ok(_) => Err(AgentError::InvalidArgument("oci_spec is not a JSON object".into())),
        Err(error) => Err(AgentError::InvalidArgument(format!("oci_spec: {error}"))),
    }
}

/// The ids `process.user` has before anything is resolved.
pub fn user_ids(spec: &Value) -> (u32, u32) {
    spec.get("process").map(user_ids_of).unwrap_or_default()
}

/// The ids in the `user` of a spec's `process`.
pub fn user_ids_of(process: &Value) -> (u32, u32) {
    let id = |name: &str| {
        let value = process.get("user").and_then(|user| user.get(name)).and_then(Value::as_u64);
        value.and_then(|value| u32::try_from(value).ok()).unwrap_or_default()
    };
    (id("uid"), id("gid"))
}

/// Supplementary groups `process.user` already has.
pub fn user_groups(spec: &Value) -> Vec<u32> {
    let groups = spec.pointer("/process/user/additionalGids").and_then(Value::as_array);
    let number = |value: &Value| value.as_u64().and_then(|value| u32::try_from(value).ok());
    groups.into_iter().flatten().filter_map(number).collect()
}

/// Removes `process.oomScoreAdj`, which the agent sees to (see `oom`).
pub fn take_oom_score(spec: &mut Value) -> Option<i32> {
    let process = spec.get_mut("process")?.as_object_mut()?;
    process.remove("oomScoreAdj")?.as_i64()?.try_into().ok()
}

/// # Errors
/// `InvalidArgument` naming the member that has the wrong type.
pub fn adapt(spec: &mut Value, adaptation: &Adaptation<'_>) -> Result<()> {
    set_root(spec, adaptation)?;
    set_process(spec, adaptation)?;
    resolve_sources(spec, adaptation)?;
    add_mounts(spec, adaptation.paths)?;
    let linux = object(spec, "linux")?;
    linux.insert("cgroupsPath".into(), cgroup::spec_path(adaptation.cgroup, adaptation.id).into());
    set_namespaces(linux, adaptation.pid_namespace, adaptation.user_namespace)?;
    drop_hostname_of_the_pod(spec);
    Ok(())
}

fn set_root(spec: &mut Value, adaptation: &Adaptation<'_>) -> Result<()> {
    let root = object(spec, "root")?;
    let path = adaptation.paths.rootfs(adaptation.id);
    root.insert("path".into(), path.to_string_lossy().into());
    if adaptation.readonly_rootfs {
        root.insert("readonly".into(), true.into());
    }
    Ok(())
}

fn set_process(spec: &mut Value, adaptation: &Adaptation<'_>) -> Result<()> {
    let process = object(spec, "process")?;
    process.insert("terminal".into(), adaptation.tty.into());
    let Identity { uid, gid, groups, home } = adaptation.identity;
    let user = process.entry("user").or_insert_with(|| json!({}));
    let user = user.as_object_mut().ok_or_else(|| wrong("process.user"))?;
    user.insert("uid".into(), (*uid).into());
    user.insert("gid".into(), (*gid).into());
    user.insert("additionalGids".into(), groups.as_slice().into());
    let env = process.entry("env").or_insert_with(|| json!([]));
    let env = env.as_array_mut().ok_or_else(|| wrong("process.env"))?;
    let has_home = env.iter().filter_map(Value::as_str).any(|entry| entry.starts_with("HOME="));
    if !has_home {
        env.push(format!("HOME={}", home.as_deref().unwrap_or("/")).into());
    }
    Ok(())
}

/// Replaces the host's names of volumes by where they are here.
fn resolve_sources(spec: &mut Value, adaptation: &Adaptation<'_>) -> Result<()> {
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut);
    for mount in mounts.into_iter().flatten() {
        if mount.get("type").and_then(Value::as_str) != Some("bind") {
            continue;
        }
        if let Some(source) = mount.get_mut("source") {
            let path =
                volumes::resolve(adaptation.paths, adaptation.id, source.as_str().unwrap_or_default())?;
            *source = path.to_string_lossy().into();
        }
    }
    Ok(())
}

/// Gives the container the pod's files, wherever its spec does not already put something.
fn add_mounts(spec: &mut Value, paths: &Paths) -> Result<()> {
    let readonly = spec.pointer("/root/readonly").and_then(Value::as_bool).unwrap_or_default();
    let access = if readonly { "ro" } else { "rw" };
    let files: [(&str, PathBuf, &[&str]); 4] = [
        ("/etc/resolv.conf", paths.resolv_conf(), &["bind", "rprivate", "nosuid", "nodev", "noexec", access]),
        ("/etc/hostname", paths.hostname(), &["bind", "rprivate", "nosuid", "nodev", "noexec", access]),
        ("/etc/hosts", paths.hosts(), &["bind", "rprivate", "nosuid", "nodev", "noexec", access]),
        ("/dev/shm", paths.shm(), &["bind", "rprivate", "nosuid", "nodev", "noexec"]),
    ];
    let mounts = member(spec)?.entry("mounts").or_insert_with(|| json!([]));
    let mounts = mounts.as_array_mut().ok_or_else(|| wrong("mounts"))?;
    for (destination, source, options) in files {
        if !mounts.iter().any(|mount| is_at(mount, destination)) {
            mounts.push(json!({
                "destination": destination, "type": "bind", "source": source.to_string_lossy(), "options": options,
            }));
        }
    }
    Ok(())
}

/// Compares as paths, so that a trailing slash makes no difference.
fn is_at(mount: &Value, destination: &str) -> bool {
    let own = mount.get("destination").and_then(Value::as_str);
    own.is_some_and(|own| Path::new(own) == Path::new(destination))
}

/// The container shares every namespace with the agent that the spec does not list; mounts it never shares.
fn set_namespaces(
    linux: &mut Map<String, Value>,
    pid: &PidNamespace,
    user: Option<&UserNamespace>,
) -> Result<()> {
    let list = linux.entry("namespaces").or_insert_with(|| json!([]));
    let list = list.as_array_mut().ok_or_else(|| wrong("linux.namespaces"))?;
    list.retain(|namespace| kind(namespace) != Some("pid"));
    match pid {
        PidNamespace::Own => list.push(json!({"type": "pid"})),
        PidNamespace::Of(process) => {
            list.push(json!({"type": "pid", "path": format!("/proc/{process}/ns/pid")}));
        }
        PidNamespace::Host => {}
    }
    if let Some(user) = user {
        list.push(json!({"type": "user", "path": user.path()}));
    }
    if !list.iter().any(|namespace| kind(namespace) == Some("mount")) {
        list.push(json!({"type": "mount"}));
    }
    Ok(())
}

fn kind(namespace: &Value) -> Option<&str> {
    namespace.get("type").and_then(Value::as_str)
}

/// Without a UTS namespace of its own a container must not set a hostname: it would be the pod's.
fn drop_hostname_of_the_pod(spec: &mut Value) {
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let own_uts = namespaces.is_some_and(|list| list.iter().any(|namespace| kind(namespace) == Some("uts")));
    if let (false, Some(members)) = (own_uts, spec.as_object_mut()) {
        members.remove("hostname");
        members.remove("domainname");
    }
}

fn member(spec: &mut Value) -> Result<&mut Map<String, Value>> {
    spec.as_object_mut().ok_or_else(|| AgentError::InvalidArgument("oci_spec is not a JSON object".into()))
}

fn object<'a>(spec: &'a mut Value, name: &str) -> Result<&'a mut Map<String, Value>> {
    member(spec)?.entry(name).or_insert_with(|| json!({})).as_object_mut().ok_or_else(|| wrong(name))
}

fn wrong(name: &str) -> AgentError {
    AgentError::InvalidArgument(format!("oci_spec: {name} has the wrong type"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(spec: Value, change: impl FnOnce(&mut Adaptation<'_>)) -> Value {
        let paths = Paths::new("/run/vmruntime", "crun");
        let identity = Identity { uid: 33, gid: 34, groups: vec![29], home: Some("/srv".into()) };
        let mut adaptation = Adaptation {
            id: "c1",
            paths: &paths,
            identity: &identity,
            readonly_rootfs: false,
            tty: false,
            pid_namespace: &PidNamespace::Own,
            user_namespace: None,
            cgroup: "vmruntime",
        };
        change(&mut adaptation);
        let mut spec = spec;
        adapt(&mut spec, &adaptation).unwrap();
        spec
    }

    #[test]
    fn an_empty_spec_gets_what_every_container_needs() {
        let spec = adapted(json!({}), |_| {});
        assert_eq!(spec["root"], json!({"path": "/run/vmruntime/containers/c1/rootfs"}));
        assert_eq!(spec["process"]["user"], json!({"uid": 33, "gid": 34, "additionalGids": [29]}));
        assert_eq!(spec["process"]["env"], json!(["HOME=/srv"]));
        assert_eq!(spec["linux"]["cgroupsPath"], "/vmruntime/c1");
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "mount"}]));
        assert_eq!(spec["mounts"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn what_the_spec_says_wins() {
        let spec = adapted(
            json!({
                "process": {"env": ["HOME=/own"]},
                "mounts": [{"destination": "/etc/hosts/", "source": "/x"}],
                "root": {"readonly": true},
            }),
            |_| {},
        );
        assert_eq!(spec["process"]["env"], json!(["HOME=/own"]));
        assert_eq!(spec["root"]["readonly"], true);
        let at_hosts: Vec<_> =
            spec["mounts"].as_array().unwrap().iter().filter(|mount| is_at(mount, "/etc/hosts")).collect();
        assert_eq!(at_hosts.len(), 1);
        assert_eq!(at_hosts[0]["source"], "/x");
    }

    #[test]
    fn pid_namespaces() {
        let given = json!({"linux": {"namespaces": [{"type": "pid", "path": "/bad"}, {"type": "mount"}]}});
        let spec = adapted(given, |adaptation| adaptation.pid_namespace = &PidNamespace::Of(42));
        let expected = json!([{"type": "mount"}, {"type": "pid", "path": "/proc/42/ns/pid"}]);
        assert_eq!(spec["linux"]["namespaces"], expected);
        let spec = adapted(json!({}), |adaptation| adaptation.pid_namespace = &PidNamespace::Host);
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "mount"}]));
    }

    #[test]
    fn a_user_namespace_is_joined_by_its_descriptor() {
        let map = |_| {
            let all = crate::proto::IdMapping { container_id: 0, host_id: 100_000, length: 65_536 };
            super::super::user_namespace::IdMap::parse("uids", &[all]).unwrap()
        };
        let mapping = super::super::user_namespace::Mapping { uids: map("uids"), gids: map("gids") };
        let file = std::fs::File::open("/dev/null").unwrap().into();
        let namespace: &UserNamespace = Box::leak(Box::new(UserNamespace::new(mapping, file)));
        let spec = adapted(json!({}), |adaptation| adaptation.user_namespace = Some(namespace));
        let joined = &spec["linux"]["namespaces"][1];
        assert_eq!(joined["type"], "user");
        assert!(Path::new(joined["path"].as_str().unwrap()).exists());
    }

    #[test]
    fn the_oom_score_is_the_agents_to_set() {
        let mut spec = json!({"process": {"oomScoreAdj": -900, "cwd": "/"}});
        assert_eq!(take_oom_score(&mut spec), Some(-900));
        assert_eq!(spec, json!({"process": {"cwd": "/"}}));
        assert_eq!(take_oom_score(&mut spec), None);
    }

    #[test]
    fn the_hostname_needs_a_namespace() {
        let spec = adapted(json!({"hostname": "x"}), |_| {});
        assert!(spec.get("hostname").is_none());
        let own = json!({"hostname": "x", "linux": {"namespaces": [{"type": "uts"}]}});
        assert_eq!(adapted(own, |_| {})["hostname"], "x");
    }

    #[test]
    fn what_is_no_spec_is_refused() {
        assert!(parse(b"[]").is_err() && parse(b"{").is_err() && parse(b"{}").is_ok());
        let paths = Paths::new("/s", "crun");
        let adaptation = Adaptation {
            id: "c1",
            paths: &paths,
            identity: &Identity::default(),
            readonly_rootfs: false,
            tty: false,
            pid_namespace: &PidNamespace::Own,
            user_namespace: None,
            cgroup: "vmruntime",
        };
        let error = adapt(&mut json!({"process": []}), &adaptation).unwrap_err();
        assert_eq!(error.to_string(), "oci_spec: process has the wrong type");
    }
}
