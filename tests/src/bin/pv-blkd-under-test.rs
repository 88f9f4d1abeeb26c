//! The block daemon, as the tests start it: the same code as `pv-blkd`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_backends::pv_blkd_main(std::env::args_os())
}
