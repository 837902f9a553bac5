//! The one pod this agent serves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::container::pod_init::PodNamespaces;
use crate::container::user_namespace::Owner;
use crate::error::Result;

#[derive(Default)]
pub struct Sandbox {
    /// Held while the sandbox is being set up: one at a time.
    pub setup: tokio::sync::Mutex<Progress>,
    ready: Mutex<Ready>,
}

/// Steps that have been done ahead, or by a set-up that failed half-way, and must not be done twice.
#[derive(Debug, Default)]
pub struct Progress {
    /// The serial of the disk that is mounted.
    pub scratch: Option<String>,
    /// The size of the shared memory that is mounted; the host's has none.
    pub shm: Option<u64>,
    /// The process of a PID namespace that is there for whoever wants it.
    pub spare_init: Option<i32>,
    pub namespaces: Option<Arc<PodNamespaces>>,
}

#[derive(Debug, Default)]
struct Ready {
    id: String,
    namespaces: Arc<PodNamespaces>,
}

impl Sandbox {
    /// Empty until the set-up has succeeded.
    pub fn id(&self) -> String {
        self.lock().id.clone()
    }

    pub fn is_ready(&self) -> bool {
        !self.lock().id.is_empty()
    }

    /// The process that holds the shared PID namespace.
    pub fn pod_init(&self) -> Option<i32> {
        self.lock().namespaces.init
    }

    /// What the pod's containers share.
    pub fn namespaces(&self) -> Arc<PodNamespaces> {
        self.lock().namespaces.clone()
    }

    /// Whose the files of a container's process are, as the agent sees them; `None`: of the user with the same ids.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that the pod's user namespace does not have.
    pub fn owner(&self, uid: u32, gid: u32) -> Result<Option<Owner>> {
        self.namespaces().user().map(|user| user.owner(uid, gid)).transpose()
    }

    pub fn set_ready(&self, id: &str, namespaces: Arc<PodNamespaces>) {
        *self.lock() = Ready { id: id.to_owned(), namespaces };
    }

    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
