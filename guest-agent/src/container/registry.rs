//! Every container the agent knows.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedMutexGuard, broadcast};

use super::Container;
use crate::error::{AgentError, Result};
use crate::proto::ContainerState;

/// Changes a slow listener may be behind; beyond that it gets the whole picture again.
const BACKLOG: usize = 256;

pub struct Registry {
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// One caller at a time creates, starts or deletes a container.
    gates: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    changes: broadcast::Sender<ContainerState>,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            containers: Mutex::default(),
            gates: Mutex::default(),
            changes: broadcast::Sender::new(BACKLOG),
        }
    }
}

impl Registry {
    /// Waits for the exclusive right to change a container, which need not exist.
    pub async fn gate(&self, id: &str) -> OwnedMutexGuard<()> {
        let gate = {
            let mut gates = lock(&self.gates);
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
            gates.entry(id.to_owned()).or_default().clone()
        };
        gate.lock_owned().await
    }

    pub fn find(&self, id: &str) -> Option<Arc<Container>> {
        lock(&self.containers).get(id).cloned()
    }

    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.find(id).ok_or_else(|| AgentError::no_container(id))
    }

    pub fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// Makes a container known and tells the listeners.
    pub fn insert(&self, container: Arc<Container>) {
        let state = container.state();
        lock(&self.containers).insert(container.id.clone(), container);
        self.publish(state);
    }

    pub fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    pub fn publish(&self, state: ContainerState) {
        // Nobody listening is no error.
        let _ = self.changes.send(state);
    }

    /// Changes from now on. Listening before looking (`states`) may show a change twice, but never loses one.
    pub fn listen(&self) -> broadcast::Receiver<ContainerState> {
        self.changes.subscribe()
    }

    pub fn states(&self) -> Vec<ContainerState> {
        self.all().iter().map(|container| container.state()).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_gate_is_for_one_and_forgotten_after() {
        let registry = Registry::default();
        let held = registry.gate("a").await;
        let other = registry.gate("b").await;
        drop(other);
        let again = registry.gate("a");
        tokio::pin!(again);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), &mut again).await.is_err());
        drop(held);
        drop(again.await);
        drop(registry.gate("c").await);
        assert_eq!(lock(&registry.gates).len(), 1);
    }
}
