//! Interfaces, addresses and routes, as the kernel wants to be told of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use tokio::time::{Instant, timeout_at};

use super::address::{Cidr, Interface, Route, show_mac};
use super::netlink::{self, Batch, REPLACE, REQUEST, Socket};
use crate::error::{AgentError, Context, Result};
use crate::storage::disk::DEADLINE;
use crate::storage::uevent::Uevents;

/// Named so that it collides with nothing a pod would choose.
const PARKED: &str = "vmr-parked";
/// The length of `struct ifinfomsg`.
const LINK_HEADER: usize = 16;
const UP: u32 = libc::IFF_UP as u32;
/// Counters would make answers many times longer (`RTEXT_FILTER_SKIP_STATS`).
const WITHOUT_COUNTERS: u32 = 1 << 3;
/// The network plugin has chosen the address: waiting for objections would only delay the pod (`IFA_F_NODAD`).
const NO_DETECTION: u8 = 0x02;
const PERMANENT: u16 = 0x80;
const ON_LINK: u32 = 4;
const MTU_METRIC: u16 = 2;

/// The links of the interfaces and all others, as soon as all of the interfaces are there.
///
/// # Errors
/// `DeadlineExceeded` naming the MAC address that did not appear.
pub async fn wait_for(socket: &Socket, interfaces: &[Interface]) -> Result<Links> {
    let links = Links::read(socket)?;
    if links.missing(interfaces).is_none() {
        return Ok(links);
    }
    let uevents = Uevents::listen().context(|| "listen to the kernel's device events")?;
    let end = Instant::now() + DEADLINE;
    loop {
        // After the events' socket is open, so that nothing falls between looking and listening.
        let links = Links::read(socket)?;
        let Some(missing) = links.missing(interfaces) else { return Ok(links) };
        match timeout_at(end, uevents.network_device()).await {
            Ok(event) => event.context(|| "receive the kernel's device events")?,
            Err(_) => {
                return Err(AgentError::DeadlineExceeded(format!(
                    "the interface with MAC {} did not appear within {} s",
                    show_mac(missing.device_mac),
                    DEADLINE.as_secs()
                )));
            }
        }
    }
}

/// A network device of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    up: bool,
    mac: Option<[u8; 6]>,
    name: String,
}

impl Link {
    fn parse(body: &[u8]) -> Option<Self> {
        let find = |wanted: u16| {
            netlink::attributes(body, LINK_HEADER).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
        };
        let name = find(libc::IFLA_IFNAME)?.split(|byte| *byte == 0).next()?;
        Some(Self {
            index: netlink::u32_at(body, 4)?,
            up: netlink::u32_at(body, 8)? & UP != 0,
            mac: find(libc::IFLA_ADDRESS).and_then(|mac| mac.try_into().ok()),
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }
}

/// All network devices of a moment.
pub struct Links(Vec<Link>);

impl Links {
    fn read(socket: &Socket) -> Result<Self> {
        let mut batch = Batch::default();
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        batch
            .message(libc::RTM_GETLINK, flags, &[0; LINK_HEADER], "list the interfaces".into())
            .attribute(libc::IFLA_EXT_MASK, &WITHOUT_COUNTERS.to_ne_bytes());
        let links = socket.dump(&batch, libc::RTM_NEWLINK)?;
        Ok(Self(links.iter().filter_map(|body| Link::parse(body)).collect()))
    }

    /// The interface's link, before or after it was given the interface's own MAC address.
    fn find(&self, interface: &Interface) -> Option<&Link> {
        let with = |mac: [u8; 6]| self.0.iter().find(|link| link.mac == Some(mac));
        with(interface.device_mac).or_else(|| with(interface.mac))
    }

    fn missing<'a>(&self, interfaces: &'a [Interface]) -> Option<&'a Interface> {
        interfaces.iter().find(|interface| self.find(interface).is_none())
    }

