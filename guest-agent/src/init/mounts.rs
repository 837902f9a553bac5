//! The file systems every Linux user space expects.

use std::fs::{self, DirBuilder, OpenOptions};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::error::{Context, Result};

const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The parent of every container's control group.
const CONTAINERS: &str = "/sys/fs/cgroup/vmruntime";

struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
    /// Whether a guest without it can still do its work.
    optional: bool,
}

const SECURE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_SUID: MsFlags = MsFlags::MS_NOSUID;
const STRICT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const fn entry(kind: &'static str, target: &'static str, flags: MsFlags, options: &'static str) -> Entry {
    Entry { kind, target, flags, options, optional: false }
}

const KERNEL: &[Entry] = &[
    entry("proc", "/proc", SECURE, ""),
    entry("sysfs", "/sys", SECURE, ""),
    entry("devtmpfs", "/dev", NO_SUID, "mode=0755"),
];

const DIRECTORIES: &[Entry] = &[
    entry(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "ptmxmode=0666,mode=0620,gid=5",
    ),
    entry("tmpfs", "/run", STRICT, "mode=0755"),
    entry("tmpfs", "/tmp", STRICT, "mode=1777"),
    entry("cgroup2", CGROUP_ROOT, SECURE, "nsdelegate"),
    Entry { kind: "mqueue", target: "/dev/mqueue", flags: SECURE, options: "", optional: true },
];

/// Mounts what the rest of the start reads.
pub fn kernel_file_systems() -> Result<()> {
    KERNEL.iter().try_for_each(mount_entry)
}

/// Mounts what containers and the agent write.
pub fn directories() -> Result<()> {
    DIRECTORIES.iter().try_for_each(mount_entry)
}

fn mount_entry(entry: &Entry) -> Result<()> {
    // The directory may be there already; if it cannot be made, mounting says why.
    let _ = DirBuilder::new().recursive(true).mode(0o755).create(entry.target);
    let outcome =
        mount(Some(entry.kind), Path::new(entry.target), Some(entry.kind), entry.flags, Some(entry.options));
    match outcome {
        // Kernels with CONFIG_DEVTMPFS_MOUNT have mounted /dev themselves.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) if entry.optional => {
            log::info!("mount {}: {error}", entry.target);
            Ok(())
        }
        Err(error) => Err(error).context(|| format!("mount {} on {}", entry.kind, entry.target)),
    }
}

/// Points the standard streams at the console, or the kernel log where there is none.
pub fn open_console() {
    let output =
        ["/dev/console", "/dev/kmsg"].iter().find_map(|path| OpenOptions::new().write(true).open(path).ok());
    if let Some(output) = output {
        let _ = dup2_stdout(&output);
        let _ = dup2_stderr(&output);
    }
    if let Ok(nothing) = OpenOptions::new().read(true).open("/dev/null") {
        let _ = dup2_stdin(nothing);
    }
}

/// Makes every controller available to the containers' groups. The agent stays in the root group, which may hold
/// processes beside groups with controllers.
pub fn delegate_cgroups() -> Result<()> {
    fs::create_dir_all(CONTAINERS).context(|| format!("create {CONTAINERS}"))?;
    enable_controllers(CGROUP_ROOT)?;
    enable_controllers(CONTAINERS)
}

fn enable_controllers(group: &str) -> Result<()> {
    let available = format!("{group}/cgroup.controllers");
    let available = fs::read_to_string(&available).context(|| format!("read {available}"))?;
    let control = format!("{group}/cgroup.subtree_control");
    let all: Vec<String> = available.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    if fs::write(&control, all.join(" ")).is_ok() {
        return Ok(());
    }
    // One at a time: a controller that cannot be had must not take the others with it.
    for controller in available.split_ascii_whitespace() {
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            log::warn!("enable the {controller} controller in {group}: {error}");
        }
    }
    Ok(())
}
