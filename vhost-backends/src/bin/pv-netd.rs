//! The network daemon; all of it is in the library, so that other programs can be it too.

fn main() -> std::process::ExitCode {
    vhost_backends::pv_netd_main(std::env::args_os())
}
