//! Checks on names that become parts of paths or arguments.

use crate::error::{AgentError, Result};

const LONGEST_ID: usize = 128;

/// Accepts `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
pub fn id(what: &str, id: &str) -> Result<()> {
    let mut bytes = id.bytes();
    let starts_well = bytes.next().is_some_and(|first| first.is_ascii_alphanumeric());
    let goes_on_well = bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
    if starts_well && goes_on_well && id.len() <= LONGEST_ID {
        return Ok(());
    }
    let shown: String = id.chars().take(LONGEST_ID).collect();
    Err(AgentError::InvalidArgument(format!(
        "{what} {shown:?} must be 1 to {LONGEST_ID} letters, digits, '_', '.' or '-', the first a letter or digit"
    )))
}

/// Accepts a disk's serial number: what can be printed and holds no path separator.
pub fn serial(serial: &str) -> Result<()> {
    let plain = serial.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if plain && !serial.is_empty() && serial.len() <= 252 {
        return Ok(());
    }
    Err(AgentError::InvalidArgument(format!("disk serial {serial:?} is not usable")))
}

/// Accepts a signal number.
pub fn signal(number: u32) -> Result<i32> {
    match i32::try_from(number) {
        Ok(signal @ 1..=64) => Ok(signal),
        _ => Err(AgentError::InvalidArgument(format!("signal {number} is not between 1 and 64"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["a", "0", "a_b.c-d", &"x".repeat(128)] {
            assert!(id("container id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(id("container id", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals() {
        assert_eq!(signal(9).unwrap(), 9);
        assert!(signal(0).is_err() && signal(65).is_err() && signal(u32::MAX).is_err());
    }
}
