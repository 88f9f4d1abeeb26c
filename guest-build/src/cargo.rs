//! The nested `cargo build`: flags, environment, target directory.
//!
//! It runs inside another cargo's build script, so it gets a target directory of its own (two
//! cargos that wait for one lock wait for ever) and none of the outer one's environment: wrappers
//! such as clippy's, flags and profiles are meant for the host.

use crate::check::{CheckOptions, CheckReport, check};
use crate::workspace::{GuestWorkspace, run};
use crate::{BuildError, GuestPackage};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// The linker script that makes an executable a guest image.
pub const LINK_SCRIPT: &str = include_str!("../link.ld");

/// The target: the stock one, nothing to install.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What a guest is compiled with.
const CODEGEN: &[&str] = &[
    "panic=abort",
    "target-cpu=x86-64-v2",
    "relocation-model=static",
    "force-unwind-tables=no",
    "link-arg=-nostartfiles",
    "link-arg=-nostdlib",
    "link-arg=-static",
    "link-arg=-no-pie",
    "link-arg=-Wl,--build-id=none",
    "link-arg=-Wl,-z,noexecstack",
    "link-arg=-Wl,-z,max-page-size=4096",
    "link-arg=-Wl,-z,separate-code",
    "link-arg=-Wl,--gc-sections",
];

/// Switches of crates that would otherwise ask the CPU at run time.
///
/// A guest takes its CPU features from the boot block, and the instruction check refuses `CPUID`.
/// Crates whose switch is a cargo feature (sha2 0.10: `force-soft`) are switched by the guest.
const NO_CPU_DETECTION: &[&str] = &[
    "aes_backend=\"soft\"",
    "aes_force_soft",
    "chacha20_backend=\"soft\"",
    "chacha20_force_soft",
    "curve25519_dalek_backend=\"serial\"",
    "polyval_backend=\"soft\"",
    "polyval_force_soft",
    "poly1305_backend=\"soft\"",
    "poly1305_force_soft",
    "sha1_backend=\"soft\"",
    "sha2_backend=\"soft\"",
    "keccak_backend=\"soft\"",
];

/// Variables of the outer cargo that the nested one keeps: which it is, where its things are.
const KEPT: &[&str] = &["CARGO", "CARGO_HOME"];

/// Beginnings of variables that the nested one keeps: how to reach a registry.
const KEPT_PREFIXES: &[&str] = &["CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR"];

/// Variables without the `CARGO` prefix that would change the guest.
const DROPPED: &[&str] = &[
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CLIPPY_CONF_DIR",
    "TARGET",
    "HOST",
    "OUT_DIR",
    "PROFILE",
    "OPT_LEVEL",
    "DEBUG",
    "NUM_JOBS",
];

/// Builds one guest and checks it.
///
/// # Examples
///
/// ```no_run
/// # fn main() -> Result<(), guest_build::BuildError> {
/// let guest = guest_build::GuestBuild::new("guests").package("first-guest").build()?;
/// println!("{}: {} functions", guest.path.display(), guest.report.functions);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GuestBuild {
    dir: PathBuf,
    package: Option<String>,
    features: Vec<String>,
    target_dir: Option<PathBuf>,
    options: CheckOptions,
}

/// A guest that was built and has passed the check.
#[derive(Clone, Debug)]
pub struct GuestElf {
    /// Where the nested build left it; the next build overwrites it.
    pub path: PathBuf,
    /// The executable.
    pub bytes: Vec<u8>,
    /// What was checked.
    pub report: CheckReport,
    /// The files that it was built from, registry crates left out.
    pub sources: Vec<PathBuf>,
}

impl GuestBuild {
    /// A build in the guest workspace at `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        GuestBuild {
            dir: dir.into(),
            package: None,
            features: Vec::new(),
            target_dir: None,
            options: CheckOptions::default(),
        }
    }

    /// The package to build.
    pub fn package(mut self, name: impl Into<String>) -> Self {
        self.package = Some(name.into());
        self
    }

    /// Enables a feature of the package.
    pub fn feature(mut self, name: impl Into<String>) -> Self {
        self.features.push(name.into());
        self
    }

    /// Where to build; by default `guests` in the host's target directory when called from a build
    /// script, and the guest workspace's own `target` otherwise.
    pub fn target_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(dir.into());
        self
    }

    /// Excuses functions whose name starts with `prefix` from the instruction check.
    ///
    /// For test guests. What the package's manifest excuses is excused as well.
    pub fn allow_banned(mut self, prefix: impl Into<String>) -> Self {
        self.options.allow_banned.push(prefix.into());
        self
    }

    /// Builds and checks.
    ///
    /// # Errors
    ///
    /// When the package does not exist or does not compile, and when the check refuses it.
    pub fn build(&self) -> Result<GuestElf, BuildError> {
        let name = self.package.as_deref().ok_or(BuildError::NothingToBuild)?;
        let workspace = GuestWorkspace::open(&self.dir)?;
        let package = workspace.package(name)?;
        let target_dir = match &self.target_dir {
            Some(dir) => dir.clone(),
            None => default_target_dir(workspace.dir()),
        };
        let script = write_link_script(&target_dir)?;
        let mut command = command(workspace.dir());
        command
            .args(["build", "--release", "--locked", "--target", TARGET])
            .args(["--package", name, "--bin", name])
            .arg("--target-dir")
            .arg(&target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags(workspace.dir(), &script));
        if !self.features.is_empty() {
            command.arg("--features").arg(self.features.join(","));
        }
        run(&mut command, name)?;
        let path = target_dir.join(TARGET).join("release").join(name);
        let bytes = fs::read(&path).map_err(|source| file("read", &path, source))?;
        let mut options = self.options.clone();
        options
            .allow_banned
            .extend_from_slice(&package.allow_banned);
        let report = check(&bytes, &options).map_err(|source| BuildError::Refused {
            package: name.to_owned(),
            path: path.clone(),
            source,
        })?;
        let sources = sources(&path, workspace.dir(), package)?;
        Ok(GuestElf {
            path,
            bytes,
            report,
            sources,
        })
    }
}

