//! Volumes: the pod's virtio-fs share, file systems in memory, images mounted read-only.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::mount::MsFlags;
use tokio::time::{Instant, sleep};

use super::disk::DEADLINE;
use super::mounter::{Mount, Mounter};
use crate::config::Paths;
use crate::error::{AgentError, Context, Result};
use crate::proto::MemoryVolume;

/// Between two attempts to mount a share whose device is on its way; the kernel announces no such devices.
const NOT_YET: Duration = Duration::from_millis(5);

/// What the pod's containers have in common.
#[derive(Default)]
pub struct PodVolumes {
    share_mounted: tokio::sync::Mutex<bool>,
}

impl PodVolumes {
    /// Mounts the share with this tag, unless it is mounted.
    ///
    /// # Errors
    /// When its device does not appear in time.
    pub async fn mount_share(&self, paths: &Paths, tag: &str, mounter: &dyn Mounter) -> Result<()> {
        let mut mounted = self.share_mounted.lock().await;
        if *mounted || tag.is_empty() {
            return Ok(());
        }
        let target = paths.share();
        fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
        let flags = MsFlags::empty();
        let mount = Mount { source: tag, target: &target, kind: "virtiofs", flags, options: "" };
        let end = Instant::now() + DEADLINE;
        while let Err(error) = mounter.mount(mount) {
            if Instant::now() >= end {
                return Err(error);
            }
            sleep(NOT_YET).await;
        }
        *mounted = true;
        Ok(())
    }
}

/// Makes the volume's file system, unless an earlier container has.
///
/// # Errors
/// `InvalidArgument` for a key that is no name.
pub fn mount_memory(paths: &Paths, volume: &MemoryVolume, mounter: &dyn Mounter) -> Result<()> {
    crate::validate::id("memory volume", &volume.key)?;
    let target = paths.memory_volume(&volume.key);
    if target.exists() {
        return Ok(());
    }
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    let size = if volume.size_bytes == 0 { String::new() } else { format!(",size={}", volume.size_bytes) };
    let options = format!("mode={:o}{size}", volume.mode & 0o7777);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounted = mounter
        .mount(Mount { source: "memory", target: &target, kind: "tmpfs", flags, options: &options })
        .and_then(|()| {
            chown(&target, Some(volume.uid), Some(volume.gid))
                .context(|| format!("chown {}", target.display()))
        })
        // A change of owner takes the set-group-id bit away.
        .and_then(|()| {
            fs::set_permissions(&target, Permissions::from_mode(volume.mode & 0o7777))
                .context(|| format!("chmod {}", target.display()))
        });
    if mounted.is_err() {
        let _ = mounter.unmount(&target);
        let _ = fs::remove_dir(&target);
    }
    mounted
}

/// Stacks an image's layers, given lowest first, read-only.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_image(target: &Path, layers: &[PathBuf], mounter: &dyn Mounter) -> Result<()> {
    fs::create_dir_all(target).context(|| format!("create {}", target.display()))?;
    // Without a writable layer an overlay takes no fewer than two; an empty one at the bottom adds nothing.
    let empty = target.with_extension("empty");
    fs::create_dir_all(&empty).context(|| format!("create {}", empty.display()))?;
    let stack: Vec<_> =
        layers.iter().rev().chain([&empty, &empty]).map(|path| path.to_string_lossy()).collect();
    let keep = if layers.is_empty() { stack.len() } else { stack.len() - 1 };
    let options = format!("lowerdir={}", stack.get(..keep).unwrap_or_default().join(":"));
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mounter.mount(Mount { source: "image", target, kind: "overlay", flags, options: &options })
}

/// Unmounts what `mount_image` made.
pub fn unmount_image(target: &Path, mounter: &dyn Mounter) {
    if !target.exists() {
        return;
    }
    if let Err(error) = mounter.unmount(target) {
        log::debug!("{error}");
    }
    let _ = fs::remove_dir(target);
    let _ = fs::remove_dir(target.with_extension("empty"));
}

