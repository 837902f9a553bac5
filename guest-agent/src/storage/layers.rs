//! Read-only image layers, shared by the containers that use them.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::join_all;
use nix::mount::MsFlags;

use super::disk::{Disk, Disks};
use super::mounter::{Mount, Mounter};
use crate::container::user_namespace::UserNamespace;
use crate::error::{Context, Result};

pub struct LayerStore {
    directory: PathBuf,
    disks: Disks,
    mounter: Arc<dyn Mounter>,
    layers: Mutex<BTreeMap<String, Layer>>,
}

#[derive(Default)]
struct Layer {
    /// Containers that use it or are about to.
    users: usize,
    mounted: Option<Mounted>,
}

#[derive(Clone)]
struct Mounted {
    number: u32,
    disk: Disk,
}

impl LayerStore {
    pub fn new(directory: PathBuf, mounter: Arc<dyn Mounter>) -> Self {
        Self { directory, disks: Disks::default(), mounter, layers: Mutex::default() }
    }

    /// Mounts the layers that are not mounted yet and counts one user more for each; the answer has the mount points in the
    /// order of the serials. Nothing stays counted when one fails. With a user namespace, which is the same for all of a
    /// pod's containers, the files belong to its ids.
    ///
    /// # Errors
    /// `DeadlineExceeded` for a disk that does not appear, `Internal` for one that cannot be mounted.
    pub async fn acquire(
        &self,
        serials: &[String],
        namespace: Option<&UserNamespace>,
    ) -> Result<Vec<PathBuf>> {
        // Counted before anything is awaited: a layer someone waits for must not be released meanwhile.
        self.count(serials);
        let present = self.disks.all();
        let mut paths = Vec::with_capacity(serials.len());
        for serial in serials {
            match self.mounted(serial, &present, namespace).await {
                Ok(path) => paths.push(path),
                Err(error) => {
                    self.release(serials).await;
                    return Err(error);
                }
            }
        }
        Ok(paths)
    }

    /// Counts one user less for each layer. Those without any are unmounted and their disks removed; the answer
    /// has the serials of the disks that are free now.
    pub async fn release(&self, serials: &[String]) -> Vec<String> {
        // Beside each other: each one waits for the kernel.
        let releases =
            self.discount(serials).into_iter().map(|(serial, mounted)| self.release_one(serial, mounted));
        join_all(releases).await.into_iter().flatten().collect()
    }

    async fn release_one(&self, serial: String, mounted: Option<Mounted>) -> Option<String> {
        match self.unmount(&serial, mounted).await {
            Ok(()) => Some(serial),
            Err(error) => {
                log::warn!("layer {serial}: {error}");
                None
            }
        }
    }

    fn count(&self, serials: &[String]) {
        let mut layers = self.lock();
        for serial in serials {
            layers.entry(serial.clone()).or_default().users += 1;
        }
    }

    fn discount(&self, serials: &[String]) -> Vec<(String, Option<Mounted>)> {
        let mut layers = self.lock();
        let mut unused = Vec::new();
        for serial in serials {
            let Some(layer) = layers.get_mut(serial) else { continue };
            layer.users = layer.users.saturating_sub(1);
            if layer.users == 0 {
                let mounted = layers.remove(serial).and_then(|layer| layer.mounted);
                unused.push((serial.clone(), mounted));
            }
        }
        unused
    }

    async fn mounted(
        &self,
        serial: &str,
        present: &HashMap<String, Disk>,
        namespace: Option<&UserNamespace>,
    ) -> Result<PathBuf> {
        if let Some(mounted) = self.lock().get(serial).and_then(|layer| layer.mounted.as_ref()) {
            return Ok(self.path(mounted.number));
        }
        let disk = match present.get(serial) {
            Some(disk) => disk.clone(),
            None => self.disks.wait(serial).await?,
        };
        disk.ready().await?;
        self.mount(serial, disk, namespace)
    }

