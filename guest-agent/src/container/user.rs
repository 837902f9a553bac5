//! Who a container's process is: `user[:group]` of an image, resolved.

use std::collections::BTreeSet;

use super::passwd::{Accounts, User};
use crate::error::{AgentError, Result};

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, ascending.
    pub groups: Vec<u32>,
    pub home: Option<String>,
}

/// What was asked for.
#[derive(Debug, Default, Clone, Copy)]
pub struct Wanted<'a> {
    /// `user[:group]` by id or name; empty: the spec's ids.
    pub user: &'a str,
    pub spec_uid: u32,
    pub spec_gid: u32,
    pub groups: &'a [u32],
    /// Also the groups that the image gives the user.
    pub image_groups: bool,
}

/// # Errors
/// `InvalidArgument` for a name the image does not know.
pub fn resolve(wanted: Wanted<'_>, accounts: &Accounts) -> Result<Identity> {
    let (name, group) = match wanted.user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (wanted.user, None),
    };
    let (uid, account) = match name {
        "" => (wanted.spec_uid, accounts.user_with_id(wanted.spec_uid)),
        name => find_user(name, accounts)?,
    };
    let gid = match group {
        Some(group) => find_group(group, accounts)?,
        None if name.is_empty() => wanted.spec_gid,
        None => account.map_or(0, |account| account.gid),
    };
    let mut groups: BTreeSet<u32> = wanted.groups.iter().copied().collect();
    if let (true, Some(account)) = (wanted.image_groups, account) {
        groups.extend(accounts.groups_of(&account.name));
    }
    let home = account.map(|account| account.home.clone()).filter(|home| !home.is_empty());
    Ok(Identity { uid, gid, groups: groups.into_iter().collect(), home })
}

/// A number is a user id, whether or not the image knows it, unless a user has that name.
fn find_user<'a>(text: &str, accounts: &'a Accounts) -> Result<(u32, Option<&'a User>)> {
    if let Some(account) = accounts.user_named(text) {
        return Ok((account.uid, Some(account)));
    }
    match text.parse() {
        Ok(uid) => Ok((uid, accounts.user_with_id(uid))),
        Err(_) => {
            Err(AgentError::InvalidArgument(format!("user {text:?} is not in the image's /etc/passwd")))
        }
    }
}

fn find_group(text: &str, accounts: &Accounts) -> Result<u32> {
    if let Some(group) = accounts.group_named(text) {
        return Ok(group.gid);
    }
    text.parse()
        .map_err(|_| AgentError::InvalidArgument(format!("group {text:?} is not in the image's /etc/group")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::parse(
            "root:x:0:0::/root:\nwww:x:33:34::/var/www:\n77:x:1:2::/odd:\n",
            "www:x:34:\naudio:x:29:www,root\nvideo:x:44:www\n",
        )
    }

    fn resolved(user: &str) -> (u32, u32) {
        let identity = resolve(Wanted { user, ..Wanted::default() }, &accounts()).unwrap();
        (identity.uid, identity.gid)
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(resolved("www"), (33, 34));
        assert_eq!(resolved("33"), (33, 34));
        assert_eq!(resolved("33:7"), (33, 7));
        assert_eq!(resolved("www:audio"), (33, 29));
        assert_eq!(resolved("4711"), (4711, 0));
        assert_eq!(resolved("77"), (1, 2));
        assert_eq!(resolved("www:"), (33, 34));
    }

    #[test]
    fn unknown_names_are_named() {
        let failure =
            |user| resolve(Wanted { user, ..Wanted::default() }, &accounts()).unwrap_err().to_string();
        assert_eq!(failure("nobody"), "user \"nobody\" is not in the image's /etc/passwd");
        assert_eq!(failure("www:nope"), "group \"nope\" is not in the image's /etc/group");
        assert!(failure("-1").contains("-1"));
    }

    #[test]
    fn groups_are_merged_when_asked() {
        let wanted = Wanted { user: "www", groups: &[1000, 29], ..Wanted::default() };
        assert_eq!(resolve(wanted, &accounts()).unwrap().groups, [29, 1000]);
        let merged = Wanted { image_groups: true, ..wanted };
        assert_eq!(resolve(merged, &accounts()).unwrap().groups, [29, 44, 1000]);
    }

    #[test]
    fn without_a_user_the_spec_decides() {
        let wanted = Wanted { spec_uid: 33, spec_gid: 9, ..Wanted::default() };
        let identity = resolve(wanted, &accounts()).unwrap();
        assert_eq!((identity.uid, identity.gid, identity.home.as_deref()), (33, 9, Some("/var/www")));
    }
}
