//! What is kept open of a container for whoever attaches.

use std::sync::{Arc, Mutex, PoisonError};

use crate::io::file::AsyncFile;
use crate::io::terminal;
use crate::proto::TerminalSize;

/// The agent's ends of a container's input and terminal.
#[derive(Default)]
pub struct Streams {
    terminal: Option<Arc<AsyncFile>>,
    input: Mutex<Option<Arc<AsyncFile>>>,
    once: bool,
}

impl Streams {
    /// Of a container on a terminal; its input counts only if one was asked for.
    pub fn on_terminal(terminal: Arc<AsyncFile>, input: bool) -> Self {
        let input = Mutex::new(input.then(|| terminal.clone()));
        Self { terminal: Some(terminal), input, once: false }
    }

    /// Of a container on pipes. `once`: its input ends with the first client's.
    pub fn on_pipes(input: Option<Arc<AsyncFile>>, once: bool) -> Self {
        Self { terminal: None, input: Mutex::new(input), once }
    }

    /// Where to write input, while there is any.
    pub fn input(&self) -> Option<Arc<AsyncFile>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the end of a client's input is the end of the container's.
    pub fn ends_with_client(&self) -> bool {
        self.once
    }

    /// Closes the input: the container reads its end as soon as nobody writes any more.
    pub fn close_input(&self) {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub fn resize(&self, size: &TerminalSize) {
        if let Some(terminal) = &self.terminal {
            let _ = terminal::resize(terminal.as_ref(), size);
        }
    }
}
