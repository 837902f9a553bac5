//! Times the agent reports.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::proto;

/// Microseconds since the kernel started, sleep included.
pub fn uptime_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| micros(Duration::from(now)))
}

/// Nanoseconds since 1970, as the protocol has them.
pub fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Collects where the time of a request went.
pub struct Phases {
    began: Instant,
    last: Instant,
    done: Vec<proto::Phase>,
}

impl Phases {
    pub fn start() -> Self {
        let now = Instant::now();
        Self { began: now, last: now, done: Vec::new() }
    }

    /// A watch for what is done beside other things from now on.
    pub fn beside(&self) -> Self {
        Self { began: self.began, last: Instant::now(), done: Vec::new() }
    }

    /// Ends the phase that began with the previous mark.
    pub fn mark(&mut self, name: &str) {
        let now = Instant::now();
        let (duration_us, start_us) = (micros(now - self.last), micros(self.last - self.began));
        self.done.push(proto::Phase { name: name.into(), duration_us, start_us });
        self.last = now;
    }

    /// Appends phases of a watch beside this one, and restarts this one.
    pub fn extend(&mut self, phases: Vec<proto::Phase>) {
        self.done.extend(phases);
        self.last = Instant::now();
    }

    pub fn into_vec(self) -> Vec<proto::Phase> {
        self.done
    }
}
