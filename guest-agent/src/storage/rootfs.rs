//! A container's root file system: its image's layers below, a directory of the writable disk on top.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::mount::MsFlags;

use super::mounter::{Mount, Mounter};
use crate::config::Paths;
use crate::container::user_namespace::Owner;
use crate::error::{AgentError, Context, Result};

/// mount(2) takes one page of options, the ending zero byte included.
const OPTIONS_LIMIT: usize = 4095;

/// Stacks layers, given lowest first, and mounts the result; its root belongs to `owner`, if that is somebody else.
///
/// # Errors
/// `InvalidArgument` when there are more layers than the kernel's options can name, `ResourceExhausted` when the writable
/// disk is full.
pub fn assemble(
    paths: &Paths,
    id: &str,
    layers: &[PathBuf],
    owner: Option<Owner>,
    mounter: &dyn Mounter,
) -> Result<()> {
    let writable = paths.writable(id);
    let directory = |name: &str| -> Result<PathBuf> {
        let path = writable.join(name);
        fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        Ok(path)
    };
    let upper = directory("upper")?;
    if let Some(Owner { uid, gid }) = owner {
        chown(&upper, Some(uid.as_raw()), Some(gid.as_raw()))
            .context(|| format!("chown {}", upper.display()))?;
    }
    let work = directory("work")?;
    // An image without layers is an empty one.
    let layers = if layers.is_empty() { vec![directory("empty")?] } else { layers.to_vec() };
    let options = options(&layers, &upper, &work)?;
    let target = paths.rootfs(id);
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    mounter.mount(Mount {
        source: "overlay",
        target: &target,
        kind: "overlay",
        flags: MsFlags::empty(),
        options: &options,
    })
}

/// Unmounts and removes what `assemble` made. Goes on after an error, since what is left is worth removing too.
pub fn take_apart(paths: &Paths, id: &str, mounter: &dyn Mounter) {
    let target = paths.rootfs(id);
    if target.exists() {
        if let Err(error) = mounter.unmount(&target) {
            log::debug!("{error}");
        }
        // Only an empty directory goes: never what is below a mount that would not go.
        let _ = fs::remove_dir(&target);
        let _ = fs::remove_file(paths.bundle(id).join("config.json"));
        let _ = fs::remove_dir(paths.bundle(id));
    }
    discard(&paths.writable(id), &paths.trash());
}

/// Moves a directory out of the way at once and deletes it in the background, which may take long.
fn discard(path: &Path, trash: &Path) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let grave = trash.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
    let _ = fs::create_dir_all(trash);
    if fs::rename(path, &grave).is_ok() {
        tokio::task::spawn_blocking(move || {
            if let Err(error) = fs::remove_dir_all(&grave) {
                log::warn!("remove {}: {error}", grave.display());
            }
        });
    }
}

/// `volatile`: the writable layer lives no longer than the virtual machine, so syncing it is wasted time.
fn options(layers: &[PathBuf], upper: &Path, work: &Path) -> Result<String> {
    let topmost_first: Vec<_> = layers.iter().rev().map(|layer| layer.to_string_lossy()).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},volatile",
        topmost_first.join(":"),
        upper.display(),
        work.display()
    );
    if options.len() > OPTIONS_LIMIT {
        return Err(AgentError::InvalidArgument(format!(
            "{} layers are more than can be stacked",
            layers.len()
        )));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::super::mounter::fake::RecordingMounter;
    use super::*;

    #[test]
    fn layers_are_named_topmost_first() {
        let layers = ["/l/0".into(), "/l/1".into()];
        let options = options(&layers, Path::new("/u"), Path::new("/w")).unwrap();
        assert_eq!(options, "lowerdir=/l/1:/l/0,upperdir=/u,workdir=/w,volatile");
    }

    #[test]
    fn the_most_layers_an_image_may_have_fit() {
        let paths = Paths::new("/run/vmruntime", "crun");
        let layers: Vec<_> = (1000..1127).map(|number| paths.layers().join(number.to_string())).collect();
        let writable = paths.writable(&"f".repeat(128));
        assert!(options(&layers, &writable.join("upper"), &writable.join("work")).is_ok());
        let too_many = [layers.clone(), layers].concat();
        assert!(options(&too_many, &writable, &writable).is_err());
    }

    #[tokio::test]
    async fn what_is_assembled_is_taken_apart() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path(), "crun");
        let mounter = RecordingMounter::default();
        assemble(&paths, "c1", &[], None, &mounter).unwrap();
        assert!(paths.rootfs("c1").is_dir() && paths.writable("c1").join("upper").is_dir());
        take_apart(&paths, "c1", &mounter);
        assert!(!paths.bundle("c1").exists() && !paths.writable("c1").exists());
        assert_eq!(mounter.calls().len(), 2);
    }
}
