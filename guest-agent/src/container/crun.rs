//! The OCI runtime crun, as a program.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::Value;
use tokio::time::timeout;

use super::oom;
use super::runtime::{Launch, OciRuntime, RuntimeError, Stdio};
use crate::config::{Config, Mode, Paths};
use crate::init::{self, reaper::Reaper};
use crate::sys;

/// No call takes this long, unless something is wrong.
const DEADLINE: Duration = Duration::from_secs(60);
/// Enough of a message to understand it.
const LONGEST_MESSAGE: usize = 2000;

pub struct Crun {
    paths: Paths,
    program: Program,
    reaper: Arc<Reaper>,
    next: AtomicU64,
}

impl Crun {
    pub fn new(config: &Config, reaper: Arc<Reaper>) -> Self {
        let paths = config.paths.clone();
        // On a host it may be a script, and crun sees to its own safety.
        let program = match config.mode {
            Mode::Vm => Program::sealed(paths.crun()),
            Mode::Host => Program::File(paths.crun().into()),
        };
        if let Program::Sealed(_) = &program {
            init::forget_file(paths.crun());
        }
        Self { paths, program, reaper, next: AtomicU64::new(0) }
    }

    /// Runs one verb to its end. The error is what crun wrote into its log, not into the container's streams.
    async fn run(&self, verb: &str, arguments: &[OsString], stdio: Stdio) -> Result<(), String> {
        self.run_with(verb, arguments, stdio, None).await
    }

    async fn run_with(
        &self,
        verb: &str,
        arguments: &[OsString],
        stdio: Stdio,
        oom_score: Option<i32>,
    ) -> Result<(), String> {
        let log = self.temporary("log");
        let root = self.paths.crun_root();
        let mut command = Command::new(self.program.path());
        command.arg0("crun").arg("--root").arg(&root).arg("--cgroup-manager=cgroupfs");
        command.arg("--log").arg(log.path()).arg("--log-format=json");
        command.arg(verb).args(arguments);
        command.stdin(process_stdio(stdio.stdin));
        command.stdout(process_stdio(stdio.stdout)).stderr(process_stdio(stdio.stderr));
        let started = oom::spawn_with(oom_score, || self.reaper.spawn(&mut command));
        // It holds the container's ends of the pipes, whose closing must be noticed.
        drop(command);
        let (pid, exit) = started.map_err(|error| format!("run {}: {error}", self.paths.crun().display()))?;
        match timeout(DEADLINE, exit).await {
            Ok(Ok(status)) if status.code() == 0 => Ok(()),
            Ok(Ok(status)) => {
                Err(explain(verb, status.code(), &fs::read_to_string(log.path()).unwrap_or_default()))
            }
            Ok(Err(_)) => Err(format!("crun {verb}: its exit status was lost")),
            Err(_) => {
                let _ = sys::kill(pid, libc::SIGKILL);
                Err(format!("crun {verb} did not end within {} s", DEADLINE.as_secs()))
            }
        }
    }

    /// Runs a verb that starts a process, and reads the process's number.
    async fn launch(
        &self,
        verb: &str,
        launch: Launch<'_>,
        mut arguments: Vec<OsString>,
    ) -> Result<i32, RuntimeError> {
        let pid_file = self.temporary("pid");
        arguments.extend(["--pid-file".into(), pid_file.path().into()]);
        if let Some(console) = launch.console {
            arguments.extend(["--console-socket".into(), console.into()]);
        }
        arguments.push(launch.id.into());
        self.run_with(verb, &arguments, launch.stdio, launch.oom_score)
            .await
            .map_err(|text| RuntimeError::about(launch.program, &text))?;
        let text = fs::read_to_string(pid_file.path()).unwrap_or_default();
        text.trim().parse().map_err(|_| RuntimeError::Other(format!("crun {verb} left no process number")))
    }

    fn temporary(&self, kind: &str) -> Temporary {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Temporary(self.paths.temporary().join(format!("crun-{number}.{kind}")))
    }
}