    fn mount(&self, serial: &str, disk: Disk, namespace: Option<&UserNamespace>) -> Result<PathBuf> {
        let mut layers = self.lock();
        if let Some(mounted) = layers.get(serial).and_then(|layer| layer.mounted.as_ref()) {
            return Ok(self.path(mounted.number)); // Another container was faster.
        }
        let number = free_number(&layers);
        let path = self.path(number);
        std::fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        self.mounter.mount(Mount {
            source: &disk.device().to_string_lossy(),
            target: &path,
            kind: "erofs",
            flags: MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME,
            options: "",
        })?;
        if let Some(namespace) = namespace
            && let Err(error) = self.mounter.map_ids(&path, namespace.as_fd())
        {
            let _ = self.mounter.unmount(&path);
            return Err(error);
        }
        if let Some(layer) = layers.get_mut(serial) {
            layer.mounted = Some(Mounted { number, disk });
        }
        Ok(path)
    }

    async fn unmount(&self, serial: &str, mounted: Option<Mounted>) -> Result<()> {
        match mounted {
            Some(Mounted { number, disk }) => {
                let path = self.path(number);
                self.mounter.unmount(&path)?;
                remove_mount_point(&path);
                disk.remove().await
            }
            // It never came to mounting; the disk may be there all the same.
            None => match self.disks.find(serial) {
                Some(disk) => disk.remove().await,
                None => Ok(()),
            },
        }
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(number.to_string())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Layer>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn free_number(layers: &BTreeMap<String, Layer>) -> u32 {
    let used =
        |number| layers.values().flat_map(|layer| &layer.mounted).any(|mounted| mounted.number == number);
    (0..).find(|number| !used(*number)).unwrap_or(u32::MAX)
}

fn remove_mount_point(path: &Path) {
    if let Err(error) = std::fs::remove_dir(path) {
        log::debug!("remove {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::super::mounter::fake::RecordingMounter;
    use super::*;

    struct Fixture {
        _directory: tempfile::TempDir,
        mounter: Arc<RecordingMounter>,
        store: LayerStore,
    }

    impl Fixture {
        fn new(serials: &[&str], mounter: RecordingMounter) -> Self {
            let directory = tempfile::tempdir().unwrap();
            for (index, serial) in serials.iter().enumerate() {
                let disk = directory.path().join(format!("block/null{index}"));
                std::fs::create_dir_all(&disk).unwrap();
                std::fs::write(disk.join("serial"), serial).unwrap();
                std::fs::write(directory.path().join(format!("null{index}")), "").unwrap();
            }
            let mounter = Arc::new(mounter);
            let mut store = LayerStore::new(directory.path().join("l"), mounter.clone());
            store.disks = Disks::at(directory.path().join("block"), directory.path().into());
            Self { _directory: directory, mounter, store }
        }

        fn verbs(&self) -> Vec<String> {
            let verb = |call: &String| call.split(' ').next().unwrap().to_owned();
            self.mounter.calls().iter().map(verb).collect()
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_shared_layer_is_mounted_once_and_stays_while_used() {
        let fixture = Fixture::new(&["base", "app"], RecordingMounter::default());
        let first = fixture.store.acquire(&names(&["base"]), None).await.unwrap();
        let both = fixture.store.acquire(&names(&["base", "app"]), None).await.unwrap();
        assert_eq!(first[0], both[0]);
        assert_ne!(both[0], both[1]);
        assert_eq!(fixture.verbs(), ["mount", "mount"]);
        assert!(fixture.store.discount(&names(&["base"])).is_empty());
        let unused = fixture.store.discount(&names(&["base", "app"]));
        assert_eq!(unused.len(), 2);
    }

    #[tokio::test]
    async fn a_layer_that_cannot_be_mounted_is_not_counted() {
        let refusing = RecordingMounter { refuse: Some("/l/1"), ..RecordingMounter::default() };
        let fixture = Fixture::new(&["base", "app"], refusing);
        assert!(fixture.store.acquire(&names(&["base", "app"]), None).await.is_err());
        assert!(fixture.store.lock().is_empty());
        assert_eq!(fixture.verbs(), ["mount", "mount", "unmount"]);
    }

    #[test]
    fn numbers_are_used_again() {
        let disk = Disks::at("/nonexistent".into(), "/nonexistent".into()).find("x");
        assert!(disk.is_none());
        assert_eq!(free_number(&BTreeMap::new()), 0);
    }
}