    /// # Errors
    /// When it was there before, but is no more.
    pub fn of(&self, interface: &Interface) -> Result<&Link> {
        let vanished = || AgentError::Internal(format!("interface {} has vanished", interface.name));
        self.find(interface).ok_or_else(vanished)
    }
}

/// Gives the interfaces their names, MAC addresses and MTUs, whatever they have now, and brings them up.
///
/// # Errors
/// When one is not among the links.
pub fn identify(batch: &mut Batch, interfaces: &[Interface], links: &Links) -> Result<()> {
    let mut names: BTreeMap<&str, u32> =
        links.0.iter().map(|link| (link.name.as_str(), link.index)).collect();
    for interface in interfaces {
        let link = links.of(interface)?;
        let name = interface.name.as_str();
        // Another interface that has the name now makes room; its own turn may come.
        if let Some(&holder) = names.get(name)
            && holder != link.index
        {
            take_down(batch, holder);
            let parked = format!("{PARKED}{holder}\0");
            let purpose = format!("rename interface {holder}, which is named {name}");
            change(batch, holder, 0, 0, purpose).attribute(libc::IFLA_IFNAME, parked.as_bytes());
        }
        let named = names.get(name) == Some(&link.index);
        let has_mac = link.mac == Some(interface.mac);
        // Most kernels rename an interface only while it is down, and most devices want to be down for another address.
        if link.up && !(named && has_mac) {
            take_down(batch, link.index);
        }
        let purpose = format!("bring up {name} with MAC {}, MTU {}", show_mac(interface.mac), interface.mtu);
        let mut message = change(batch, link.index, UP, UP, purpose);
        if !has_mac {
            message = message.attribute(libc::IFLA_ADDRESS, &interface.mac);
        }
        if interface.mtu != 0 {
            message = message.attribute(libc::IFLA_MTU, &interface.mtu.to_ne_bytes());
        }
        if !named {
            message.attribute(libc::IFLA_IFNAME, format!("{name}\0").as_bytes());
        }
        names.retain(|_, index| *index != link.index);
        names.insert(name, link.index);
    }
    Ok(())
}

/// Moves an interface into another network namespace, where it may get another index.
pub fn move_to(batch: &mut Batch, interface: &Interface, index: u32, namespace: BorrowedFd<'_>) {
    let purpose = format!("move {} into the pod's network", interface.name);
    let descriptor = namespace.as_raw_fd().to_ne_bytes();
    change(batch, index, 0, 0, purpose).attribute(libc::IFLA_NET_NS_FD, &descriptor);
}

/// Adds addresses and permanent neighbours.
pub fn address(batch: &mut Batch, interface: &Interface, index: u32) {
    for cidr in &interface.addresses {
        let flags = if cidr.address.is_ipv6() { NO_DETECTION } else { 0 };
        // struct ifaddrmsg
        let mut header = vec![family(cidr.address), cidr.prefix, flags, 0];
        header.extend(index.to_ne_bytes());
        let purpose = format!("add address {cidr} to {}", interface.name);
        let address = octets(cidr.address);
        let message = batch
            .message(libc::RTM_NEWADDR, REPLACE, &header, purpose)
            .attribute(libc::IFA_ADDRESS, &address)
            .attribute(libc::IFA_LOCAL, &address);
        if let Some(broadcast) = broadcast(*cidr) {
            message.attribute(libc::IFA_BROADCAST, &broadcast);
        }
    }
    for (address, mac) in &interface.neighbours {
        // struct ndmsg
        let mut header = vec![family(*address), 0, 0, 0];
        header.extend(index.to_ne_bytes());
        header.extend(PERMANENT.to_ne_bytes());
        header.extend([0, 0]);
        let purpose = format!("add neighbour {address} of {}", interface.name);
        batch
            .message(libc::RTM_NEWNEIGH, REPLACE, &header, purpose)
            .attribute(libc::NDA_DST, &octets(*address))
            .attribute(libc::NDA_LLADDR, mac);
    }
}

