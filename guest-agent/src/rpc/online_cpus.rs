use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::error::{AgentError, Result};
use crate::proto::{OnlineCpusRequest, OnlineCpusResponse};

const CPUS: &str = "/sys/devices/system/cpu";
const DEADLINE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(10);

pub async fn call(request: &OnlineCpusRequest) -> Result<OnlineCpusResponse> {
    let end = Instant::now() + DEADLINE;
    loop {
        let online = bring_online(Path::new(CPUS));
        if online >= request.count {
            return Ok(OnlineCpusResponse { online });
        }
        if Instant::now() >= end {
            let seconds = DEADLINE.as_secs();
            return Err(AgentError::DeadlineExceeded(format!(
                "the guest uses {online} processors after {seconds} s, {} are wanted",
                request.count
            )));
        }
        sleep(AGAIN).await;
    }
}

/// Puts every processor there is to use and answers how many are. The first one has no switch: it is always on.
fn bring_online(directory: &Path) -> u32 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut online = 0;
    for entry in entries {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        if !number
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        {
            continue;
        }
        let switch = entry.path().join("online");
        let state = fs::read_to_string(&switch);
        let on = match state.as_deref().map(str::trim) {
            Ok("0") => fs::write(&switch, "1").is_ok(),
            _ => true,
        };
        online += u32::from(on);
    }
    online
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_that_are_off_are_switched_on() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["cpu0", "cpu1", "cpufreq", "cpuidle"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let switch = directory.path().join("cpu1/online");
        fs::write(&switch, "0\n").unwrap();
        assert_eq!(bring_online(directory.path()), 2);
        assert_eq!(fs::read_to_string(&switch).unwrap(), "1");
    }
}
