//! Landlock: which paths, ports and peers can be named. None.

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::path::Path;

/// The newest rules that are asked for; an older kernel enforces what it knows of them.
const NEWEST: ABI = ABI::V6;

/// Takes every path, TCP port, abstract socket and foreign process away.
pub(super) fn deny_all() -> Result<String, String> {
    let status = (|| {
        Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .restrict_self()
    })()
    .map_err(|error: landlock::RulesetError| error.to_string())?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => format!("{effective_abi:?}"),
        LandlockStatus::NotEnabled => return Err("not enabled in this kernel".into()),
        LandlockStatus::NotImplemented => return Err("not in this kernel".into()),
    };
    match status.ruleset {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => {
            Ok(format!("no paths, ABI {abi}"))
        }
        RulesetStatus::NotEnforced => Err("not enforced".into()),
    }
}

/// Leaves one right: to remove files directly or deeper in these folders. Best effort.
pub(crate) fn allow_removal(folders: &[&Path]) -> Result<(), landlock::RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .create()?;
    for folder in folders {
        if let Ok(fd) = PathFd::new(folder) {
            ruleset = ruleset.add_rule(PathBeneath::new(fd, AccessFs::RemoveFile))?;
        }
    }
    ruleset.restrict_self()?;
    Ok(())
}
