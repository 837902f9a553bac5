//! The namespaces that a pod's containers share and the agent does not have: a user namespace, the network, IPC and UTS
//! namespaces it owns, and a PID namespace.
//!
//! A process of its own makes them, because one with many threads cannot. A PID namespace lives as long as its first
//! process, so that one stays and must outlive every container of the pod; it does what any init does for orphans: it reaps
//! them. The others are kept by descriptors.
//!
//! What the two say to each other:
//! ```text
//!   helper  user␤                     (its new user namespace has no ids yet)
//!   agent         ␤                   (now it has)
//!   helper         NUMBER␤            (the first process of the PID namespace, or 0: there is none)
//!   agent                 end         (the namespaces have been opened)
//! ```
//! A line that begins with `!` is why it did not work.

use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_name;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{Gid, Uid, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid};

use super::user_namespace::{Mapping, UserNamespace};
use crate::error::{AgentError, Context, Result};
use crate::init::reaper::Reaper;
use crate::io::file::{AsyncFile, pipe};
use crate::sys;

/// The verb that makes the namespaces.
const VERB: &str = "pod-init";
/// What containers of the pod see as the name of process 1.
const NAME: &str = "vmruntime";
const PID: &str = "pid";
const NEW_USER: &str = "user";
const USER_OF: &str = "user-of=";
/// Longer than any line of the helper's.
const LONGEST_LINE: usize = 512;

/// Whose user namespace the containers get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    Agents,
    /// One with these ids, and a network namespace.
    New(Mapping),
    /// The one that owns the network namespace the agent is in; it has these ids.
    OfNetwork(Mapping),
}

/// What a pod's containers share.
#[derive(Debug, Default)]
pub struct PodNamespaces {
    /// The process that holds the PID namespace.
    pub init: Option<i32>,
    pub user: Option<Owned>,
}

impl PodNamespaces {
    /// The pod's user namespace, if it is not the agent's.
    pub fn user(&self) -> Option<&UserNamespace> {
        self.user.as_ref().map(|owned| &owned.user)
    }
}

/// A user namespace with those it owns.
#[derive(Debug)]
pub struct Owned {
    pub user: UserNamespace,
    pub network: OwnedFd,
    ipc: OwnedFd,
    uts: OwnedFd,
}

impl Owned {
    /// Takes the agent's thread, and what it starts from now on, into the IPC and UTS namespaces.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn join(&self) -> Result<()> {
        setns(&self.ipc, CloneFlags::CLONE_NEWIPC).context(|| "join the pod's IPC namespace")?;
        setns(&self.uts, CloneFlags::CLONE_NEWUTS).context(|| "join the pod's UTS namespace")
    }
}

/// Handles the verb that is no agent; `None` for any other.
pub fn dispatch(arguments: &[String]) -> Option<ExitCode> {
    let (verb, wanted) = arguments.split_first()?;
    (verb == VERB).then(|| {
        make(wanted).unwrap_or_else(|error| {
            let _ = writeln!(io::stdout(), "!{error}");
            ExitCode::FAILURE
        })
    })
}

/// Makes the namespaces.
///
/// # Errors
/// When the kernel refuses one of them.
pub async fn start(reaper: &Reaper, pid: bool, user: User) -> Result<PodNamespaces> {
    let what = || "start the pod's namespaces";
    let (input, to_helper) = pipe().context(what)?;
    let (from_helper, output) = pipe().context(what)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(VERB).stdin(input).stdout(output).stderr(Stdio::null());
    if pid {
        command.arg(PID);
    }
    let kept; // Until the helper has opened it.
    match &user {
        User::Agents => {}
        User::New(_) => _ = command.arg(NEW_USER),
        User::OfNetwork(_) => {
            kept = UserNamespace::new(mapping_of(&user)?, owner_of_network()?);
            command.arg(format!("{USER_OF}{}", kept.path()));
        }
    }
    let started = reaper.spawn(&mut command);
    drop(command);
    let (helper, exit) = started.context(what)?;
    let made = converse(helper, &user, from_helper, to_helper).await;
    // The pipe to it is closed by now.
    let _ = exit.await;
    made
}

fn mapping_of(user: &User) -> Result<Mapping> {
    match user {
        User::New(mapping) | User::OfNetwork(mapping) => Ok(mapping.clone()),
        User::Agents => Err(AgentError::Internal("the agent's own user namespace has no map".into())),
    }
}

