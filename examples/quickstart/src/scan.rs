//! What there is to pack: the folder is read once, and everything in it is either planned or
//! named as a problem. Nothing is left out in silence.

use crate::image::entries_of;
use crate::limits::{
    MAX_ENTRIES, MAX_FILE, MAX_FOLDER_ENTRIES, MAX_NAME, MAX_NAME_BYTES, PROBLEMS_SHOWN,
};
use anyhow::{Context, Result, bail};
use quickstart_fs::limits::MAX_DEPTH;
use quickstart_fs::manifest;
use std::collections::HashSet;
use std::fmt;
use std::fs::{self, DirEntry, File};
use std::path::{Path, PathBuf};

/// What will be packed, in an order that does not depend on the file system.
#[derive(Debug, Default)]
pub struct Plan {
    /// Folders, parents first, as paths from the root with `/` between the names.
    pub folders: Vec<String>,
    /// Files.
    pub files: Vec<PlannedFile>,
    /// Entries that cannot be packed.
    pub problems: Vec<Problem>,
}

/// A file to be packed.
#[derive(Debug)]
pub struct PlannedFile {
    /// Where it is.
    pub source: PathBuf,
    /// Its path from the root of the volume, with `/` between the names.
    pub path: String,
    /// Its length when it was looked at.
    pub length: u64,
}

/// An entry that cannot be packed, and why.
#[derive(Debug)]
pub struct Problem {
    /// Where it is.
    pub path: PathBuf,
    /// Why it cannot be packed.
    pub why: Why,
}

/// Why an entry cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    /// FAT has none.
    #[error("is a symbolic link, which FAT does not have")]
    SymbolicLink,
    /// A socket, a pipe, a device.
    #[error("is neither a file nor a folder")]
    Special,
    /// The name is not UTF-8.
    #[error("has a name that is not UTF-8")]
    NotUtf8,
    /// The name has a character that FAT, or the FAT crate, does not take.
    #[error("has {0:?} in its name, which FAT cannot hold")]
    Character(char),
    /// Windows, and so FAT, ignores them.
    #[error("has a name that ends in a dot or begins or ends in a space, which FAT cannot hold")]
    Trailing,
    /// The name is too long.
    #[error("has a name of more than {MAX_NAME} characters or {MAX_NAME_BYTES} bytes")]
    LongName,
    /// FAT does not tell upper from lower case.
    #[error("has the name of another entry there, but for upper and lower case")]
    Case,
    /// The guest writes the manifest under this name.
    #[error("has the name of the manifest that the guest writes")]
    IsManifest,
    /// FAT lengths have 32 bits.
    #[error("is larger than 4 GiB - 1, FAT's largest file")]
    LargeFile,
    /// Nested too deep.
    #[error("is nested deeper than {MAX_DEPTH} folders")]
    Deep,
    /// Its folder is full.
    #[error("is one too many: FAT's folders have {MAX_FOLDER_ENTRIES} entries, several per name")]
    Crowded,
    /// It cannot be read.
    #[error("cannot be read ({0})")]
    Unreadable(std::io::Error),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path.display(), self.why)
    }
}

impl Plan {
    /// Reads `folder`.
    ///
    /// # Errors
    ///
    /// When the folder itself is missing or cannot be read, and when it holds too much.
    pub fn scan(folder: &Path) -> Result<Plan> {
        let metadata = fs::metadata(folder)
            .with_context(|| format!("cannot find the folder {}", folder.display()))?;
        if !metadata.is_dir() {
            bail!("{} is not a folder: give a folder", folder.display());
        }
        let mut plan = Plan::default();
        // A list of work instead of recursion: the depth is the user's.
        let mut open = vec![(folder.to_path_buf(), String::new(), 0)];
        while let Some((place, path, depth)) = open.pop() {
            let entries = match list(&place) {
                Ok(entries) => entries,
                Err(error) if path.is_empty() => {
                    return Err(error).with_context(|| format!("cannot read {}", place.display()));
                }
                Err(error) => {
                    plan.problem(place, Why::Unreadable(error));
                    continue;
                }
            };
            if !path.is_empty() {
                plan.folders.push(path.trim_end_matches('/').to_owned());
            }
            let mut below = Vec::new();
            let mut taken = HashSet::new();
            let mut room = MAX_FOLDER_ENTRIES - OWN_ENTRIES;
            for entry in entries {
                let found = look_at(&entry, &path, &mut taken).and_then(|found| {
                    let needed = entries_of(found.name());
                    room = room.checked_sub(needed).ok_or(Why::Crowded)?;
                    Ok(found)
                });
                match found {
                    Ok(Found::Folder(_)) if depth + 1 > MAX_DEPTH => {
                        plan.problem(entry.path(), Why::Deep);
                    }
                    Ok(Found::Folder(name)) => {
                        below.push((entry.path(), format!("{path}{name}/"), depth + 1));
                    }
                    Ok(Found::File(name, length)) => plan.files.push(PlannedFile {
                        source: entry.path(),
                        path: format!("{path}{name}"),
                        length,
                    }),
                    Err(why) => plan.problem(entry.path(), why),
                }
                let count = plan.files.len() + plan.folders.len() + plan.problems.len();
                if count > MAX_ENTRIES {
                    bail!(
                        "{} holds more than {MAX_ENTRIES} files and folders: give a smaller one",
                        folder.display()
                    );
                }
            }
            below.reverse();
            open.append(&mut below);
        }
        Ok(plan)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.length).sum()
    }

    /// The problems in one sentence, the first few named.
    pub fn problem_summary(&self) -> String {
        let shown: Vec<String> = self
            .problems
            .iter()
            .take(PROBLEMS_SHOWN)
            .map(ToString::to_string)
            .collect();
        let more = self.problems.len().saturating_sub(PROBLEMS_SHOWN);
        let mut text = shown.join("; ");
        if more > 0 {
            text.push_str(&format!("; and {more} more"));
        }
        text
    }

    fn problem(&mut self, path: PathBuf, why: Why) {
        self.problems.push(Problem { path, why });
    }
}

