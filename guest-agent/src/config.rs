//! Where the agent runs and where it keeps things.

use std::path::{Path, PathBuf};

/// What kind of place the agent serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// PID 1 of a virtual machine: clock, network and disks are the agent's to configure.
    Vm,
    /// A process on a host: all of that belongs to someone else.
    Host,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub mode: Mode,
    pub paths: Paths,
    /// The control group below which each container gets one, from the hierarchy's root, without a slash in front.
    pub cgroup: String,
}

/// Every path the agent makes, below one directory.
///
/// Names are short on purpose: the layers of an overlay have to fit into one page of mount options.
#[derive(Debug, Clone)]
pub struct Paths {
    state: PathBuf,
    crun: PathBuf,
}

impl Paths {
    pub fn new(state: impl Into<PathBuf>, crun: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), crun: crun.into() }
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The OCI runtime's binary.
    pub fn crun(&self) -> &Path {
        &self.crun
    }

    /// The OCI runtime's own state.
    pub fn crun_root(&self) -> PathBuf {
        self.state.join("crun")
    }

    /// Short-lived files: pid files, console sockets, logs of the OCI runtime.
    pub fn temporary(&self) -> PathBuf {
        self.state.join("tmp")
    }

    /// Mount points of layers, one number each.
    pub fn layers(&self) -> PathBuf {
        self.state.join("l")
    }

    /// The writable disk.
    pub fn scratch(&self) -> PathBuf {
        self.state.join("scratch")
    }

    /// The upper and work directories of all containers.
    pub fn all_writable(&self) -> PathBuf {
        self.scratch().join("containers")
    }

    /// A container's upper and work directories on the writable disk.
    pub fn writable(&self, id: &str) -> PathBuf {
        self.all_writable().join(id)
    }

    /// Removed containers' files on their way out.
    pub fn trash(&self) -> PathBuf {
        self.scratch().join("trash")
    }

    /// A container's OCI bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.state.join("containers").join(id)
    }

    pub fn rootfs(&self, id: &str) -> PathBuf {
        self.bundle(id).join("rootfs")
    }

    /// Where the pod's virtio-fs share is mounted.
    pub fn share(&self) -> PathBuf {
        self.state.join("share")
    }

    /// Mount points of the pod's volumes in memory.
    pub fn memory_volume(&self, key: &str) -> PathBuf {
        self.state.join("memory").join(key)
    }

    /// Mount point of one of a container's image volumes.
    pub fn image_volume(&self, id: &str, number: usize) -> PathBuf {
        self.bundle(id).join(format!("volume-{number}"))
    }

    pub fn shm(&self) -> PathBuf {
        self.state.join("shm")
    }

    /// A sysfs of the pod's network namespace, where that is not the agent's first one.
    pub fn sysfs(&self) -> PathBuf {
        self.state.join("sys")
    }

    pub fn resolv_conf(&self) -> PathBuf {
        self.state.join("resolv.conf")
    }

    pub fn hosts(&self) -> PathBuf {
        self.state.join("hosts")
    }

    pub fn hostname(&self) -> PathBuf {
        self.state.join("hostname")
    }
}
