//! Interfaces, addresses and routes through the kernel's route netlink.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::StreamExt;
use futures_util::TryStreamExt;
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

    /// Indices of the interfaces by MAC address, as soon as all of them are there.
    ///
    /// # Errors
    /// `DeadlineExceeded` naming the MAC address that did not appear.
    pub async fn wait_for(&mut self, interfaces: &[Interface]) -> Result<BTreeMap<[u8; 6], u32>> {
        let end = Instant::now() + DEADLINE;
        loop {
            let links = self.links().await?;
            let indices: BTreeMap<_, _> =
                links.iter().filter_map(|link| Some((mac_of(link)?, link.header.index))).collect();
            let Some(missing) = interfaces.iter().find(|interface| !indices.contains_key(&interface.mac))
            else {
                return Ok(indices);
            };
            if timeout_at(end, self.changes.next()).await.is_err() {
                return Err(AgentError::DeadlineExceeded(format!(
                    "the interface with MAC {} did not appear within {} s",
                    show_mac(missing.mac),
                    DEADLINE.as_secs()
                )));
            }
        }
    }

    /// Gives the interfaces their names, whatever names they have now.
    ///
    /// # Errors
    /// When the kernel refuses a name.
    pub async fn rename(&self, interfaces: &[Interface], indices: &BTreeMap<[u8; 6], u32>) -> Result<()> {
        let names: BTreeMap<String, u32> =
            self.links().await?.iter().filter_map(|link| Some((name_of(link)?, link.header.index))).collect();
        for interface in interfaces {
            let Some(&index) = indices.get(&interface.mac) else { continue };
            // Another interface that has the name now makes room; its own turn may come.
            match names.get(&interface.name) {
                Some(&holder) if holder == index => continue,
                Some(&holder) => self.set_name(holder, &format!("{PARKED}{holder}")).await?,
                None => {}
            }
            self.set_name(index, &interface.name).await?;
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

    async fn links(&self) -> Result<Vec<LinkMessage>> {
        let links = self.handle.link().get().execute().try_collect().await;
        links.map_err(|error| failed("list the interfaces", error))
    }

    /// Most kernels rename an interface only while it is down.
    async fn set_name(&self, index: u32, name: &str) -> Result<()> {
        for message in [
            LinkUnspec::new_with_index(index).down().build(),
            LinkUnspec::new_with_index(index).name(name).build(),
        ] {
            let changed = self.handle.link().set(message).execute().await;
            changed.map_err(|error| failed(&format!("name interface {index} {name}"), error))?;
        }
        Ok(())
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn mac_of(link: &LinkMessage) -> Option<[u8; 6]> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    })
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
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
