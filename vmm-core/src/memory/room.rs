//! Whether the host has room for memory that is to be present at once.
//!
//! The kernel promises more than it has, and ends somebody when that is used: here, who asked for it.
//! So it is asked before. What cannot be read is no limit.

use std::fs;
use std::path::Path;

/// Bytes that the host, and the cgroup that this process is in, have left now, swap included.
pub(crate) fn left() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let host = field(&meminfo, "MemAvailable:", 1024);
    let here = least(host, cgroup_left(Path::new("/sys/fs/cgroup"), &cgroups))?;
    let swap = field(&meminfo, "SwapFree:", 1024).unwrap_or(0);
    Some(here.saturating_add(swap))
}

/// Bytes of a field that is given in this unit.
fn field(text: &str, name: &str, unit: u64) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(unit)
}

/// What the unified hierarchy's groups leave, from this process's own to the root.
fn cgroup_left(root: &Path, cgroups: &str) -> Option<u64> {
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let number = |group: &Path, file: &str| -> Option<u64> {
        let text = fs::read_to_string(group.join(file)).ok()?;
        // Without a limit it says "max".
        text.trim().parse().ok()
    };
    let mut least_left = None;
    for group in root.join(own).ancestors() {
        if !group.starts_with(root) {
            break;
        }
        if let Some(most) = number(group, "memory.max") {
            let used = number(group, "memory.current").unwrap_or(0);
            // Cached files are counted, and make room.
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let cached = ["active_file ", "inactive_file "]
                .iter()
                .filter_map(|name| field(&stat, name, 1))
                .fold(0, u64::saturating_add);
            let left = most.saturating_sub(used.saturating_sub(cached));
            least_left = least(least_left, Some(left));
        }
    }
    least_left
}

fn least(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_left_is_read() {
        let text = "MemTotal: 9 kB\nMemFree:  1 kB\nMemAvailable:   23821332 kB\n";
        let available = |text| field(text, "MemAvailable:", 1024);
        assert_eq!(available(text), Some(23_821_332 * 1024));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
        assert_eq!(available("MemAvailable: 18446744073709551615 kB\n"), None);
        assert_eq!(least(Some(3), Some(2)), Some(2));
        assert_eq!(least(None, Some(2)), Some(2));
        assert_eq!(least(None, None), None);
        assert!(left().is_some_and(|left| left > 0));
    }

    #[test]
    fn the_least_that_a_group_leaves_counts() {
        let root = std::env::temp_dir().join(format!("pv-room-{}", std::process::id()));
        let own = root.join("outer/inner");
        fs::create_dir_all(&own).unwrap();
        let cgroups = "4:memory:/elsewhere\n0::/outer/inner\n";
        assert_eq!(cgroup_left(&root, cgroups), None);
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert_eq!(cgroup_left(&root, cgroups), None);
        fs::write(root.join("outer/memory.max"), "1000\n").unwrap();
        fs::write(root.join("outer/memory.current"), "400\n").unwrap();
        assert_eq!(cgroup_left(&root, cgroups), Some(600));
        let stat = "anon 9\nactive_file 50\ninactive_file 25\n";
        fs::write(root.join("outer/memory.stat"), stat).unwrap();
        assert_eq!(cgroup_left(&root, cgroups), Some(675));
        fs::write(own.join("memory.max"), "500\n").unwrap();
        fs::write(own.join("memory.current"), "600\n").unwrap();
        assert_eq!(cgroup_left(&root, cgroups), Some(0));
        assert_eq!(cgroup_left(&root, "4:memory:/elsewhere\n"), None);
        fs::remove_dir_all(&root).unwrap();
    }
}
