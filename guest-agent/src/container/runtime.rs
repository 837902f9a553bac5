//! What the agent needs of an OCI runtime.

use std::os::fd::OwnedFd;
use std::path::Path;

use futures_util::future::BoxFuture;

use crate::error::AgentError;

/// Why the OCI runtime did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    #[error("exec: {program:?}: executable file not found in $PATH")]
    NotFound { program: String },
    #[error("exec: {program:?}: permission denied")]
    NotExecutable { program: String },
    #[error("{0}")]
    Other(String),
}

/// What crun says of a file that is there and cannot be run; the second is a directory's.
const DENIALS: [&str; 2] = ["Permission denied", "Operation not permitted"];

impl RuntimeError {
    /// Reads the runtime's own words about a program it was to run.
    pub fn about(program: &str, text: &str) -> Self {
        let program = program.to_owned();
        if text.contains("executable file") && text.contains("not found") {
            Self::NotFound { program }
        } else if text.contains("open executable") && DENIALS.iter().any(|denial| text.contains(denial)) {
            Self::NotExecutable { program }
        } else {
            Self::Other(text.to_owned())
        }
    }

    /// What a shell would exit with.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } | Self::Other(_) => 126,
        }
    }
}

impl From<RuntimeError> for AgentError {
    fn from(error: RuntimeError) -> Self {
        let text = error.to_string();
        match error {
            RuntimeError::Other(_) if text.contains("No space left on device") => {
                Self::ResourceExhausted(text)
            }
            RuntimeError::Other(_) => Self::Internal(text),
            _ => Self::InvalidArgument(text),
        }
    }
}

/// Standard streams of a new process; what is missing is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// A process that is to run, in a new container or an old one.
#[derive(Debug)]
pub struct Launch<'a> {
    pub id: &'a str,
    /// The bundle's directory for a container, the process's JSON file for an exec.
    pub description: &'a Path,
    /// The program's name, for errors about it.
    pub program: &'a str,
    /// Where to send the terminal's master side.
    pub console: Option<&'a Path>,
    pub stdio: Stdio,
    /// How ready the kernel is to take it when memory runs out; `None`: as the agent.
    pub oom_score: Option<i32>,
}

type Answer<'a, T> = BoxFuture<'a, Result<T, RuntimeError>>;

pub trait OciRuntime: Send + Sync {
    /// Makes a container and answers its first process, which waits for `start`.
    fn create<'a>(&'a self, launch: Launch<'a>) -> Answer<'a, i32>;

    fn start<'a>(&'a self, id: &'a str, program: &'a str) -> Answer<'a, ()>;

    /// Removes a container, killing it if need be. An unknown one is removed already.
    fn delete<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;

    /// Changes a container's limits to what a JSON file says (`linux.resources` of the OCI spec).
    fn update<'a>(&'a self, id: &'a str, resources: &'a Path) -> Answer<'a, ()>;

    /// Runs one more process in a container and answers its number.
    fn exec<'a>(&'a self, launch: Launch<'a>) -> Answer<'a, i32>;
}

#[cfg(test)]
pub mod fake {
    use std::sync::Mutex;

    use super::*;

    /// Writes down what it is asked; every process it "makes" has the number `pid`.
    #[derive(Default)]
    pub struct RecordingRuntime {
        pub calls: Mutex<Vec<String>>,
        pub pid: i32,
        pub fail: Option<RuntimeError>,
    }

    impl RecordingRuntime {
        fn answer<'a, T: Send + 'a>(&'a self, call: String, value: T) -> Answer<'a, T> {
            self.calls.lock().unwrap().push(call);
            let result = self.fail.clone().map_or(Ok(value), Err);
            Box::pin(async { result })
        }
    }

    impl OciRuntime for RecordingRuntime {
        fn create<'a>(&'a self, launch: Launch<'a>) -> Answer<'a, i32> {
            self.answer(format!("create {} {}", launch.id, launch.program), self.pid)
        }

        fn start<'a>(&'a self, id: &'a str, _program: &'a str) -> Answer<'a, ()> {
            self.answer(format!("start {id}"), ())
        }

        fn delete<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
            self.answer(format!("delete {id}"), ())
        }

        fn update<'a>(&'a self, id: &'a str, resources: &'a Path) -> Answer<'a, ()> {
            self.answer(format!("update {id} {}", std::fs::read_to_string(resources).unwrap()), ())
        }

        fn exec<'a>(&'a self, launch: Launch<'a>) -> Answer<'a, i32> {
            self.answer(format!("exec {} {}", launch.id, launch.program), self.pid)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_words_are_understood() {
        let about = |text| RuntimeError::about("x", text);
        let missing = about("executable file `x` not found in $PATH: No such file or directory");
        assert_eq!(missing.to_string(), "exec: \"x\": executable file not found in $PATH");
        assert_eq!(missing.exit_code(), 127);
        let forbidden = about("open executable: Permission denied");
        assert_eq!(forbidden.to_string(), "exec: \"x\": permission denied");
        assert_eq!(forbidden.exit_code(), 126);
        let directory = about("open executable: Operation not permitted");
        assert_eq!(directory.exit_code(), 126);
        assert!(matches!(AgentError::from(about("mount `y`: no")), AgentError::Internal(_)));
    }
}
