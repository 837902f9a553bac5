//! What containers and execs read and write.

pub mod buffer;
pub mod file;
pub mod lines;
pub mod pump;
pub mod taps;
pub mod terminal;
