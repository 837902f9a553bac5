//! The pod's network inside the guest.

pub mod address;
pub mod counters;
pub mod files;
pub mod home;
pub mod link;
pub mod sysctl;

use std::os::fd::AsFd;

use crate::error::{AgentError, Context, Result};
use crate::proto;
use address::{Cidr, Interface, Route};
use link::Netlink;

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
    let mut netlink = Netlink::connect().context(|| "open a netlink socket")?;
    let links = netlink.wait_for(&interfaces).await?;
    netlink.identify(&interfaces, &links).await?;
    for interface in &interfaces {
        netlink.configure(interface, links.of(interface)?.index).await?;
    }
    for route in &routes {
        let interface = interface_of(route, &interfaces)?;
        let on_link = route.gateway.is_some_and(|gateway| !reaches(interface, gateway));
        netlink.add_route(route, links.of(interface)?.index, on_link).await?;
    }
    Ok(())
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
    let mut netlink = Netlink::connect().context(|| "open a netlink socket")?;
    let links = netlink.wait_for(&interfaces).await?;
    for interface in &interfaces {
        netlink.move_to(interface, links.of(interface)?.index, namespace.as_fd()).await?;
    }
    Ok(())
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