async fn converse(
    helper: i32,
    user: &User,
    from_helper: OwnedFd,
    to_helper: OwnedFd,
) -> Result<PodNamespaces> {
    let what = || "talk to the pod's namespaces";
    let (from_helper, to_helper) =
        (AsyncFile::new(from_helper).context(what)?, AsyncFile::new(to_helper).context(what)?);
    if let User::New(mapping) = user {
        expect_line(&from_helper).await?;
        write_map(helper, "uid_map", &mapping.uids.lines())?;
        write_map(helper, "gid_map", &mapping.gids.lines())?;
        to_helper.write_all(b"\n").await.context(what)?;
    }
    let number = expect_line(&from_helper).await?;
    let number: i32 = number.parse().map_err(|_| refused(&format!("{number:?} is no process")))?;
    let user = match user {
        User::Agents => None,
        user => Some(Owned {
            user: UserNamespace::new(mapping_of(user)?, open(helper, "user")?),
            network: open(helper, "net")?,
            ipc: open(helper, "ipc")?,
            uts: open(helper, "uts")?,
        }),
    };
    Ok(PodNamespaces { init: (number > 0).then_some(number), user })
}

async fn expect_line(from_helper: &AsyncFile) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LONGEST_LINE {
        let count = from_helper.read(&mut byte).await.context(|| "listen to the pod's namespaces")?;
        if count == 0 || byte == *b"\n" {
            break;
        }
        line.extend(byte);
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    match line.strip_prefix('!') {
        Some(why) => Err(refused(why)),
        None if line.is_empty() => Err(refused("it ended without a word")),
        None => Ok(line),
    }
}

fn refused(why: &str) -> AgentError {
    AgentError::Internal(format!("the pod's namespaces cannot be made: {why}"))
}

fn write_map(helper: i32, name: &str, lines: &str) -> Result<()> {
    let path = format!("/proc/{helper}/{name}");
    fs::write(&path, lines)
        .map_err(|error| AgentError::InvalidArgument(format!("user namespace: {name} {lines:?}: {error}")))
}

fn open(process: i32, kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{process}/ns/{kind}");
    File::open(&path).map(OwnedFd::from).context(|| format!("open {path}"))
}

fn owner_of_network() -> Result<OwnedFd> {
    let network = File::open("/proc/self/ns/net").context(|| "open the network namespace")?;
    sys::owner_of(network).context(|| "find the user namespace that owns the pod's network")
}

/// The helper's side.
fn make(wanted: &[String]) -> io::Result<ExitCode> {
    for word in wanted {
        if word == NEW_USER {
            unshare(CloneFlags::CLONE_NEWUSER)?;
            say(NEW_USER)?;
            io::stdin().lock().read_line(&mut String::new())?;
            become_root()?;
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
        } else if let Some(path) = word.strip_prefix(USER_OF) {
            setns(File::open(path)?, CloneFlags::CLONE_NEWUSER)?;
            become_root()?;
            unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
        }
    }
    let mut child = 0;
    // Last, so that the other namespaces and their owner are its as well.
    if wanted.iter().any(|word| word == PID) {
        // A process cannot enter a new PID namespace, only its children can.
        unshare(CloneFlags::CLONE_NEWPID)?;
        match sys::fork_single_threaded()? {
            Some(process) => child = process,
            None => return be_init(),
        }
    }
    say(&child.to_string())?;
    io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(ExitCode::SUCCESS)
}

fn say(line: &str) -> io::Result<()> {
    let mut output = io::stdout();
    writeln!(output, "{line}")?;
    output.flush()
}

/// Takes the ids of the user namespace, so that what is made from here on belongs to it.
fn become_root() -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    Ok(setresuid(uid, uid, uid)?)
}

fn be_init() -> io::Result<ExitCode> {
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&nothing)?;
    dup2_stdout(&nothing)?;
    set_name(c"vmruntime")?;
    Ok(reap_for_ever())
}

/// Reaps for ever. No signal from inside the pod ends it, TERM included: that would end every container with it.
/// The agent ends it with KILL, or by powering off.
fn reap_for_ever() -> ExitCode {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    if sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while sys::reap().is_some() {}
        if ended.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
