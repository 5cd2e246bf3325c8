//! Landlock: a second wall round the file system, which stands even where the first has a hole.
//!
//! What the running kernel does not know of is left out (a kernel before 6.12 keeps nobody from
//! signals, one before 6.7 from TCP); one without Landlock is an error unless it is accepted.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{JailError, Landlock};

/// The newest that is asked for.
const NEWEST: ABI = ABI::V6;

/// The oldest that lets files be moved between folders, which the file server does for the guest.
const OLDEST_WITH_MOVES: ABI = ABI::V2;

/// Opens nothing, connects to nothing, signals nobody outside. From now on, for ever.
pub(super) fn allow_nothing(accept_missing: bool) -> Result<Landlock, JailError> {
    let ruleset = rules().and_then(|rules| {
        rules.handle_access(AccessNet::from_all(NEWEST))?.scope(Scope::from_all(NEWEST))?.create()
    });
    restrict(ruleset, accept_missing)
}

/// Everything beneath `folder`, mounts on it included, and nothing else.
pub(super) fn allow_beneath(
    folder: BorrowedFd<'_>,
    accept_missing: bool,
) -> Result<Landlock, JailError> {
    if !moves_are_possible() {
        return if accept_missing { Ok(Landlock::Missing) } else { Err(JailError::NoLandlock) };
    }
    let ruleset = rules().and_then(|rules| {
        let rules = rules.handle_access(AccessNet::from_all(NEWEST))?;
        let created = rules.scope(Scope::from_all(NEWEST))?.create()?;
        created.add_rule(PathBeneath::new(folder, AccessFs::from_all(NEWEST)))
    });
    restrict(ruleset, accept_missing)
}

fn rules() -> Result<Ruleset, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
}

/// Linux 5.13 to 5.18 has a Landlock that refuses all moves between folders.
fn moves_are_possible() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(OLDEST_WITH_MOVES))
        .is_ok()
}

fn restrict(
    ruleset: Result<RulesetCreated, RulesetError>,
    accept_missing: bool,
) -> Result<Landlock, JailError> {
    match ruleset.and_then(RulesetCreated::restrict_self)?.ruleset {
        RulesetStatus::FullyEnforced => Ok(Landlock::Whole),
        RulesetStatus::PartiallyEnforced => Ok(Landlock::Partly),
        RulesetStatus::NotEnforced if accept_missing => Ok(Landlock::Missing),
        RulesetStatus::NotEnforced => Err(JailError::NoLandlock),
    }
}
