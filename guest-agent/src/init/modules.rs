//! Kernel modules the image asks for, in its order.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

const LIST: &str = "/etc/vmruntime/modules";
const NO_PARAMETERS: &CStr = c"";

/// Loads every module of the list. A kernel with everything built in has no list; a module that fails is reported
/// and the rest goes on, since what needs it will say so more clearly.
pub fn load_all() {
    let list = std::fs::read_to_string(LIST).unwrap_or_default();
    for path in entries(&list) {
        match load(path) {
            Ok(()) => super::forget_file(Path::new(path)),
            // It found nothing to drive on this machine.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO | libc::EOPNOTSUPP)) =>
            {
                log::debug!("module {path}: {error}");
            }
            Err(error) => log::warn!("module {path}: {error}"),
        }
    }
}

fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn load(path: &str) -> io::Result<()> {
    match finit_module(File::open(path)?, NO_PARAMETERS, ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_are_no_modules() {
        let list = "/m/a.ko\n\n# later\n  /m/b.ko  \n";
        assert_eq!(entries(list).collect::<Vec<_>>(), ["/m/a.ko", "/m/b.ko"]);
    }
}
