//! Log lines on the console: `vmruntime-agent: warn: text`.
//!
//! A guest's serial console is slow, so only warnings are shown unless more is asked for.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("vmruntime_agent")
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            line(&format!("{}: {}", name(record.level()), record.args()));
        }
    }

    fn flush(&self) {}
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

/// Starts logging; messages less serious than `level` are dropped.
pub fn start(level: LevelFilter) {
    static CONSOLE: Console = Console;
    // A second logger cannot be set; the first one is the same.
    let _ = log::set_logger(&CONSOLE);
    log::set_max_level(level);
}

/// One line to the console, in one write, so that lines of several writers do not mix.
pub fn line(text: &str) {
    let _ = std::io::stderr().write_all(format!("vmruntime-agent: {text}\n").as_bytes());
}