impl GuestElf {
    /// Tells the outer cargo, from a build script, to run it again when a source changes.
    pub fn emit_rerun_if_changed(&self) {
        for source in &self.sources {
            println!("cargo::rerun-if-changed={}", source.display());
        }
    }
}

/// Cargo, in `dir`, with an environment that has nothing of an outer cargo in it.
pub(crate) fn command(dir: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(dir);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let kept = KEPT.contains(&text.as_ref())
            || KEPT_PREFIXES.iter().any(|prefix| text.starts_with(prefix));
        let cargos = text.starts_with("CARGO") || text.starts_with("DEP_");
        if (cargos && !kept) || DROPPED.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

fn flags(workspace: &Path, script: &Path) -> String {
    let mut flags: Vec<String> = Vec::new();
    for codegen in CODEGEN {
        flags.push(format!("-C{codegen}"));
    }
    flags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    for cfg in NO_CPU_DETECTION {
        flags.push(format!("--cfg={cfg}"));
    }
    // The same sources give the same image wherever they lie. The last prefix that fits wins.
    let root = workspace.parent().unwrap_or(workspace);
    flags.push(format!("--remap-path-prefix={}=/paravane", root.display()));
    if let Some(home) = cargo_home() {
        flags.push(format!("--remap-path-prefix={}=/cargo", home.display()));
    }
    flags.join("\u{1f}")
}

fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
}

/// `guests` in the target directory that the outer build uses, or the workspace's own.
fn default_target_dir(workspace: &Path) -> PathBuf {
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        return workspace.join("target");
    };
    // Cargo marks the root of a target directory with this file.
    let root = out
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").is_file());
    root.unwrap_or(&out).join("guests")
}

/// Writes the linker script under a name that changes with its text: cargo does not look into it,
/// but it does look at the flags.
fn write_link_script(target_dir: &Path) -> Result<PathBuf, BuildError> {
    fs::create_dir_all(target_dir).map_err(|e| file("create", target_dir, e))?;
    let mut hasher = DefaultHasher::new();
    LINK_SCRIPT.hash(&mut hasher);
    let path = target_dir.join(format!("link-{:016x}.ld", hasher.finish()));
    if fs::read(&path).is_ok_and(|text| text == LINK_SCRIPT.as_bytes()) {
        return Ok(path);
    }
    // Two builds may do this at once; each replaces the file as a whole.
    let draft = target_dir.join(format!("link-{}.tmp", std::process::id()));
    fs::write(&draft, LINK_SCRIPT).map_err(|e| file("write", &draft, e))?;
    fs::rename(&draft, &path).map_err(|e| file("write", &path, e))?;
    Ok(path)
}

/// The files named in cargo's dep-info, the manifests beside them and the lock file.
fn sources(
    elf: &Path,
    workspace: &Path,
    package: &GuestPackage,
) -> Result<Vec<PathBuf>, BuildError> {
    let path = elf.with_extension("d");
    let text = fs::read_to_string(&path).map_err(|source| file("read", &path, source))?;
    let mut sources: BTreeSet<PathBuf> = dep_info(&text).collect();
    let manifests: BTreeSet<PathBuf> = sources
        .iter()
        .filter_map(|source| {
            let folders = source.ancestors().skip(1);
            folders
                .map(|dir| dir.join("Cargo.toml"))
                .find(|toml| toml.is_file())
        })
        .collect();
    sources.extend(manifests);
    sources.insert(package.manifest.clone());
    sources.insert(workspace.join("Cargo.toml"));
    sources.insert(workspace.join("Cargo.lock"));
    Ok(sources.into_iter().collect())
}

/// The dependencies in a file of make's form, where a space in a name is `\ `.
fn dep_info(text: &str) -> impl Iterator<Item = PathBuf> + '_ {
    let rules = text.lines().filter_map(|line| line.split_once(": "));
    rules.flat_map(|(_, dependencies)| {
        let escaped = dependencies.replace("\\ ", "\0");
        let names: Vec<PathBuf> = escaped
            .split_ascii_whitespace()
            .map(|name| PathBuf::from(name.replace('\0', " ")))
            .collect();
        names
    })
}

fn file(action: &'static str, path: &Path, source: io::Error) -> BuildError {
    BuildError::File {
        action,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dep_info_keeps_spaces_in_names() {
        let text = "/t/hello: /a\\ b/main.rs /c/lib.rs\n\n/a b/main.rs:\n";
        let found: Vec<PathBuf> = dep_info(text).collect();
        assert_eq!(found, [Path::new("/a b/main.rs"), Path::new("/c/lib.rs")]);
    }

    #[test]
    fn link_script_agrees_with_the_abi() {
        let base = format!(". = {:#x};", pv_abi::layout::RAM_BASE);
        assert!(LINK_SCRIPT.contains(&base), "{base}");
    }

    #[test]
    fn link_script_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = write_link_script(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), LINK_SCRIPT);
        assert_eq!(write_link_script(dir.path()).unwrap(), path);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_workspace_is_one_sentence() {
        let error = GuestBuild::new("/nonexistent")
            .package("x")
            .build()
            .unwrap_err();
        assert!(matches!(error, BuildError::NoWorkspace { .. }));
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
