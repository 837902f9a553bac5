//! The name-resolution files of the pod's containers.

use std::fmt::Write;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::chown;
use std::path::Path;

use super::address::Cidr;
use crate::config::Paths;
use crate::container::user_namespace::Owner;
use crate::error::{AgentError, Context, Result};
use crate::proto;

/// Writes resolv.conf, hosts and hostname, for the agent to mount into containers.
///
/// # Errors
/// `InvalidArgument` for text that would break out of its line.
pub fn write(paths: &Paths, hostname: &str, dns: &proto::Dns, interfaces: &[proto::Interface]) -> Result<()> {
    one_word(hostname)?;
    let addresses = interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .map(|text| Ok(Cidr::parse(text)?.address))
        .collect::<Result<Vec<_>>>()?;
    put(&paths.resolv_conf(), &resolv_conf(dns)?)?;
    put(&paths.hosts(), &hosts(hostname, &addresses))?;
    put(&paths.hostname(), &format!("{hostname}\n"))
}

/// Gives the files to somebody.
///
/// # Errors
/// When the kernel refuses.
pub fn give(paths: &Paths, owner: Owner) -> Result<()> {
    for path in [paths.resolv_conf(), paths.hosts(), paths.hostname()] {
        chown(&path, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))
            .context(|| format!("chown {}", path.display()))?;
    }
    Ok(())
}

fn resolv_conf(dns: &proto::Dns) -> Result<String> {
    let all = dns.servers.iter().chain(&dns.searches).chain(&dns.options);
    all.into_iter().try_for_each(|text| one_word(text))?;
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text)
}

fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for address in addresses {
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    text
}

fn one_word(text: &str) -> Result<()> {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(AgentError::InvalidArgument(format!("{text:?} cannot be part of a resolver's file")))
}

fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver() {
        let dns = proto::Dns {
            servers: vec!["10.96.0.10".into(), "fd00::a".into()],
            searches: vec!["default.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        let expected = "search default.svc svc\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns).unwrap(), expected);
        assert_eq!(resolv_conf(&proto::Dns::default()).unwrap(), "");
        let sly = proto::Dns { servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()], ..proto::Dns::default() };
        assert!(resolv_conf(&sly).is_err());
    }

    #[test]
    fn the_pod_knows_its_own_name() {
        let text = hosts("pod", &["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.0.0.5\tpod\nfd00::5\tpod\n"));
    }
}
