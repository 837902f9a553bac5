//! What a container uses, by the files of its control group; what a file does not have is 0.

use std::fs;

use super::cgroup::Cgroup;
use crate::proto::{ContainerStats, Pressure};

/// Nanoseconds of a tick of version 1's cpuacct.stat (USER_HZ, 100 on every architecture).
const TICK_NS: u64 = 10_000_000;

/// What a group's tasks did with disks.
#[derive(Debug, Default, PartialEq, Eq)]
struct Io {
    read_bytes: u64,
    write_bytes: u64,
    reads: u64,
    writes: u64,
}

impl Cgroup {
    /// Everything but the writable layer and the container's id.
    pub fn stats(&self) -> ContainerStats {
        let io = self.io();
        let processes = self.processes();
        let (open_files, open_sockets) = descriptors(&processes);
        ContainerStats {
            pids: self.number("pids.current"),
            pids_limit: self.number("pids.max"),
            processes: processes.len() as u64,
            open_files,
            open_sockets,
            io_read_bytes: io.read_bytes,
            io_write_bytes: io.write_bytes,
            io_reads: io.reads,
            io_writes: io.writes,
            cpu_pressure: self.pressure("cpu.pressure"),
            memory_pressure: self.pressure("memory.pressure"),
            io_pressure: self.pressure("io.pressure"),
            ..self.memory(self.cpu())
        }
    }

    fn cpu(&self) -> ContainerStats {
        let (stat, ticks) = (self.table("cpu.stat"), self.table("cpuacct.stat"));
        let either = |v2: &str, v1: Option<u64>| {
            stat.get(v2).map(|us| us.saturating_mul(1000)).or(v1).unwrap_or_default()
        };
        let of_ticks = |name: &str| ticks.get(name).map(|count| count.saturating_mul(TICK_NS));
        ContainerStats {
            cpu_usage_ns: either("usage_usec", Some(self.number("cpuacct.usage"))),
            cpu_user_ns: either("user_usec", of_ticks("user")),
            cpu_system_ns: either("system_usec", of_ticks("system")),
            cpu_periods: stat.get("nr_periods").copied().unwrap_or_default(),
            cpu_throttled_periods: stat.get("nr_throttled").copied().unwrap_or_default(),
            cpu_throttled_ns: either("throttled_usec", stat.get("throttled_time").copied()),
            ..ContainerStats::default()
        }
    }

    fn memory(&self, stats: ContainerStats) -> ContainerStats {
        let (table, events) = (self.table("memory.stat"), self.table("memory.events"));
        // Version 1 counts groups below under names of their own.
        let stat = |v2: &str, v1: &str| table.get(v1).or_else(|| table.get(v2)).copied().unwrap_or_default();
        let either = |v2: &str, v1: &str| match self.number(v2) {
            0 => self.number(v1),
            number => number,
        };
        let usage = either("memory.current", "memory.usage_in_bytes");
        let limit = either("memory.max", "memory.limit_in_bytes");
        let kernel = table.get("kernel").copied();
        ContainerStats {
            memory_usage_bytes: usage,
            memory_working_set_bytes: usage.saturating_sub(stat("inactive_file", "total_inactive_file")),
            memory_rss_bytes: stat("anon", "total_rss"),
            memory_page_faults: stat("pgfault", "total_pgfault"),
            memory_major_page_faults: stat("pgmajfault", "total_pgmajfault"),
            memory_cache_bytes: stat("file", "total_cache"),
            memory_mapped_file_bytes: stat("file_mapped", "total_mapped_file"),
            memory_kernel_bytes: kernel.unwrap_or_else(|| self.number("memory.kmem.usage_in_bytes")),
            memory_peak_bytes: either("memory.peak", "memory.max_usage_in_bytes"),
            memory_limit_hits: events.get("max").copied().unwrap_or_else(|| self.number("memory.failcnt")),
            // Version 1 says "none" by the largest number of whole pages.
            memory_limit_bytes: if limit > (1 << 62) { 0 } else { limit },
            swap_usage_bytes: self.number("memory.swap.current"),
            oom_kills: self.oom_kills(),
            ..stats
        }
    }

    /// All devices taken together.
    fn io(&self) -> Io {
        let mut io = Io::default();
        for word in self.text("io.stat").split_whitespace() {
            let Some((name, number)) = word.split_once('=') else { continue };
            let number: u64 = number.parse().unwrap_or_default();
            match name {
                "rbytes" => io.read_bytes += number,
                "wbytes" => io.write_bytes += number,
                "rios" => io.reads += number,
                "wios" => io.writes += number,
                _ => {}
            }
        }
        let (bytes, operations) =
            ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_serviced_recursive");
        io.read_bytes += self.sum(bytes, "Read");
        io.write_bytes += self.sum(bytes, "Write");
        io.reads += self.sum(operations, "Read");
        io.writes += self.sum(operations, "Write");
        io
    }

