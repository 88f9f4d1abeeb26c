//! A memory cgroup of one's own, version 1 or 2.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A fresh cgroup that accounts memory; removed when dropped.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    v2: bool,
}

impl Cgroup {
    /// Makes one, wherever this process may.
    pub(crate) fn new(name: &str) -> Result<Cgroup> {
        let own = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
        let mut tried = Vec::new();
        for line in own.lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) =
                (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            let v2 = controllers.is_empty();
            if !v2 && !controllers.split(',').any(|c| c == "memory") {
                continue;
            }
            let root = Path::new(if v2 {
                "/sys/fs/cgroup"
            } else {
                "/sys/fs/cgroup/memory"
            });
            // Beside the own one where that is allowed; in version 2 a group that has processes
            // may have no children with controllers.
            let own = root.join(path.trim_start_matches('/'));
            for parent in own.ancestors().take_while(|p| p.starts_with(root)) {
                match Cgroup::inside(parent, name, v2) {
                    Ok(cgroup) => return Ok(cgroup),
                    Err(error) => tried.push(format!("{}: {error:#}", parent.display())),
                }
            }
        }
        if tried.is_empty() {
            tried.push("no memory controller is mounted".into());
        }
        anyhow::bail!("{}", tried.join("; "))
    }

    fn inside(parent: &Path, name: &str, v2: bool) -> Result<Cgroup> {
        let path = parent.join(format!("{name}-{}", std::process::id()));
        if v2 {
            // Refused where it is on already, which is as good.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
        }
        fs::create_dir(&path).context("make a cgroup")?;
        let cgroup = Cgroup { path, v2 };
        cgroup.usage()?;
        Ok(cgroup)
    }

    /// The file to which a process writes `0` to get in.
    pub(crate) fn door(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    fn number(&self, file: &str) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(file)).with_context(|| file.to_owned())?;
        Ok(text.trim().parse()?)
    }

    /// Bytes charged to it, the kernel's own for it included.
    ///
    /// In version 1 kernel memory is fed to the main counter as well, so that it is included there
    /// too and `memory.kmem` says how much of it that is.
    pub(crate) fn usage(&self) -> Result<u64> {
        self.number(if self.v2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        })
    }

    /// Bytes of it that are the kernel's own, where the host says.
    pub(crate) fn kernel(&self) -> Option<u64> {
        if !self.v2 {
            return self.number("memory.kmem.usage_in_bytes").ok();
        }
        let stat = fs::read_to_string(self.path.join("memory.stat")).ok()?;
        let line = stat.lines().find_map(|l| l.strip_prefix("kernel "))?;
        line.trim().parse().ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes leave it a moment after they have been waited for.
        for _ in 0..50 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
