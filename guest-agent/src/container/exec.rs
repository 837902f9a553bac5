//! One more process in a running container.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tonic::Status;

use super::runtime::{Launch, RuntimeError, Stdio};
use super::user_namespace::Owner;
use super::{Container, descendants, spec};
use crate::agent::Agent;
use crate::error::{AgentError, Context, Result};
use crate::io::file::{AsyncFile, pipe_of};
use crate::io::terminal::{self, ConsoleSocket};
use crate::proto::exec_response::Message;
use crate::proto::{ExecResponse, ExecStart, TerminalSize};
use crate::sys::{self, ExitStatus};

/// What is sent at once.
const CHUNK: usize = 32 * 1024;
/// Someone in the background may hold the streams open when the process has exited. What comes within this time of
/// silence is still passed on.
const SILENCE: Duration = Duration::from_millis(500);
/// Ctrl-D: how a terminal says that nothing more comes.
const END_OF_INPUT: &[u8] = &[4];

pub type Answers = mpsc::Sender<std::result::Result<ExecResponse, Status>>;

/// A process that runs, with the agent's ends of its streams.
pub struct Session {
    pub exit: oneshot::Receiver<ExitStatus>,
    pid: i32,
    input: Input,
    outputs: Vec<(Arc<AsyncFile>, Wrap)>,
}

enum Input {
    None,
    Pipe(AsyncFile),
    Terminal(Arc<AsyncFile>),
}

/// Makes an answer of bytes.
type Wrap = fn(Vec<u8>) -> Message;

/// Why there is no session.
pub enum Refusal {
    /// The call was wrong.
    Call(AgentError),
    /// The program could not be run.
    Program(RuntimeError),
}

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Self {
        Self::Call(error)
    }
}

/// Starts the process.
///
/// # Errors
/// `Refusal` says whether the call or the program is to blame.
pub async fn start(
    agent: &Agent,
    container: &Container,
    start: &ExecStart,
) -> std::result::Result<Session, Refusal> {
    let description = agent.temporary_path("process.json");
    let process = process(&container.process, start).to_string();
    fs::write(&description, process).context(|| format!("write {}", description.display()))?;
    let launch = Launch {
        id: &container.id,
        description: &description,
        program: start.args.first().map_or("", String::as_str),
        console: None,
        stdio: Stdio::default(),
        oom_score: container.oom_score,
    };
    let session = if start.tty {
        start_on_terminal(agent, start, launch).await
    } else {
        let (uid, gid) = spec::user_ids_of(&container.process);
        start_on_pipes(agent, start, launch, agent.sandbox.owner(uid, gid)?).await
    };
    let _ = fs::remove_file(&description);
    session
}

async fn start_on_terminal(
    agent: &Agent,
    start: &ExecStart,
    launch: Launch<'_>,
) -> std::result::Result<Session, Refusal> {
    let socket = ConsoleSocket::bind(agent.console_socket_path())?;
    let launch = Launch { console: Some(socket.path()), ..launch };
    let pid = agent.runtime.exec(launch).await.map_err(Refusal::Program)?;
    let exit = agent.reaper.watch(pid);
    let terminal = socket.receive().await?;
    if let Some(size) = &start.size {
        let _ = terminal::resize(&terminal, size);
    }
    let terminal = Arc::new(AsyncFile::new(terminal).context(|| "open the terminal")?);
    let outputs: Vec<(_, Wrap)> = vec![(terminal.clone(), Message::Stdout)];
    Ok(Session { exit, pid, input: Input::Terminal(terminal), outputs })
}

async fn start_on_pipes(
    agent: &Agent,
    start: &ExecStart,
    launch: Launch<'_>,
    owner: Option<Owner>,
) -> std::result::Result<Session, Refusal> {
    let what = || "make a pipe";
    let (stdout, give_stdout) = pipe_of(owner).context(what)?;
    let (stderr, give_stderr) = pipe_of(owner).context(what)?;
    let mut stdio = Stdio { stdin: None, stdout: Some(give_stdout), stderr: Some(give_stderr) };
    let mut input = Input::None;
    if start.stdin {
        let (give_stdin, stdin) = pipe_of(owner).context(what)?;
        stdio.stdin = Some(give_stdin);
        input = Input::Pipe(AsyncFile::new(stdin).context(what)?);
    }
    let pid = agent.runtime.exec(Launch { stdio, ..launch }).await.map_err(Refusal::Program)?;
    let exit = agent.reaper.watch(pid);
    let open = |end| AsyncFile::new(end).map(Arc::new).context(what);
    let outputs: Vec<(_, Wrap)> = vec![(open(stdout)?, Message::Stdout), (open(stderr)?, Message::Stderr)];
    Ok(Session { exit, pid, input, outputs })
}

