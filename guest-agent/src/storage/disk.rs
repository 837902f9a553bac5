//! Finds disks by serial number. Names like `sda` follow the order of arrival and mean nothing.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use super::uevent::Uevents;
use crate::error::{AgentError, Context, Result};

pub const DEADLINE: Duration = Duration::from_secs(10);
/// An announcement can be early: the serial may be readable only a moment after it. So look again now and then.
const RESCAN: Duration = Duration::from_millis(100);
/// When no announcement has come by then, the controllers are asked: the disk may be one that `Disk::remove` took away
/// and the host left in place.
const ASK: Duration = Duration::from_millis(300);
/// How long a file system may take to let go of its disk after it was unmounted.
const LET_GO: Duration = Duration::from_secs(2);
/// Between two attempts to open a disk whose driver is not done with it.
const NOT_READY: Duration = Duration::from_millis(5);

/// A block device as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    device: PathBuf,
    sysfs: PathBuf,
}

impl Disk {
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Waits until the disk can be opened: sysfs and the serial are there a moment before the driver is done.
    ///
    /// # Errors
    /// When it still cannot be opened at the deadline.
    pub async fn ready(&self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            match open(&self.device, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
                Err(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV | Errno::ENOMEDIUM | Errno::EBUSY)
                    if Instant::now() < end =>
                {
                    sleep(NOT_READY).await;
                }
                opened => return opened.map(drop).context(|| format!("open disk {}", self.device.display())),
            }
        }
    }

    /// Takes the disk away from the guest, once nothing uses it, so that the host may unplug it.
    ///
    /// # Errors
    /// When it stays in use.
    pub async fn remove(&self) -> Result<()> {
        self.wait_unused().await?;
        let delete = self.sysfs.join("device/delete");
        if !delete.exists() {
            return Ok(()); // Virtio disks leave when their PCI device does.
        }
        // The kernel waits for its own housekeeping in this.
        let removed =
            spawn_blocking(move || fs::write(delete, "1")).await.unwrap_or_else(|error| Err(error.into()));
        removed.context(|| format!("remove disk {}", self.device.display()))
    }

    /// An exclusive open fails as long as a file system is on the disk; mounts in a dying namespace may hold it for
    /// a moment. A disk that has left is unused, too.
    async fn wait_unused(&self) -> Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let end = Instant::now() + LET_GO;
        loop {
            match open(&self.device, flags, Mode::empty()) {
                Ok(_) | Err(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV) => return Ok(()),
                Err(error) if Instant::now() >= end => {
                    return Err(error)
                        .context(|| format!("wait for disk {} to be unused", self.device.display()));
                }
                Err(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    }
}

/// Where to look for disks.
pub struct Disks {
    sys_block: PathBuf,
    dev: PathBuf,
    scsi_hosts: PathBuf,
}

impl Default for Disks {
    fn default() -> Self {
        Self { sys_block: "/sys/block".into(), dev: "/dev".into(), scsi_hosts: "/sys/class/scsi_host".into() }
    }
}

impl Disks {
    #[cfg(test)]
    pub fn at(sys_block: PathBuf, dev: PathBuf) -> Self {
        Self { sys_block, dev, scsi_hosts: "/nonexistent".into() }
    }

    /// The disk with this serial, which may be on its way.
    ///
    /// # Errors
    /// `DeadlineExceeded`, naming the serial, when it does not appear.
    pub async fn wait(&self, serial: &str) -> Result<Disk> {
        if let Some(disk) = self.find(serial) {
            return Ok(disk);
        }
        let uevents = Uevents::listen().context(|| "listen to the kernel's device events")?;
        let begin = Instant::now();
        let mut ask = begin + ASK;
        loop {
            // After the socket is open, so that nothing falls between looking and listening.
            if let Some(disk) = self.find(serial) {
                return Ok(disk);
            }
            if begin.elapsed() >= DEADLINE {
                let seconds = DEADLINE.as_secs();
                return Err(AgentError::DeadlineExceeded(format!(
                    "the disk with serial {serial:?} did not appear within {seconds} s"
                )));
            }
            if Instant::now() >= ask {
                self.ask_controllers().await;
                ask = Instant::now() + 4 * ASK;
            }
            if let Ok(event) = timeout(RESCAN, uevents.block_device()).await {
                event.context(|| "receive the kernel's device events")?;
            }
        }
    }

    /// Lets every SCSI controller look for disks it has not announced.
    async fn ask_controllers(&self) {
        let hosts = fs::read_dir(&self.scsi_hosts).into_iter().flatten().flatten();
        let files: Vec<PathBuf> = hosts.map(|host| host.path().join("scan")).collect();
        let everything = "- - -";
        let asked = spawn_blocking(move || files.iter().try_for_each(|file| fs::write(file, everything)));
        if let Ok(Err(error)) = asked.await {
            log::debug!("look for disks: {error}");
        }
    }

    pub fn find(&self, serial: &str) -> Option<Disk> {
        self.each().find(|(own, _)| own == serial).map(|(_, disk)| disk)
    }

    /// Every disk that has a serial. Reading them takes time where there are many, so look once for many disks.
    pub fn all(&self) -> HashMap<String, Disk> {
        self.each().collect()
    }

    fn each(&self) -> impl Iterator<Item = (String, Disk)> {
        fs::read_dir(&self.sys_block).into_iter().flatten().flatten().filter_map(|entry| {
            let sysfs = entry.path();
            let name = entry.file_name().into_string().ok()?;
            Some((read_serial(&sysfs)?, Disk { device: self.dev.join(name), sysfs }))
        })
    }
}

/// A SCSI disk tells its serial in vital product data page 0x80 (a header of 4 bytes, then text), a virtio disk in
/// an attribute of its own.
fn read_serial(sysfs: &Path) -> Option<String> {
    let text = match fs::read(sysfs.join("device/vpd_pg80")) {
        Ok(page) => page.get(4..)?.to_vec(),
        Err(_) => fs::read(sysfs.join("serial")).ok()?,
    };
    let text = String::from_utf8(text).ok()?;
    let text = text.trim_matches(|letter: char| letter.is_whitespace() || letter == '\0');
    (!text.is_empty()).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> (tempfile::TempDir, Disks) {
        let directory = tempfile::tempdir().unwrap();
        let add = |path: &str, content: &[u8]| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        add("sda/device/vpd_pg80", b"\0\x80\0\x07layer-1");
        add("sdb/device/vpd_pg80", b"\0\x80\0\x0a  scratch ");
        add("vda/serial", b"virtio-1");
        add("loop0/size", b"0");
        let disks = Disks::at(directory.path().into(), "/dev".into());
        (directory, disks)
    }

    #[test]
    fn serials_of_scsi_and_virtio_disks() {
        let (_directory, disks) = disks();
        let device = |serial| disks.find(serial).map(|disk| disk.device().to_path_buf());
        assert_eq!(device("layer-1"), Some("/dev/sda".into()));
        assert_eq!(device("scratch"), Some("/dev/sdb".into()));
        assert_eq!(device("virtio-1"), Some("/dev/vda".into()));
        assert_eq!(device("layer-2"), None);
        assert_eq!(device(""), None);
    }
}