/// Turns the source of a bind mount, as the host names it (see `agent.proto`), into a path here.
///
/// # Errors
/// `InvalidArgument` when it leads out of its volume or names none.
pub fn resolve(paths: &Paths, id: &str, source: &str) -> Result<PathBuf> {
    let Some((kind, rest)) = source.split_once(':') else { return Ok(source.into()) };
    let rest = Path::new(rest);
    if !rest.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(unusable(source));
    }
    match kind {
        "share" => Ok(paths.share().join(rest)),
        "memory" => {
            let path = paths.memory_volume("").join(rest);
            // kubelet has made the part on the host, where the volume's content is not.
            if rest.components().count() > 1 && !path.exists() {
                make_open_directory(&path)?;
            }
            inside(&paths.memory_volume(&first(rest)), &path, source)
        }
        "image" => {
            let number = first(rest).parse().map_err(|_| unusable(source))?;
            let root = paths.image_volume(id, number);
            let path = root.join(rest.components().skip(1).collect::<PathBuf>());
            inside(&root, &path, source)
        }
        _ => Ok(source.into()),
    }
}

fn first(path: &Path) -> String {
    path.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned()).unwrap_or_default()
}

fn make_open_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(|| format!("create {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o777)).context(|| format!("chmod {}", path.display()))
}

/// A volume's content may hold symbolic links that lead anywhere.
fn inside(root: &Path, path: &Path, source: &str) -> Result<PathBuf> {
    let real = |path: &Path| path.canonicalize().map_err(|error| missing(source, &error));
    let (root, path) = (real(root)?, real(path)?);
    if path.starts_with(&root) { Ok(path) } else { Err(unusable(source)) }
}

fn missing(source: &str, error: &std::io::Error) -> AgentError {
    AgentError::InvalidArgument(format!("the mount source {source:?} cannot be found in its volume: {error}"))
}

fn unusable(source: &str) -> AgentError {
    AgentError::InvalidArgument(format!("the mount source {source:?} does not stay in its volume"))
}

#[cfg(test)]
mod tests {
    use super::super::mounter::fake::RecordingMounter;
    use super::*;

    #[test]
    fn sources_stay_in_their_volume() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path(), "crun");
        assert_eq!(resolve(&paths, "c", "/plain").unwrap(), Path::new("/plain"));
        assert_eq!(resolve(&paths, "c", "share:c/0").unwrap(), paths.share().join("c/0"));
        assert!(resolve(&paths, "c", "share:../x").is_err());
        assert!(resolve(&paths, "c", "share:/x").is_err());
        let root = paths.image_volume("c", 0);
        fs::create_dir_all(root.join("etc")).unwrap();
        std::os::unix::fs::symlink("/", root.join("out")).unwrap();
        assert!(resolve(&paths, "c", "image:0/etc").unwrap().ends_with("etc"));
        for bad in ["image:0/out", "image:0/none", "image:1", "image:x", "image:"] {
            assert!(resolve(&paths, "c", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_part_of_a_memory_volume_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path(), "crun");
        fs::create_dir_all(paths.memory_volume("k")).unwrap();
        let path = resolve(&paths, "c", "memory:k/sub/dir").unwrap();
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o777);
    }

    #[test]
    fn an_image_of_one_layer_gets_an_empty_one_below() {
        let directory = tempfile::tempdir().unwrap();
        let mounter = RecordingMounter::default();
        mount_image(&directory.path().join("v"), &["/l/1".into()], &mounter).unwrap();
        let calls = mounter.calls();
        assert!(calls[0].contains("lowerdir=/l/1:") && calls[0].matches(".empty").count() == 1, "{calls:?}");
    }

    #[tokio::test]
    async fn the_share_is_mounted_once() {
        let directory = tempfile::tempdir().unwrap();
        let (paths, mounter) = (Paths::new(directory.path(), "crun"), RecordingMounter::default());
        let volumes = PodVolumes::default();
        for tag in ["", "t", "t"] {
            volumes.mount_share(&paths, tag, &mounter).await.unwrap();
        }
        assert_eq!(mounter.calls().len(), 1);
    }
}
