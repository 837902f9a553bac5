//! Options on the kernel's command line.

use std::str::FromStr;

use log::LevelFilter;

/// Where the host expects the agent.
const DEFAULT_PORT: u32 = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    pub port: u32,
    pub log: LevelFilter,
    /// The serial of the writable disk of a machine whose memory is kept for others to start from; empty: it has none.
    pub scratch: String,
}

impl CommandLine {
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Options that make no sense are passed over: a guest that boots can be asked, one that does not cannot.
    fn parse(text: &str) -> Self {
        let mut options = Self { port: DEFAULT_PORT, log: LevelFilter::Warn, scratch: String::new() };
        for word in text.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("vmruntime.port", port)) => options.port = port.parse().unwrap_or(DEFAULT_PORT),
                Some(("vmruntime.log", level)) => {
                    options.log = LevelFilter::from_str(level).unwrap_or(LevelFilter::Warn);
                }
                Some(("vmruntime.scratch", serial)) => options.scratch = serial.into(),
                _ => {}
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_options() {
        let options = |port, log, scratch: &str| CommandLine { port, log, scratch: scratch.into() };
        assert_eq!(CommandLine::parse("quiet ro"), options(1024, LevelFilter::Warn, ""));
        assert_eq!(
            CommandLine::parse("console=hvc0 vmruntime.port=77 vmruntime.log=debug vmruntime.scratch=s\n"),
            options(77, LevelFilter::Debug, "s")
        );
        assert_eq!(CommandLine::parse("vmruntime.port=x"), options(1024, LevelFilter::Warn, ""));
    }
}
