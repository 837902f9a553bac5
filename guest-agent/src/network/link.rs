//! Interfaces, addresses and routes through the kernel's route netlink.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMetric, RouteScope};
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder, new_multicast_connection};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::address::{Interface, Route, show_mac};
use crate::error::{AgentError, Result};
use crate::storage::disk::DEADLINE;

/// Named so that it collides with nothing a pod would choose.
const PARKED: &str = "vmr-parked";

pub struct Netlink {
    handle: Handle,
    changes: std::pin::Pin<Box<dyn futures_util::Stream<Item = ()> + Send + Sync>>,
    connection: JoinHandle<()>,
}

impl Netlink {
    /// Opens a socket that also hears of links that come and go.
    ///
    /// # Errors
    /// When the kernel has none.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, messages) = new_multicast_connection(&[MulticastGroup::Link])?;
        let connection = tokio::spawn(connection);
        Ok(Self { handle, changes: Box::pin(messages.map(drop)), connection })
    }

    /// The links of the interfaces and all others, as soon as all of the interfaces are there.
    ///
    /// # Errors
    /// `DeadlineExceeded` naming the MAC address that did not appear.
    pub async fn wait_for(&mut self, interfaces: &[Interface]) -> Result<Links> {
        let end = Instant::now() + DEADLINE;
        loop {
            let links = Links(self.links().await?);
            let Some(missing) = interfaces.iter().find(|interface| links.find(interface).is_none()) else {
                return Ok(links);
            };
            if timeout_at(end, self.changes.next()).await.is_err() {
                return Err(AgentError::DeadlineExceeded(format!(
                    "the interface with MAC {} did not appear within {} s",
                    show_mac(missing.device_mac),
                    DEADLINE.as_secs()
                )));
            }
        }
    }

    /// Gives the interfaces their names and MAC addresses, whatever they have now.
    ///
    /// # Errors
    /// When the kernel refuses one of them.
    pub async fn identify(&self, interfaces: &[Interface], links: &Links) -> Result<()> {
        let mut names: BTreeMap<String, u32> =
            links.0.iter().map(|link| (link.name.clone(), link.index)).collect();
        for interface in interfaces {
            let link = links.of(interface)?;
            // Another interface that has the name now makes room; its own turn may come.
            if let Some(&holder) = names.get(&interface.name)
                && holder != link.index
            {
                let parked = format!("{PARKED}{holder}");
                self.set_identity(holder, Some(&parked), None).await?;
                names.remove(&interface.name);
                names.insert(parked, holder);
            }
            let named = names.get(&interface.name) == Some(&link.index);
            let name = (!named).then_some(interface.name.as_str());
            let mac = (link.mac != Some(interface.mac)).then_some(interface.mac);
            self.set_identity(link.index, name, mac).await?;
            names.retain(|_, index| *index != link.index);
            names.insert(interface.name.clone(), link.index);
        }
        Ok(())
    }

    /// Moves an interface into another network namespace, where it may get another index.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn move_to(&self, interface: &Interface, index: u32, namespace: BorrowedFd<'_>) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).setns_by_fd(namespace.as_raw_fd()).build();
        let moved = self.handle.link().set(message).execute().await;
        moved.map_err(|error| failed(&format!("move {} into the pod's network", interface.name), error))
    }

    /// Sets MTU and addresses, brings the interface up and adds its permanent neighbours.
    ///
    /// # Errors
    /// When the kernel refuses one of them; the text names it.
    pub async fn configure(&self, interface: &Interface, index: u32) -> Result<()> {
        if interface.mtu != 0 {
            let message = LinkUnspec::new_with_index(index).mtu(interface.mtu).build();
            let changed = self.handle.link().set(message).execute().await;
            changed.map_err(|error| {
                failed(&format!("set MTU {} on {}", interface.mtu, interface.name), error)
            })?;
        }
        for cidr in &interface.addresses {
            let mut request = self.handle.address().add(index, cidr.address, cidr.prefix).replace();
            if cidr.address.is_ipv6() {
                // The network plugin has chosen the address: waiting for objections would only delay the pod.
                request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            let added = request.execute().await;
            added.map_err(|error| failed(&format!("add address {cidr} to {}", interface.name), error))?;
        }
        let message = LinkUnspec::new_with_index(index).up().build();
        let changed = self.handle.link().set(message).execute().await;
        changed.map_err(|error| failed(&format!("bring up {}", interface.name), error))?;
        for (address, mac) in &interface.neighbours {
            let request = self.handle.neighbours().add(index, *address).link_layer_address(mac).replace();
            let added = request.execute().await;
            added
                .map_err(|error| failed(&format!("add neighbour {address} of {}", interface.name), error))?;
        }
        Ok(())
    }

    /// Adds a route. `on_link` says that the gateway is reached directly although no address's network has it.
    ///
    /// # Errors
    /// When the kernel refuses; the text names the route.
    pub async fn add_route(&self, route: &Route, index: u32, on_link: bool) -> Result<()> {
        let what = || match route.gateway {
            Some(gateway) => format!("add the route to {} by {gateway}", route.destination),
            None => format!("add the route to {}", route.destination),
        };
        let invalid = |error| AgentError::InvalidArgument(format!("{}: {error}", what()));
        let destination = route.destination;
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination.address, destination.prefix)
            .map_err(invalid)?
            .output_interface(index);
        match route.gateway {
            Some(gateway) => builder = builder.gateway(gateway).map_err(invalid)?,
            None if destination.address.is_ipv4() => builder = builder.scope(RouteScope::Link),
            None => {}
        }
        if on_link {
            builder = builder.onlink();
        }
        if route.metric != 0 {
            builder = builder.priority(route.metric);
        }
        if let Some(source) = route.source {
            builder = builder.pref_source(source).map_err(invalid)?;
        }
        if route.mtu != 0 {
            builder.get_mut().attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
        }
        let added = self.handle.route().add(builder.build()).replace().execute().await;
        added.map_err(|error| failed(&what(), error))
    }

    async fn links(&self) -> Result<Vec<Link>> {
        let links: std::result::Result<Vec<_>, _> = self.handle.link().get().execute().try_collect().await;
        let links = links.map_err(|error| failed("list the interfaces", error))?;
        Ok(links.iter().filter_map(Link::parse).collect())
    }

    /// Most kernels rename an interface only while it is down, and most devices want to be down for another address.
    async fn set_identity(&self, index: u32, name: Option<&str>, mac: Option<[u8; 6]>) -> Result<()> {
        if name.is_none() && mac.is_none() {
            return Ok(());
        }
        let mut changed = LinkUnspec::new_with_index(index);
        if let Some(name) = name {
            changed = changed.name(name.to_owned());
        }
        if let Some(mac) = mac {
            changed = changed.address(mac.to_vec());
        }
        for message in [LinkUnspec::new_with_index(index).down().build(), changed.build()] {
            let changed = self.handle.link().set(message).execute().await;
            changed.map_err(|error| {
                let mac = mac.map(|mac| format!(" with MAC {}", show_mac(mac))).unwrap_or_default();
                failed(&format!("name interface {index} {}{mac}", name.unwrap_or("as it is")), error)
            })?;
        }
        Ok(())
    }
}

