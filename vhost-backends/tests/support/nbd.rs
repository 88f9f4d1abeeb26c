//! An NBD server of somebody else, ended with its test.
#![allow(dead_code)]

use super::process::TIMEOUT;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct NbdServer(pub(crate) Child);

impl NbdServer {
    /// Once it listens on `socket`. `None`, and said so, where the program is not installed.
    pub(crate) fn start<A: AsRef<OsStr>>(
        program: &str,
        arguments: &[A],
        socket: &Path,
    ) -> Option<NbdServer> {
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            println!("SKIPPED: no {program} to test against");
            return None;
        };
        let mut server = NbdServer(child);
        let deadline = Instant::now() + TIMEOUT;
        // nbdkit does not always survive a client that is gone before it was greeted.
        let greeted = |mut stream: UnixStream| stream.read_exact(&mut [0; 18]);
        while UnixStream::connect(socket).and_then(greeted).is_err() {
            let ended = server.0.try_wait().unwrap();
            assert!(ended.is_none(), "{program} ended: {ended:?}");
            assert!(Instant::now() < deadline, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }

    /// nbdkit on a file.
    pub(crate) fn nbdkit(socket: &Path, image: &Path) -> Option<NbdServer> {
        let words = ["-f".as_ref(), "-U".as_ref(), socket.as_os_str()];
        let what = ["file".as_ref(), image.as_os_str()];
        NbdServer::start("nbdkit", &[&words[..], &what].concat(), socket)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
