//! What went over each network device.

use std::fs;
use std::path::Path;

use crate::proto::NetworkStats;

/// Counters of every interface that is a device: not the loopback, nor others that the kernel makes by itself.
///
/// A sysfs shows the interfaces of the network namespace that it was mounted in.
pub fn read(sysfs: &Path) -> Vec<NetworkStats> {
    read_below(&sysfs.join("class/net"))
}

fn read_below(root: &Path) -> Vec<NetworkStats> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut all: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| root.join(name).join("device").exists())
        .map(|name| read_one(&root.join(&name).join("statistics"), name))
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn read_one(directory: &Path, name: String) -> NetworkStats {
    let counter = |file: &str| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    NetworkStats {
        name,
        rx_bytes: counter("rx_bytes"),
        rx_errors: counter("rx_errors"),
        tx_bytes: counter("tx_bytes"),
        tx_errors: counter("tx_errors"),
        rx_packets: counter("rx_packets"),
        tx_packets: counter("tx_packets"),
        rx_dropped: counter("rx_dropped"),
        tx_dropped: counter("tx_dropped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in [("lo", "1"), ("eth0", "42\n")] {
            let statistics = directory.path().join(name).join("statistics");
            fs::create_dir_all(&statistics).unwrap();
            fs::write(statistics.join("rx_bytes"), bytes).unwrap();
        }
        fs::create_dir(directory.path().join("eth0/device")).unwrap();
        let all = read_below(directory.path());
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].name.as_str(), all[0].rx_bytes), ("eth0", 42));
    }
}
