//! The daemons, as the tests start them: the same code as `pv-blkd` and, under that name, `pv-netd`.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os()
        .next()
        .is_some_and(|name| name == "pv-netd")
    {
        vhost_backends::pv_netd_main(std::env::args_os())
    } else {
        vhost_backends::pv_blkd_main(std::env::args_os())
    }
}
