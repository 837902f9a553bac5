//! What every RPC works with.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{Config, Mode};
use crate::container::crun::Crun;
use crate::container::registry::Registry;
use crate::container::runtime::OciRuntime;
use crate::error::{Context, Result};
use crate::init::reaper::Reaper;
use crate::network::home;
use crate::sandbox::Sandbox;
use crate::storage::layers::LayerStore;
use crate::storage::mounter::{Mounter, SystemMounter};
use crate::storage::volumes::PodVolumes;

pub struct Agent {
    pub config: Config,
    pub reaper: Arc<Reaper>,
    pub runtime: Arc<dyn OciRuntime>,
    pub mounter: Arc<dyn Mounter>,
    pub layers: LayerStore,
    pub volumes: PodVolumes,
    pub registry: Registry,
    pub sandbox: Sandbox,
    /// On the clock that began with the kernel.
    pub started_us: u64,
    next_temporary: AtomicU64,
}

impl Agent {
    /// An agent that works on the real system.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn new(config: Config, reaper: Arc<Reaper>, started_us: u64) -> Result<Self> {
        let runtime = Arc::new(Crun::new(&config, reaper.clone()));
        Self::with(config, reaper, runtime, Arc::new(SystemMounter), started_us)
    }

    /// An agent that works on whatever it is given.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn with(
        config: Config,
        reaper: Arc<Reaper>,
        runtime: Arc<dyn OciRuntime>,
        mounter: Arc<dyn Mounter>,
        started_us: u64,
    ) -> Result<Self> {
        for directory in [config.paths.state().into(), config.paths.temporary(), config.paths.crun_root()] {
            fs::create_dir_all(&directory).context(|| format!("create {}", directory.display()))?;
        }
        let layers = LayerStore::new(config.paths.layers(), mounter.clone());
        Ok(Self {
            config,
            reaper,
            runtime,
            mounter,
            layers,
            volumes: PodVolumes::default(),
            registry: Registry::default(),
            sandbox: Sandbox::default(),
            started_us,
            next_temporary: AtomicU64::new(0),
        })
    }

    pub fn in_vm(&self) -> bool {
        self.config.mode == Mode::Vm
    }

    /// Where the kernel shows the pod's interfaces.
    pub fn sysfs(&self) -> PathBuf {
        if home::is_left() { self.config.paths.sysfs() } else { "/sys".into() }
    }

    /// A new name for a short-lived file.
    pub fn temporary_path(&self, kind: &str) -> PathBuf {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.config.paths.temporary().join(format!("{number}.{kind}"))
    }

    pub fn console_socket_path(&self) -> PathBuf {
        self.temporary_path("console")
    }
}