    /// Adds up the lines "DEVICE KIND NUMBER" of one kind.
    fn sum(&self, file: &str, kind: &str) -> u64 {
        let text = self.text(file);
        let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines
            .filter(|words| words.len() == 3 && words[1] == kind)
            .filter_map(|words| words[2].parse::<u64>().ok())
            .sum()
    }

    fn pressure(&self, file: &str) -> Option<Pressure> {
        let text = self.text(file);
        let total = |kind: &str| {
            let line = text.lines().find(|line| line.starts_with(kind))?;
            line.rsplit_once("total=")?.1.trim().parse().ok()
        };
        Some(Pressure { waiting_us: total("some")?, stalled_us: total("full").unwrap_or_default() })
    }
}

/// (open descriptors, those that are sockets) of processes; those that end meanwhile count as they were.
fn descriptors(processes: &[i32]) -> (u64, u64) {
    let (mut all, mut sockets) = (0, 0);
    for pid in processes {
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            all += 1;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
        }
    }
    (all, sockets)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_group_of_version_2() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 1\nthrottled_usec 7\n",
        );
        put("memory.current", "1000\n");
        put("memory.max", "max\n");
        put("memory.peak", "2000\n");
        put(
            "memory.stat",
            "anon 300\nfile 450\nkernel 50\nfile_mapped 20\ninactive_file 400\npgfault 7\npgmajfault 1\n",
        );
        put("memory.events", "low 0\nmax 3\noom 1\noom_kill 2\n");
        put("pids.current", "3\n");
        put("pids.max", "max\n");
        put(
            "io.stat",
            "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n",
        );
        put("io.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 total=5\n");
        let expected = ContainerStats {
            cpu_usage_ns: 1_500_000,
            cpu_user_ns: 1_000_000,
            cpu_system_ns: 500_000,
            cpu_periods: 4,
            cpu_throttled_periods: 1,
            cpu_throttled_ns: 7_000,
            memory_usage_bytes: 1000,
            memory_working_set_bytes: 600,
            memory_rss_bytes: 300,
            memory_page_faults: 7,
            memory_major_page_faults: 1,
            memory_cache_bytes: 450,
            memory_mapped_file_bytes: 20,
            memory_kernel_bytes: 50,
            memory_peak_bytes: 2000,
            memory_limit_hits: 3,
            oom_kills: 2,
            pids: 3,
            io_read_bytes: 11,
            io_write_bytes: 22,
            io_reads: 4,
            io_writes: 6,
            io_pressure: Some(Pressure { waiting_us: 12, stalled_us: 5 }),
            ..ContainerStats::default()
        };
        assert_eq!(Cgroup(vec!["/nonexistent".into(), directory.path().into()]).stats(), expected);
    }

    #[test]
    fn a_group_of_version_1() {
        let directory = tempfile::tempdir().unwrap();
        let groups = ["memory", "cpuacct", "blkio"].map(|name| directory.path().join(name));
        groups.iter().for_each(|group| fs::create_dir(group).unwrap());
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put("cpuacct/cpuacct.usage", "9\n");
        put("cpuacct/cpuacct.stat", "user 2\nsystem 1\n");
        put("cpuacct/cpu.stat", "nr_periods 1\nnr_throttled 1\nthrottled_time 30\n");
        put("memory/memory.usage_in_bytes", "1000\n");
        put("memory/memory.max_usage_in_bytes", "1001\n");
        put("memory/memory.failcnt", "4\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        put("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 400\ntotal_rss 300\ntotal_cache 5\n");
        put("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
        put(
            "blkio/blkio.throttle.io_service_bytes_recursive",
            "8:0 Read 10\n8:0 Write 2\n8:0 Total 12\nTotal 12\n",
        );
        let stats = Cgroup(groups.into()).stats();
        assert_eq!((stats.cpu_usage_ns, stats.cpu_user_ns, stats.cpu_throttled_ns), (9, 2 * TICK_NS, 30));
        assert_eq!(
            (stats.memory_working_set_bytes, stats.memory_rss_bytes, stats.memory_cache_bytes),
            (600, 300, 5)
        );
        assert_eq!(
            (stats.memory_peak_bytes, stats.memory_limit_hits, stats.memory_limit_bytes),
            (1001, 4, 0)
        );
        assert_eq!((stats.oom_kills, stats.io_read_bytes, stats.io_write_bytes), (1, 10, 2));
        assert_eq!(stats.io_pressure, None);
    }

    #[test]
    fn descriptors_of_this_process() {
        let _socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (all, sockets) = descriptors(&[std::process::id().try_into().unwrap(), 1 << 30]);
        assert!(sockets >= 1 && all > sockets);
    }
}
