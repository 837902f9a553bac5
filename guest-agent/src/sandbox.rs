//! The one pod this agent serves.

use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
pub struct Sandbox {
    /// Held while the sandbox is being set up: one at a time.
    pub setup: tokio::sync::Mutex<Progress>,
    ready: Mutex<Ready>,
}

/// Steps that must not be done twice when a set-up that failed half-way is repeated.
#[derive(Debug, Default)]
pub struct Progress {
    pub scratch: bool,
    pub shm: bool,
    pub pod_init: Option<i32>,
}

#[derive(Debug, Default)]
struct Ready {
    id: String,
    pod_init: Option<i32>,
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
        self.lock().pod_init
    }

    pub fn set_ready(&self, id: &str, pod_init: Option<i32>) {
        *self.lock() = Ready { id: id.to_owned(), pod_init };
    }

    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