impl OciRuntime for Crun {
    fn create<'a>(&'a self, launch: Launch<'a>) -> BoxFuture<'a, Result<i32, RuntimeError>> {
        let bundle = vec!["--bundle".into(), launch.description.into()];
        Box::pin(self.launch("create", launch, bundle))
    }

    fn start<'a>(&'a self, id: &'a str, program: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            let result = self.run("start", &[id.into()], Stdio::default()).await;
            result.map_err(|text| RuntimeError::about(program, &text))
        })
    }

    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            if !self.paths.crun_root().join(id).exists() {
                return Ok(());
            }
            let result = self.run("delete", &["--force".into(), id.into()], Stdio::default()).await;
            result.map_err(RuntimeError::Other)
        })
    }

    fn update<'a>(&'a self, id: &'a str, resources: &'a Path) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            let arguments = ["--resources".into(), resources.into(), id.into()];
            let result = self.run("update", &arguments, Stdio::default()).await;
            result.map_err(RuntimeError::Other)
        })
    }

    fn exec<'a>(&'a self, launch: Launch<'a>) -> BoxFuture<'a, Result<i32, RuntimeError>> {
        // Detached: crun leaves as soon as the process runs, which then is the agent's child.
        let process = vec!["--detach".into(), "--process".into(), launch.description.into()];
        Box::pin(self.launch("exec", launch, process))
    }
}

fn process_stdio(descriptor: Option<OwnedFd>) -> ProcessStdio {
    descriptor.map_or_else(ProcessStdio::null, ProcessStdio::from)
}

/// The errors of a log with one JSON object a line.
fn explain(verb: &str, code: i32, log: &str) -> String {
    let message = |line: &str| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let level = entry.get("level").and_then(Value::as_str).unwrap_or("error");
        if level != "error" {
            return None;
        }
        entry.get("msg").and_then(Value::as_str).map(str::to_owned)
    };
    let messages: Vec<String> = log.lines().filter_map(message).collect();
    if messages.is_empty() {
        return format!("crun {verb} exited with {code} and no message");
    }
    format!("crun {verb}: {}", messages.join("; ")).chars().take(LONGEST_MESSAGE).collect()
}

/// The file to execute.
enum Program {
    /// A copy in memory that nobody can change.
    Sealed(OwnedFd),
    File(PathBuf),
}

impl Program {
    /// So that a container cannot overwrite the crun that enters it, crun runs from a copy: it makes one and starts
    /// anew, each time, unless it finds itself in a sealed one. One copy for all times halves the time crun takes.
    fn sealed(path: &Path) -> Self {
        match seal(path) {
            Ok(copy) => Self::Sealed(copy),
            Err(error) => {
                log::info!("copy {}: {error}", path.display());
                Self::File(path.into())
            }
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            // Of the child that executes it, in which the descriptor stays open until then.
            Self::Sealed(copy) => format!("/proc/self/fd/{}", copy.as_raw_fd()).into(),
            Self::File(path) => path.clone(),
        }
    }
}

fn seal(path: &Path) -> io::Result<OwnedFd> {
    let mut original = File::open(path)?;
    let mut copy = File::from(memfd_create(c"crun", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    io::copy(&mut original, &mut copy)?;
    let seals =
        SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(copy.into())
}

/// A file crun may write, removed in the end.
struct Temporary(PathBuf);

impl Temporary {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_copy_cannot_be_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("crun");
        fs::write(&path, "text").unwrap();
        let mut copy = File::from(seal(&path).unwrap());
        assert!(io::Write::write_all(&mut copy, b"other").is_err());
        assert!(matches!(Program::sealed(Path::new("/nonexistent")), Program::File(_)));
    }

    #[test]
    fn errors_come_from_the_log() {
        let log = concat!(
            r#"{"msg":"unimportant","level":"warning"}"#,
            "\n",
            r#"{"msg":"executable file `x` not found in $PATH: No such file or directory","level":"error"}"#,
            "\nnot json\n"
        );
        let text = explain("create", 1, log);
        assert_eq!(text, "crun create: executable file `x` not found in $PATH: No such file or directory");
        assert_eq!(explain("start", 3, ""), "crun start exited with 3 and no message");
    }
}
