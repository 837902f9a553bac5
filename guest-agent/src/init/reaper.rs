//! The one place that waits for children.
//!
//! As PID 1 (or a subreaper) the agent inherits every orphan, containers among them: the OCI runtime starts a
//! container, leaves, and the container becomes the agent's child. So nothing else may wait: the reaper takes every
//! status and hands it to whoever asked for that process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys::{self, ExitStatus};

/// Statuses kept for a process nobody has asked for yet. A pid file is read soon after its process started, so a
/// short memory is enough.
const REMEMBERED: usize = 256;

#[derive(Default)]
pub struct Reaper {
    children: Mutex<Children>,
}

#[derive(Default)]
struct Children {
    awaited: HashMap<i32, oneshot::Sender<ExitStatus>>,
    unclaimed: VecDeque<(i32, ExitStatus)>,
}

impl Reaper {
    /// Starts a program and promises its exit status.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(i32, oneshot::Receiver<ExitStatus>)> {
        // The lock is held over the start: a child that ends at once is not reaped before it is known.
        let mut children = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok((pid, children.watch(pid)))
    }

    /// Promises the exit status of a process that is, or is about to become, a child. A process that ended before
    /// the question is answered from memory; one never seen yields a closed channel.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        self.lock().watch(pid)
    }

    /// Reaps whenever a child ends. Never returns but for an error.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
    pub async fn run(&self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.reap();
            ended.recv().await;
        }
    }

    fn reap(&self) {
        let mut children = self.lock();
        while let Some((pid, status)) = sys::reap() {
            children.ended(pid, status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Children {
    fn watch(&mut self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        let (promise, answer) = oneshot::channel();
        let remembered = self.unclaimed.iter().rposition(|(known, _)| *known == pid);
        let remembered = remembered.and_then(|index| self.unclaimed.remove(index));
        if sys::exists(pid) {
            // Whatever was remembered belonged to an earlier process with this number.
            self.awaited.insert(pid, promise);
        } else if let Some((_, status)) = remembered {
            let _ = promise.send(status);
        }
        answer
    }

    fn ended(&mut self, pid: i32, status: ExitStatus) {
        if let Some(promise) = self.awaited.remove(&pid) {
            let _ = promise.send(status);
            return;
        }
        if self.unclaimed.len() == REMEMBERED {
            self.unclaimed.pop_front();
        }
        self.unclaimed.push_back((pid, status));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_SUCH_PROCESS: i32 = i32::MAX;

    #[test]
    fn a_status_that_came_before_the_question_is_remembered() {
        let mut children = Children::default();
        children.ended(NO_SUCH_PROCESS, ExitStatus::from_raw(3 << 8));
        assert_eq!(children.watch(NO_SUCH_PROCESS).try_recv().unwrap().code(), 3);
        assert!(children.watch(NO_SUCH_PROCESS).try_recv().is_err());
    }

    #[test]
    fn memory_of_an_earlier_process_with_the_same_number_is_dropped() {
        let me = i32::try_from(std::process::id()).unwrap();
        let mut children = Children::default();
        children.ended(me, ExitStatus::from_raw(0));
        let mut answer = children.watch(me);
        assert!(answer.try_recv().is_err());
        children.ended(me, ExitStatus::from_raw(5 << 8));
        assert_eq!(answer.try_recv().unwrap().code(), 5);
    }

    #[test]
    fn memory_is_bounded() {
        let mut children = Children::default();
        for pid in 0..1000 {
            children.ended(pid, ExitStatus::from_raw(0));
        }
        assert_eq!(children.unclaimed.len(), REMEMBERED);
    }
}