enum Found {
    Folder(String),
    File(String, u64),
}

impl Found {
    fn name(&self) -> &str {
        match self {
            Found::Folder(name) | Found::File(name, _) => name,
        }
    }
}

/// Entries of a folder that are not for what is in it: `.`, `..`, the volume's label in the root,
/// the manifest there, and the end.
const OWN_ENTRIES: usize = 5;

fn list(folder: &Path) -> std::io::Result<Vec<DirEntry>> {
    let mut entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

fn look_at(entry: &DirEntry, path: &str, taken: &mut HashSet<String>) -> Result<Found, Why> {
    // Of the entry itself: a link is not followed.
    let metadata = entry.metadata().map_err(Why::Unreadable)?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        return Err(Why::SymbolicLink);
    }
    if !kind.is_file() && !kind.is_dir() {
        return Err(Why::Special);
    }
    let name = entry.file_name().into_string().map_err(|_| Why::NotUtf8)?;
    check_name(&name)?;
    if path.is_empty() && name.eq_ignore_ascii_case(manifest::NAME) {
        return Err(Why::IsManifest);
    }
    if !taken.insert(name.to_uppercase()) {
        return Err(Why::Case);
    }
    if kind.is_dir() {
        return Ok(Found::Folder(name));
    }
    if metadata.len() > MAX_FILE {
        return Err(Why::LargeFile);
    }
    // Asked now, so that all of them can be named before anything is written.
    File::open(entry.path()).map_err(Why::Unreadable)?;
    Ok(Found::File(name, metadata.len()))
}

/// Whether FAT can hold this name, as the FAT crate understands it.
fn check_name(name: &str) -> Result<(), Why> {
    if name.encode_utf16().count() > MAX_NAME || name.len() > MAX_NAME_BYTES {
        return Err(Why::LongName);
    }
    if name.ends_with(['.', ' ']) || name.starts_with(' ') {
        return Err(Why::Trailing);
    }
    let fits = |c: char| match c {
        '\\' | '/' | ':' | '*' | '?' | '"' | '<' | '>' | '|' => false,
        ' '..='~' => true,
        // Long names are UTF-16, and the FAT crate wants one unit for each character.
        '\u{80}'..='\u{ffff}' => true,
        _ => false,
    };
    match name.chars().find(|c| !fits(*c)) {
        Some(character) => Err(Why::Character(character)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_fat_cannot_hold() {
        for name in [
            "a:b",
            "a?",
            "x\ny",
            "tab\t",
            "\u{7f}",
            "crab 🦀",
            "back\\slash",
        ] {
            assert!(
                matches!(check_name(name), Err(Why::Character(_))),
                "{name:?}"
            );
        }
        for name in ["dot.", "space ", " lead"] {
            assert!(matches!(check_name(name), Err(Why::Trailing)), "{name:?}");
        }
        assert!(matches!(check_name(&"x".repeat(248)), Err(Why::LongName)));
        for name in [
            "a",
            ".gitignore",
            "Ünïcödé.txt",
            "日本.md",
            "a b+c,d;e=[f]",
            "~$x{y}",
        ] {
            check_name(name).unwrap();
        }
        check_name(&"x".repeat(247)).unwrap();
        check_name(&"é".repeat(127)).unwrap();
        assert!(matches!(check_name(&"é".repeat(128)), Err(Why::LongName)));
    }

    #[test]
    fn everything_is_planned_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("b/c")).unwrap();
        fs::write(at("b/c/deep.txt"), "deep").unwrap();
        fs::write(at("a.txt"), "").unwrap();
        fs::write(at("A.TXT"), "x").unwrap();
        fs::write(at("sha256.txt"), "x").unwrap();
        fs::write(at("b/sha256.txt"), "x").unwrap();
        std::os::unix::fs::symlink("a.txt", at("link")).unwrap();
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let plan = Plan::scan(dir.path()).unwrap();
        let files: Vec<&str> = plan.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(files, ["A.TXT", "b/sha256.txt", "b/c/deep.txt"]);
        assert_eq!(plan.folders, ["b", "b/c"]);
        assert_eq!(plan.bytes(), 6);
        let said = plan.problem_summary();
        for part in [
            "a.txt has the name",
            "link is a symbolic",
            "socket is neither",
            "manifest",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert_eq!(plan.problems.len(), 4);
    }

    #[test]
    fn missing_folders_and_files_are_refused() {
        let error = Plan::scan(Path::new("/nonexistent")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("cannot find the folder /nonexistent")
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Plan::scan(file.path()).unwrap_err();
        assert!(error.to_string().contains("is not a folder"));
    }
}
