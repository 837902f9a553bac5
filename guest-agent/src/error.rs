//! The agent's one error type, and its translation to a gRPC status.
//!
//! ```text
//! AgentError
//! ├── NotFound            an unknown container or exec
//! ├── AlreadyExists       an id in use
//! ├── InvalidArgument     bad input
//! ├── OutOfRange          a sequence number that does not exist
//! ├── FailedPrecondition  a call in the wrong state
//! ├── ResourceExhausted   the scratch disk or the memory is full
//! ├── DeadlineExceeded    a device did not appear in time
//! ├── Aborted             a stream whose place another one took
//! ├── Unimplemented       something this mode of the agent cannot do
//! └── Internal            everything else
//! ```

use std::io;

use tonic::{Code, Status};

#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    OutOfRange(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    ResourceExhausted(String),
    #[error("{0}")]
    DeadlineExceeded(String),
    #[error("{0}")]
    Aborted(String),
    #[error("{0}")]
    Unimplemented(String),
    #[error("{0}")]
    Internal(String),
}

pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentError {
    pub fn no_container(id: &str) -> Self {
        Self::NotFound(format!("no container {id:?}"))
    }

    /// An operating system's error with the name of what was tried.
    fn from_os(what: &str, error: &io::Error) -> Self {
        let text = format!("{what}: {error}");
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::ENOMEM) => Self::ResourceExhausted(text),
            _ => Self::Internal(text),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::InvalidArgument(_) => Code::InvalidArgument,
            Self::OutOfRange(_) => Code::OutOfRange,
            Self::FailedPrecondition(_) => Code::FailedPrecondition,
            Self::ResourceExhausted(_) => Code::ResourceExhausted,
            Self::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Self::Aborted(_) => Code::Aborted,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::Internal(_) => Code::Internal,
        }
    }
}

impl From<AgentError> for Status {
    fn from(error: AgentError) -> Self {
        Status::new(error.code(), error.to_string())
    }
}

/// Adds what was being done to an operating system's error.
pub trait Context<T> {
    fn context<W: AsRef<str>>(self, what: impl FnOnce() -> W) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<W: AsRef<str>>(self, what: impl FnOnce() -> W) -> Result<T> {
        self.map_err(|error| AgentError::from_os(what().as_ref(), &error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_resource_exhausted_and_names_the_action() {
        let full: io::Result<()> = Err(io::Error::from_raw_os_error(libc::ENOSPC));
        let status = Status::from(full.context(|| "write config.json").unwrap_err());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("write config.json: "), "{}", status.message());
    }
}
