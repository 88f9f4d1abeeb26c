//! The guest workspace: which packages there are and what their manifests say.
//!
//! A package becomes a guest by having a binary target. Its manifest may say more:
//!
//! ```toml
//! [package.metadata.paravane]
//! image = false                 # not among the images that are built by default
//! allow-banned = ["hostile_"]   # test guests only: functions that may contain anything
//! ```

use crate::BuildError;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A workspace of guests.
#[derive(Clone, Debug)]
pub struct GuestWorkspace {
    dir: PathBuf,
    packages: Vec<GuestPackage>,
}

/// A package that builds a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestPackage {
    /// Package name, which is also the name of its executable.
    pub name: String,
    /// Its manifest.
    pub manifest: PathBuf,
    /// The source file of its executable.
    pub source_file: PathBuf,
    /// Whether it is among the images that are built by default.
    pub image: bool,
    /// Prefixes of functions that may contain banned instructions.
    pub allow_banned: Vec<String>,
}

impl GuestWorkspace {
    /// Reads the workspace whose `Cargo.toml` lies in `dir`.
    ///
    /// # Errors
    ///
    /// When there is none, or cargo cannot read it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, BuildError> {
        let dir = dir.as_ref();
        let no_workspace = || BuildError::NoWorkspace { dir: dir.into() };
        let dir = dir.canonicalize().map_err(|_| no_workspace())?;
        if !dir.join("Cargo.toml").is_file() {
            return Err(no_workspace());
        }
        let mut command = crate::cargo::command(&dir);
        command.args(["metadata", "--no-deps", "--format-version", "1"]);
        let metadata: Metadata = serde_json::from_slice(&run(&mut command, "the workspace")?)?;
        let mut packages: Vec<GuestPackage> = metadata
            .packages
            .into_iter()
            .filter_map(Package::into_guest)
            .collect();
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(GuestWorkspace { dir, packages })
    }

    /// Its folder, absolute.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every package that builds a guest, by name.
    pub fn packages(&self) -> &[GuestPackage] {
        &self.packages
    }

    /// The package with this name.
    ///
    /// # Errors
    ///
    /// When there is none, or its source file does not exist.
    pub fn package(&self, name: &str) -> Result<&GuestPackage, BuildError> {
        let found = self.packages.iter().find(|package| package.name == name);
        let package = found.ok_or_else(|| BuildError::NoPackage {
            dir: self.dir.clone(),
            package: name.to_owned(),
            have: self.packages.iter().map(|p| p.name.clone()).collect(),
        })?;
        if !package.source_file.is_file() {
            return Err(BuildError::NoSource {
                package: package.name.clone(),
                source_file: package.source_file.clone(),
            });
        }
        Ok(package)
    }
}

/// Runs cargo; its standard output, or the end of what it complained of.
pub(crate) fn run(command: &mut Command, package: &str) -> Result<Vec<u8>, BuildError> {
    let output = command.output().map_err(|source| BuildError::Spawn {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let tail = lines.len().saturating_sub(CARGO_LINES);
    Err(BuildError::Cargo {
        package: package.to_owned(),
        status: output.status,
        output: lines[tail..].join("\n"),
    })
}

/// Lines of cargo's complaint that an error carries: a few compiler errors with their notes.
const CARGO_LINES: usize = 120;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
    metadata: Option<Tables>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
    src_path: PathBuf,
}

#[derive(Default, Deserialize)]
struct Tables {
    #[serde(default)]
    paravane: Paravane,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Paravane {
    image: bool,
    allow_banned: Vec<String>,
}

impl Default for Paravane {
    fn default() -> Self {
        Paravane {
            image: true,
            allow_banned: Vec::new(),
        }
    }
}

impl Package {
    fn into_guest(self) -> Option<GuestPackage> {
        let target = self
            .targets
            .into_iter()
            .find(|t| t.name == self.name && t.kind.iter().any(|kind| kind == "bin"))?;
        let Paravane {
            image,
            allow_banned,
        } = self.metadata.unwrap_or_default().paravane;
        Some(GuestPackage {
            name: self.name,
            manifest: self.manifest_path,
            source_file: target.src_path,
            image,
            allow_banned,
        })
    }
}
