//! What is to run the guest: as the command line says, or `PV_ACCEL`, or whatever works here.

use anyhow::{Result, bail};
use clap::ValueEnum;
use std::env::{self, VarError};
use vmm_core::VmBuilder;

/// The variable that chooses where the command line does not, as in the tests.
pub const VARIABLE: &str = "PV_ACCEL";

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// /dev/kvm where it works, a process otherwise
    Auto,
    /// /dev/kvm
    Kvm,
    /// A confined Linux process
    Process,
}

/// What is wanted, and who said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    accel: Accel,
    why: &'static str,
}

impl Wanted {
    /// The option if it was given, else the variable if it says something, else [`Accel::Auto`].
    ///
    /// # Errors
    ///
    /// When the variable names no accel.
    pub fn new(option: Option<Accel>) -> Result<Wanted> {
        let value = match env::var(VARIABLE) {
            Err(VarError::NotUnicode(value)) => value.to_string_lossy().into_owned(),
            value => value.unwrap_or_default(),
        };
        Wanted::parse(option, &value)
    }

    fn parse(option: Option<Accel>, variable: &str) -> Result<Wanted> {
        let (accel, why) = match (option, variable) {
            (Some(accel), _) => (accel, ""),
            (None, "") => (Accel::Auto, ""),
            (None, value) => match Accel::from_str(value, false) {
                Ok(accel) => (accel, " (as PV_ACCEL says)"),
                Err(_) => bail!(
                    "{VARIABLE} is {value:?}: it is kvm, process or auto, and --accel goes before it"
                ),
            },
        };
        Ok(match accel {
            Accel::Auto => Wanted {
                accel,
                why: " (picked by itself)",
            },
            accel => Wanted { accel, why },
        })
    }

    /// Whether the one that was named can be used here.
    ///
    /// # Errors
    ///
    /// Why not, and what to do about it.
    pub fn check(self) -> Result<()> {
        match self.accel {
            Accel::Auto => Ok(()),
            Accel::Kvm => Ok(vmm_core::Accel::Kvm.check()?),
            Accel::Process => Ok(vmm_core::Accel::Process.check()?),
        }
    }

    /// Tells the builder.
    pub fn set(self, builder: VmBuilder) -> VmBuilder {
        match self.accel {
            Accel::Auto => builder,
            Accel::Kvm => builder.accel(vmm_core::Accel::Kvm),
            Accel::Process => builder.accel(vmm_core::Accel::Process),
        }
    }

    /// The accel that a VM came to run on, and why on that one.
    pub fn describe(self, accel: vmm_core::Accel) -> String {
        format!("{accel}{}", self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_goes_first() {
        let wanted = |option, variable| {
            let wanted = Wanted::parse(option, variable).unwrap();
            (wanted.accel, wanted.describe(vmm_core::Accel::Process))
        };
        let (process, picked) = (
            "process".to_owned(),
            "process (picked by itself)".to_owned(),
        );
        assert_eq!(wanted(None, ""), (Accel::Auto, picked.clone()));
        assert_eq!(wanted(None, "auto"), (Accel::Auto, picked.clone()));
        let by_variable = "process (as PV_ACCEL says)".to_owned();
        assert_eq!(wanted(None, "process"), (Accel::Process, by_variable));
        for variable in ["", "kvm", "all", "nonsense"] {
            let said = wanted(Some(Accel::Process), variable);
            assert_eq!(said, (Accel::Process, process.clone()));
            let said = wanted(Some(Accel::Auto), variable);
            assert_eq!(said, (Accel::Auto, picked.clone()));
        }
        for variable in ["all", "KVM", "xen", " kvm"] {
            let said = Wanted::parse(None, variable).unwrap_err().to_string();
            assert!(said.contains("it is kvm, process or auto"), "{said}");
        }
    }
}
