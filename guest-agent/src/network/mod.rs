//! The pod's network inside the guest.

pub mod address;
pub mod counters;
pub mod files;
pub mod home;
pub mod link;
mod netlink;
pub mod sysctl;

use std::os::fd::AsFd;

use crate::error::{AgentError, Result};
use crate::proto;
use address::{Cidr, Interface, Route};
use netlink::{Batch, Socket};

/// Waits for the interfaces, names and addresses them and sets the routes. Doing it again changes nothing.
///
/// # Errors
/// `InvalidArgument` for what cannot be parsed, `DeadlineExceeded` for an interface that does not appear.
pub async fn configure(interfaces: &[proto::Interface], routes: &[proto::Route]) -> Result<()> {
    let interfaces = interfaces.iter().map(Interface::parse).collect::<Result<Vec<_>>>()?;
    let routes = routes.iter().map(Route::parse).collect::<Result<Vec<_>>>()?;
    if interfaces.is_empty() && routes.is_empty() {
        return Ok(());
    }
    let socket = Socket::open()?;
    let links = link::wait_for(&socket, &interfaces).await?;
    let mut batch = Batch::default();
    link::identify(&mut batch, &interfaces, &links)?;
    for interface in &interfaces {
        link::address(&mut batch, interface, links.of(interface)?.index);
    }
    for route in &routes {
        let interface = interface_of(route, &interfaces)?;
        let on_link = route.gateway.is_some_and(|gateway| !reaches(interface, gateway));
        link::add_route(&mut batch, route, links.of(interface)?.index, on_link);
    }
    socket.run(&batch)
}

/// Goes through the motions with an interface that has everything already.
///
/// # Errors
/// When the kernel refuses.
pub async fn rehearse() -> Result<()> {
    let loopback = proto::Interface {
        name: "lo".into(),
        mac: "00:00:00:00:00:00".into(),
        mtu: 65536,
        addresses: vec!["127.0.0.1/8".into()],
        ..Default::default()
    };
    configure(&[loopback], &[]).await
}

/// Waits for the interfaces and moves them into another network namespace.
///
/// # Errors
/// See `configure`.
pub async fn hand_over(interfaces: &[proto::Interface], namespace: impl AsFd) -> Result<()> {
    let interfaces = interfaces.iter().map(Interface::parse).collect::<Result<Vec<_>>>()?;
    if interfaces.is_empty() {
        return Ok(());
    }
    let socket = Socket::open()?;
    let links = link::wait_for(&socket, &interfaces).await?;
    let mut batch = Batch::default();
    for interface in &interfaces {
        link::move_to(&mut batch, interface, links.of(interface)?.index, namespace.as_fd());
    }
    socket.run(&batch)
}

fn interface_of<'a>(route: &Route, interfaces: &'a [Interface]) -> Result<&'a Interface> {
    let named = |interface: &&Interface| route.interface.is_empty() || interface.name == route.interface;
    interfaces.iter().find(named).ok_or_else(|| {
        AgentError::InvalidArgument(format!(
            "the route to {} names interface {:?}, which is not one of the pod's",
            route.destination, route.interface
        ))
    })
}

/// Whether a gateway is in the subnet of one of the interface's addresses, so that the kernel finds it by itself.
fn reaches(interface: &Interface, gateway: std::net::IpAddr) -> bool {
    interface.addresses.iter().any(|address: &Cidr| address.contains(gateway))
}
