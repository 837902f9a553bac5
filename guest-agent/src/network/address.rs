//! Addresses, interfaces and routes as the protocol writes them, checked.

use std::fmt;
use std::net::IpAddr;

use crate::error::{AgentError, Result};
use crate::proto;

/// What the kernel allows for a name (IFNAMSIZ, less the ending zero byte).
const LONGEST_NAME: usize = 15;

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    /// # Errors
    /// `InvalidArgument` when the text is not `address/prefix`.
    pub fn parse(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let address: IpAddr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= longest).then_some(Self { address, prefix })
        });
        parsed.ok_or_else(|| AgentError::InvalidArgument(format!("{text:?} is not an address in CIDR form")))
    }

    /// Whether an address is in this one's network.
    pub fn contains(&self, other: IpAddr) -> bool {
        let difference = match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            _ => return false,
        };
        difference.leading_zeros() >= u32::from(self.prefix)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: [u8; 6],
    /// What the device has before it is given `mac`.
    pub device_mac: [u8; 6],
    pub mtu: u32,
    pub addresses: Vec<Cidr>,
    pub neighbours: Vec<(IpAddr, [u8; 6])>,
}

impl Interface {
    /// # Errors
    /// `InvalidArgument` naming the part that cannot be parsed.
    pub fn parse(message: &proto::Interface) -> Result<Self> {
        let name = message.name.clone();
        let odd = |byte: u8| !byte.is_ascii_graphic() || matches!(byte, b'/' | b':');
        if name.is_empty()
            || name.len() > LONGEST_NAME
            || name.bytes().any(odd)
            || name == "."
            || name == ".."
        {
            return Err(AgentError::InvalidArgument(format!("{name:?} cannot be an interface's name")));
        }
        let addresses = message.addresses.iter().map(|text| Cidr::parse(text)).collect::<Result<_>>()?;
        let neighbours = message
            .neighbours
            .iter()
            .map(|one| Ok((parse_ip(&one.address, "a neighbour's address")?, parse_mac(&one.mac)?)))
            .collect::<Result<_>>()?;
        let mac = parse_mac(&message.mac)?;
        let device_mac = if message.device_mac.is_empty() { mac } else { parse_mac(&message.device_mac)? };
        Ok(Self { name, mac, device_mac, mtu: message.mtu, addresses, neighbours })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None })
        .collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| AgentError::InvalidArgument(format!("{text:?} is not a MAC address")))
}

fn parse_ip(text: &str, what: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| AgentError::InvalidArgument(format!("{text:?} is not {what}")))
}

/// An address of a route, which is to be of its IP version; an empty one is none.
fn parse_of(text: &str, what: &str, destination: Cidr) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = parse_ip(text, &format!("a {what}'s address"))?;
    if address.is_ipv4() != destination.address.is_ipv4() {
        return Err(AgentError::InvalidArgument(format!(
            "the route to {destination} has a {what} of the other IP version"
        )));
    }
    Ok(Some(address))
}

pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub destination: Cidr,
    pub gateway: Option<IpAddr>,
    pub interface: String,
    pub metric: u32,
    pub mtu: u32,
    pub source: Option<IpAddr>,
}

impl Route {
    /// # Errors
    /// `InvalidArgument` naming the part that cannot be parsed.
    pub fn parse(message: &proto::Route) -> Result<Self> {
        let destination = Cidr::parse(&message.destination)?;
        Ok(Self {
            destination,
            gateway: parse_of(&message.gateway, "gateway", destination)?,
            interface: message.interface.clone(),
            metric: message.metric,
            mtu: message.mtu,
            source: parse_of(&message.source, "source", destination)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let network = Cidr::parse("10.1.2.3/24").unwrap();
        assert!(network.contains("10.1.2.200".parse().unwrap()));
        assert!(!network.contains("10.1.3.1".parse().unwrap()));
        assert!(!network.contains("::1".parse().unwrap()));
        assert!(Cidr::parse("0.0.0.0/0").unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!(!Cidr::parse("10.0.0.1/32").unwrap().contains("10.0.0.2".parse().unwrap()));
        assert!(Cidr::parse("fd00::1/64").unwrap().contains("fd00::ff".parse().unwrap()));
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/8", "::/129", ""] {
            assert!(Cidr::parse(bad).is_err(), "{bad}");
        }
    }

    fn neighbour(address: &str, mac: &str) -> proto::Neighbour {
        proto::Neighbour { address: address.into(), mac: mac.into() }
    }

    #[test]
    fn interfaces() {
        let message = proto::Interface {
            name: "eth0".into(),
            mac: "0a:58:0a:01:02:03".into(),
            mtu: 1450,
            addresses: vec!["10.1.2.3/24".into()],
            neighbours: vec![neighbour("169.254.1.1", "ee:ee:ee:ee:ee:ee")],
            device_mac: String::new(),
        };
        let interface = Interface::parse(&message).unwrap();
        assert_eq!(interface.neighbours, [("169.254.1.1".parse().unwrap(), [0xee; 6])]);
        for bad in [neighbour("x", "ee:ee:ee:ee:ee:ee"), neighbour("169.254.1.1", "ee")] {
            assert!(
                Interface::parse(&proto::Interface { neighbours: vec![bad], ..message.clone() }).is_err()
            );
        }
        assert_eq!(show_mac(interface.mac), "0a:58:0a:01:02:03");
        assert_eq!(interface.device_mac, interface.mac);
        let on_device =
            |mac: &str| Interface::parse(&proto::Interface { device_mac: mac.into(), ..message.clone() });
        assert_eq!(on_device("02:00:00:00:00:0f").unwrap().device_mac, [2, 0, 0, 0, 0, 15]);
        assert!(on_device("02:00").is_err());
        let named = |name: &str| Interface::parse(&proto::Interface { name: name.into(), ..message.clone() });
        assert!(named("a/b").is_err() && named("").is_err() && named("sixteen-letters-").is_err());
        for mac in ["0a:58", "0a:58:0a:01:02:0g", "", "a:58:0a:01:02:03:00"] {
            assert!(Interface::parse(&proto::Interface { mac: mac.into(), ..message.clone() }).is_err());
        }
    }

    #[test]
    fn routes() {
        let parse = |destination: &str, gateway: &str| {
            Route::parse(&proto::Route {
                destination: destination.into(),
                gateway: gateway.into(),
                ..proto::Route::default()
            })
        };
        let from = |source: &str| {
            Route::parse(&proto::Route {
                destination: "10.0.0.0/8".into(),
                source: source.into(),
                ..proto::Route::default()
            })
        };
        assert_eq!(from("10.0.0.1").unwrap().source, Some("10.0.0.1".parse().unwrap()));
        assert_eq!(from("").unwrap().source, None);
        assert!(from("fd00::1").is_err() && from("x").is_err());
        assert!(parse("0.0.0.0/0", "169.254.1.1").is_ok());
        assert_eq!(parse("10.0.0.0/8", "").unwrap().gateway, None);
        assert!(parse("::/0", "10.0.0.1").is_err());
        assert!(parse("default", "").is_err());
    }
}