/// A network device of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    mac: Option<[u8; 6]>,
    name: String,
}

impl Link {
    fn parse(message: &LinkMessage) -> Option<Self> {
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
            _ => None,
        });
        let name = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })?;
        Some(Self { index: message.header.index, mac, name })
    }
}

/// All network devices of a moment.
pub struct Links(Vec<Link>);

impl Links {
    /// The interface's link, before or after it was given the interface's own MAC address.
    fn find(&self, interface: &Interface) -> Option<&Link> {
        let with = |mac: [u8; 6]| self.0.iter().find(|link| link.mac == Some(mac));
        with(interface.device_mac).or_else(|| with(interface.mac))
    }

    /// # Errors
    /// When it was there before, but is no more.
    pub fn of(&self, interface: &Interface) -> Result<&Link> {
        let vanished = || AgentError::Internal(format!("interface {} has vanished", interface.name));
        self.find(interface).ok_or_else(vanished)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The kernel's error number says more than the library's text around it.
fn failed(what: &str, error: rtnetlink::Error) -> AgentError {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            AgentError::Internal(format!("{what}: {}", message.to_io()))
        }
        other => AgentError::Internal(format!("{what}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLUGGED: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn link(index: u32, mac: Option<[u8; 6]>) -> Link {
        Link { index, mac, name: format!("eth{index}") }
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
}
