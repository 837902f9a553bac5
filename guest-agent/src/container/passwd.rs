//! /etc/passwd and /etc/group of an image, which nobody vouches for.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use crate::error::{AgentError, Context, Result};

/// More than any honest file has.
const MOST_BYTES: u64 = 4 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    pub gid: u32,
    pub members: Vec<String>,
}

/// Both files, read once.
#[derive(Debug, Default)]
pub struct Accounts {
    users: Vec<User>,
    groups: Vec<Group>,
}

impl Accounts {
    /// Reads the files below a root file system. Missing files are empty ones.
    ///
    /// # Errors
    /// When one is there but cannot be read.
    pub fn read(rootfs: &Path) -> Result<Self> {
        Ok(Self::parse(&read_inside(rootfs, "etc/passwd")?, &read_inside(rootfs, "etc/group")?))
    }

    pub fn parse(passwd: &str, group: &str) -> Self {
        Self {
            users: passwd.lines().filter_map(parse_user).collect(),
            groups: group.lines().filter_map(parse_group).collect(),
        }
    }

    pub fn user_named(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
    }

    pub fn user_with_id(&self, uid: u32) -> Option<&User> {
        self.users.iter().find(|user| user.uid == uid)
    }

    pub fn group_named(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// Groups that list a user as their member.
    pub fn groups_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u32> + 'a {
        self.groups
            .iter()
            .filter(move |group| group.members.iter().any(|member| member == name))
            .map(|group| group.gid)
    }
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).unwrap_or_default().to_owned();
    Some(User { name, uid, gid, home })
}

fn parse_group(line: &str) -> Option<Group> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let gid = fields.nth(1)?.parse().ok()?;
    let members = fields.next().unwrap_or_default();
    let members = members.split(',').filter(|member| !member.is_empty()).map(str::to_owned).collect();
    Some(Group { name, gid, members })
}

/// Reads a regular file as a process whose root this is would find it: links cannot lead outside.
fn read_inside(rootfs: &Path, path: &str) -> Result<String> {
    let what = || format!("read /{path} of the image");
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(rootfs, directory, Mode::empty()).context(|| format!("open {}", rootfs.display()))?;
    // A FIFO must not make the agent wait for a writer.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(root, path, how) {
        Ok(descriptor) => File::from(descriptor),
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error).context(what),
    };
    if !file.metadata().context(what)?.is_file() {
        return Err(AgentError::InvalidArgument(format!("/{path} of the image is not a file")));
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes).context(what)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn odd_lines_are_passed_over() {
        let accounts = Accounts::parse(
            "root:x:0:0:root:/root:/bin/sh\nbroken\n+::::::\napp:x:1000:1001::/srv\n",
            "wheel:x:10:root,app\nbad:x:y:\nempty:x:11:\n",
        );
        assert_eq!(accounts.user_named("app").unwrap().home, "/srv");
        assert_eq!(accounts.user_with_id(0).unwrap().name, "root");
        assert_eq!(accounts.groups_of("app").collect::<Vec<_>>(), [10]);
        assert_eq!(accounts.group_named("empty").unwrap().gid, 11);
        assert_eq!(accounts.users.len(), 2);
    }

    #[test]
    fn links_do_not_lead_outside() {
        let directory = tempfile::tempdir().unwrap();
        let (root, secret) = (directory.path().join("root"), directory.path().join("secret"));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(&secret, "leak:x:1:1::/:\n").unwrap();
        symlink("../../secret", root.join("etc/passwd")).unwrap();
        symlink(&secret, root.join("etc/group")).unwrap();
        let accounts = Accounts::read(&root).unwrap();
        assert!(accounts.users.is_empty() && accounts.groups.is_empty());
        fs::write(root.join("real"), "in:x:5:6::/:\n").unwrap();
        fs::remove_file(root.join("etc/passwd")).unwrap();
        symlink("/real", root.join("etc/passwd")).unwrap();
        assert_eq!(Accounts::read(&root).unwrap().user_named("in").unwrap().uid, 5);
    }

    #[test]
    fn a_fifo_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&directory.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert!(Accounts::read(directory.path()).is_err());
    }
}