/// The container's own process, with other arguments.
fn process(container: &Value, start: &ExecStart) -> Value {
    let mut process = container.clone();
    if let Some(members) = process.as_object_mut() {
        members.insert("args".into(), json!(start.args));
        members.insert("terminal".into(), start.tty.into());
        members.remove("consoleSize");
        if let (true, Some(size)) = (start.tty, &start.size) {
            members.insert("consoleSize".into(), json!({"width": size.columns, "height": size.rows}));
        }
    }
    process
}

impl Session {
    /// Kills the process with everything it has started; it is no leader of a process group.
    pub fn kill(&self) {
        descendants::kill(self.pid);
    }

    pub fn signal(&self, signal: i32) {
        // It may have ended this moment; its number stays its own until the exit is told.
        let _ = sys::kill(self.pid, signal);
    }

    pub fn resize(&self, size: &TerminalSize) {
        if let Input::Terminal(terminal) = &self.input {
            let _ = terminal::resize(terminal.as_ref(), size);
        }
    }

    /// Starts feeding the standard input; `None` when there is none. The end of the channel is the end of the input.
    pub fn feed(&mut self) -> Option<mpsc::Sender<Vec<u8>>> {
        let (sender, chunks) = mpsc::channel(1);
        match std::mem::replace(&mut self.input, Input::None) {
            Input::None => return None,
            Input::Pipe(pipe) => tokio::spawn(feed_pipe(pipe, chunks)),
            Input::Terminal(terminal) => {
                self.input = Input::Terminal(terminal.clone());
                tokio::spawn(feed_terminal(terminal, chunks))
            }
        };
        Some(sender)
    }

    /// Starts passing on output; each answer is awaited, so a slow client slows the process down.
    pub fn drain(
        &mut self,
        answers: &Answers,
        exited: &watch::Receiver<bool>,
    ) -> Vec<tokio::task::JoinHandle<()>> {
        let outputs = std::mem::take(&mut self.outputs);
        let spawn = |(source, wrap)| tokio::spawn(drain(source, wrap, answers.clone(), exited.clone()));
        outputs.into_iter().map(spawn).collect()
    }
}

async fn feed_pipe(pipe: AsyncFile, mut chunks: mpsc::Receiver<Vec<u8>>) {
    while let Some(chunk) = chunks.recv().await {
        if pipe.write_all(&chunk).await.is_err() {
            return; // Nobody reads any more.
        }
    }
}

async fn feed_terminal(terminal: Arc<AsyncFile>, mut chunks: mpsc::Receiver<Vec<u8>>) {
    while let Some(chunk) = chunks.recv().await {
        if terminal.write_all(&chunk).await.is_err() {
            return;
        }
    }
    let _ = terminal.write_all(END_OF_INPUT).await;
}

async fn drain(source: Arc<AsyncFile>, wrap: Wrap, answers: Answers, mut exited: watch::Receiver<bool>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = tokio::select! {
            count = source.read(&mut buffer) => count.unwrap_or(0),
            () = silence_after(&mut exited) => 0,
        };
        let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { return };
        let answer = ExecResponse { message: Some(wrap(chunk.to_vec())) };
        if answers.send(Ok(answer)).await.is_err() {
            return; // The client has gone.
        }
    }
}

/// Returns some time after the process has exited.
async fn silence_after(exited: &mut watch::Receiver<bool>) {
    let _ = exited.wait_for(|exited| *exited).await;
    tokio::time::sleep(SILENCE).await;
}

/// Waits for what is still in the pipes.
pub async fn finish(drains: Vec<tokio::task::JoinHandle<()>>, answers: &Answers) {
    for drain in drains {
        // A client that reads nothing any more must not keep this alive, but one that reads slowly may.
        tokio::select! {
            _ = drain => {}
            () = answers.closed() => {}
        }
    }
}

/// # Errors
/// When the answer of a client that does not read cannot be had in time.
pub async fn reply(answers: &Answers, message: Message) -> Result<()> {
    let answer = Ok(ExecResponse { message: Some(message) });
    match timeout(Duration::from_secs(60), answers.send(answer)).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(AgentError::Aborted("the client does not read".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::file::pipe;

    #[test]
    fn an_exec_is_the_containers_process_with_other_arguments() {
        let container =
            json!({"args": ["a"], "cwd": "/x", "user": {"uid": 1}, "consoleSize": {"width": 1, "height": 1}});
        let start = ExecStart { args: vec!["b".into(), "c".into()], ..ExecStart::default() };
        let expected = json!({"args": ["b", "c"], "cwd": "/x", "user": {"uid": 1}, "terminal": false});
        assert_eq!(process(&container, &start), expected);
    }

    #[tokio::test]
    async fn output_held_open_ends_in_silence() {
        let (read_end, _held_open) = pipe().unwrap();
        let (answers, mut received) = mpsc::channel(4);
        let (_exited, told) = watch::channel(true);
        drain(Arc::new(AsyncFile::new(read_end).unwrap()), Message::Stdout, answers, told).await;
        assert!(received.recv().await.is_none());
    }
}