/// Adds a route. `on_link` says that the gateway is reached directly although no address's network has it.
pub fn add_route(batch: &mut Batch, route: &Route, index: u32, on_link: bool) {
    let destination = route.destination;
    let purpose = match route.gateway {
        Some(gateway) => format!("add the route to {destination} by {gateway}"),
        None => format!("add the route to {destination}"),
    };
    let scope = match route.gateway {
        None if destination.address.is_ipv4() => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    // struct rtmsg
    let mut header = vec![family(destination.address), destination.prefix, 0, 0];
    header.extend([libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST]);
    header.extend(if on_link { ON_LINK } else { 0 }.to_ne_bytes());
    let mut message = batch
        .message(libc::RTM_NEWROUTE, REPLACE, &header, purpose)
        .attribute(libc::RTA_DST, &octets(destination.address))
        .attribute(libc::RTA_OIF, &index.to_ne_bytes());
    if let Some(gateway) = route.gateway {
        message = message.attribute(libc::RTA_GATEWAY, &octets(gateway));
    }
    if route.metric != 0 {
        message = message.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    if let Some(source) = route.source {
        message = message.attribute(libc::RTA_PREFSRC, &octets(source));
    }
    if route.mtu != 0 {
        let mtu = netlink::nested(MTU_METRIC, &route.mtu.to_ne_bytes());
        message.attribute(libc::RTA_METRICS, &mtu);
    }
}

fn take_down(batch: &mut Batch, index: u32) {
    change(batch, index, 0, UP, format!("take interface {index} down"));
}

/// Begins a change of a link: of the flags in `mask`, and of what attributes say.
fn change(batch: &mut Batch, index: u32, flags: u32, mask: u32, purpose: String) -> netlink::Message<'_> {
    // struct ifinfomsg
    let mut header = vec![0; 4];
    for number in [index, flags, mask] {
        header.extend(number.to_ne_bytes());
    }
    batch.message(libc::RTM_SETLINK, REQUEST, &header, purpose)
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn broadcast(cidr: Cidr) -> Option<[u8; 4]> {
    match cidr.address {
        IpAddr::V4(address) => {
            let hosts = u32::MAX.checked_shr(cidr.prefix.into()).unwrap_or_default();
            Some((address.to_bits() | hosts).to_be_bytes())
        }
        IpAddr::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLUGGED: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn link(index: u32, mac: Option<[u8; 6]>) -> Link {
        Link { index, up: false, mac, name: format!("eth{index}") }
    }

    fn interface(mac: [u8; 6], device_mac: [u8; 6]) -> Interface {
        let (name, addresses, neighbours) = ("eth0".into(), vec![], vec![]);
        Interface { name, mac, device_mac, mtu: 0, addresses, neighbours }
    }

    #[test]
    fn a_link_is_found_by_the_mac_of_its_device_and_afterwards_by_its_own() {
        let found =
            |links: &[Link]| Links(links.into()).find(&interface(OWN, PLUGGED)).map(|link| link.index);
        assert_eq!(found(&[link(1, None), link(2, Some([0; 6]))]), None);
        assert_eq!(found(&[link(1, None), link(2, Some(PLUGGED))]), Some(2));
        assert_eq!(found(&[link(2, Some(OWN)), link(3, Some(PLUGGED))]), Some(3));
        assert_eq!(found(&[link(2, Some(OWN))]), Some(2));
    }

    #[test]
    fn broadcast_addresses() {
        let of = |text: &str| broadcast(Cidr::parse(text).unwrap());
        assert_eq!(of("10.1.2.3/24"), Some([10, 1, 2, 255]));
        assert_eq!(of("10.1.2.3/32"), Some([10, 1, 2, 3]));
        assert_eq!(of("fd00::1/64"), None);
    }
}
