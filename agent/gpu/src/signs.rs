//! Signs of illness that a look at a GPU finds though it answers: errors of its memory, links that are down, heat. Pure: what
//! counts as a sign, and what is done about it, is said by [`Rules`].

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::Rows;

/// NVLinks' counters: replays, recoveries, checksums of flits, of data. None: it is not counted, or was not told this time.
pub type LinkErrors = [Option<u64>; 4];

/// What a look reads of a GPU's state. None: the card, or its driver, does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reading {
    /// Memory errors that could not be corrected, since the driver was loaded.
    pub ecc_volatile: Option<u64>,
    /// The same, in the card's life.
    pub ecc_aggregate: Option<u64>,
    /// Rows remapped (cards since Ampere).
    pub rows: Option<Rows>,
    /// Whether pages wait to be retired (cards before Ampere).
    pub retirement_pending: Option<bool>,
    /// Pages retired.
    pub retired_pages: Option<u32>,
    /// NVLinks that are up; none also where MIG is on, which has none.
    pub links: Option<u32>,
    /// Errors of all NVLinks since the driver was loaded.
    pub link_errors: LinkErrors,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// From how many on the card slows itself down.
    pub slowdown_at: Option<u32>,
    /// From how many on it shuts itself down.
    pub shutdown_at: Option<u32>,
}

/// A sign of illness, by the name that it has in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// Memory errors that could not be corrected, since the driver was loaded, of a card that does not contain them.
    EccVolatile,
    /// The same, of a card that contains them, and remaps the row (since Ampere): whoever had the memory is gone.
    EccContained,
    /// The same of either, in the card's life.
    EccAggregate,
    /// A row of memory is to be remapped at the next reset.
    RemapPending,
    /// A row of memory could not be remapped.
    RemapFailed,
    /// Pages of memory are to be retired when the driver is loaded next.
    RetirementPending,
    /// Too many pages of memory are retired.
    RetiredPages,
    /// NVLinks that were up in this boot are down.
    LinksDown,
    /// Many errors of NVLinks between two looks.
    LinkErrors,
    /// The card is so hot that it slows itself down.
    Slowdown,
    /// It is so hot that it shuts itself down.
    Shutdown,
}

impl Sign {
    /// All of them.
    pub const ALL: [Sign; 11] = [
        Sign::EccVolatile,
        Sign::EccContained,
        Sign::EccAggregate,
        Sign::RemapPending,
        Sign::RemapFailed,
        Sign::RetirementPending,
        Sign::RetiredPages,
        Sign::LinksDown,
        Sign::LinkErrors,
        Sign::Slowdown,
        Sign::Shutdown,
    ];

    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Sign::EccVolatile => "ecc_volatile",
            Sign::EccContained => "ecc_contained",
            Sign::EccAggregate => "ecc_aggregate",
            Sign::RemapPending => "remap_pending",
            Sign::RemapFailed => "remap_failed",
            Sign::RetirementPending => "retirement_pending",
            Sign::RetiredPages => "retired_pages",
            Sign::LinksDown => "links_down",
            Sign::LinkErrors => "link_errors",
            Sign::Slowdown => "slowdown",
            Sign::Shutdown => "shutdown",
        }
    }

    /// What is done about it unless the configuration says otherwise: what the XID of the same thing does. Links warn, since
    /// a GPU that is gone takes its neighbours' with it.
    pub fn usual(self) -> Action {
        match self {
            Sign::EccAggregate => Action::Ignore,
            Sign::EccContained | Sign::RemapPending | Sign::RetirementPending => Action::Warn,
            Sign::LinksDown | Sign::LinkErrors | Sign::Slowdown => Action::Warn,
            Sign::EccVolatile | Sign::RemapFailed | Sign::RetiredPages | Sign::Shutdown => Action::Condemn,
        }
    }

    /// Whether a driver that says what is to be done about a GPU has thought of this too: what it says goes first then.
    fn drivers_own(self) -> bool {
        matches!(
            self,
            Sign::EccVolatile | Sign::EccContained | Sign::RemapPending | Sign::RetirementPending
        )
    }
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is done about a sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The GPU is not handed out until it is gone.
    Condemn,
    /// It is told, and changes nothing.
    Warn,
    /// Nothing.
    Ignore,
}

/// How much of something is a sign: more than this.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Errors since the driver was loaded.
    pub ecc_volatile: u64,
    /// Errors in the card's life.
    pub ecc_aggregate: u64,
    /// Pages.
    pub retired_pages: u32,
    /// Errors between two looks.
    pub link_errors: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            ecc_volatile: 0,
            ecc_aggregate: 0,
            retired_pages: 60,
            link_errors: 100,
        }
    }
}

/// What counts as a sign, and what is done about each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Where it is not the usual.
    pub actions: BTreeMap<Sign, Action>,
    /// How much is too much.
    pub limits: Limits,
    /// How many looks in a row have to find a sign gone before its GPU is well.
    pub well_after: u32,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            actions: BTreeMap::new(),
            limits: Limits::default(),
            well_after: 3,
        }
    }
}

/// A sign that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub sign: Sign,
    /// What is to be done about it; never nothing.
    pub action: Action,
    /// For people.
    pub text: String,
}

/// What earlier looks have read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Before {
    /// Most links that were up in this boot.
    pub links: u32,
    /// Errors of links at the last look.
    pub link_errors: LinkErrors,
}

impl Rules {
    fn action(&self, sign: Sign) -> Action {
        self.actions.get(&sign).copied().unwrap_or_else(|| sign.usual())
    }

    /// The signs of a reading. `told`: the driver says what is to be done about this GPU, and so does it about some of them.
    pub fn found(&self, r: &Reading, before: Before, told: bool) -> Vec<Found> {
        Sign::ALL
            .into_iter()
            .filter(|sign| !(told && sign.drivers_own()))
            .filter_map(|sign| {
                let action = self.action(sign);
                let text = (action != Action::Ignore).then(|| self.text(sign, r, before))??;
                Some(Found { sign, action, text })
            })
            .collect()
    }

    /// Why the sign is there; none: it is not.
    fn text(&self, sign: Sign, r: &Reading, before: Before) -> Option<String> {
        let Limits {
            ecc_volatile,
            ecc_aggregate,
            retired_pages,
            link_errors,
        } = self.limits;
        match sign {
            Sign::EccVolatile | Sign::EccContained => r
                .ecc_volatile
                .filter(|n| *n > ecc_volatile && r.rows.is_some() == (sign == Sign::EccContained))
                .map(|n| format!("{n} memory errors could not be corrected since the driver was loaded")),
            Sign::EccAggregate => r
                .ecc_aggregate
                .filter(|n| *n > ecc_aggregate)
                .map(|n| format!("{n} memory errors could not be corrected in the card's life")),
            Sign::RemapPending => {
                let pending = r.rows.is_some_and(|rows| rows.pending);
                pending.then(|| "a row of its memory is to be remapped: it needs a reset".to_owned())
            }
            Sign::RemapFailed => {
                let failed = r.rows.is_some_and(|rows| rows.failed);
                failed.then(|| "a row of its memory could not be remapped".to_owned())
            }
            Sign::RetirementPending => (r.retirement_pending == Some(true)).then(|| {
                "pages of its memory are to be retired: the driver has to be loaded anew".to_owned()
            }),
            Sign::RetiredPages => r
                .retired_pages
                .filter(|n| *n > retired_pages)
                .map(|n| format!("{n} pages of its memory are retired")),
            Sign::LinksDown => r
                .links
                .filter(|n| *n < before.links)
                .map(|n| format!("{} of its {} NVLinks are down", before.links - n, before.links)),
            Sign::LinkErrors => {
                // What was not told before may be of any age. Fewer than before: the driver was loaded anew.
                let both = r.link_errors.into_iter().zip(before.link_errors);
                let more = both.filter_map(|(now, then)| now?.checked_sub(then?));
                let more = more.fold(0, u64::saturating_add);
                (more > link_errors).then(|| format!("{more} errors of its NVLinks since the last look"))
            }
            Sign::Slowdown => {
                hot(r.temperature?, r.slowdown_at?).map(|said| format!("{said} slows itself down"))
            }
            Sign::Shutdown => {
                hot(r.temperature?, r.shutdown_at?).map(|said| format!("{said} shuts itself down"))
            }
        }
    }
}

fn hot(is: u32, limit: u32) -> Option<String> {
    (limit > 0 && is >= limit).then(|| format!("it is {is} °C hot: from {limit} on it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(rules: &Rules, r: &Reading, before: Before, told: bool) -> Vec<Sign> {
        rules.found(r, before, told).into_iter().map(|f| f.sign).collect()
    }

    #[test]
    fn a_card_that_is_well_or_tells_nothing_has_no_signs() {
        let rules = Rules::default();
        assert!(signs(&rules, &Reading::default(), Before::default(), false).is_empty());
        let well = Reading {
            ecc_volatile: Some(0),
            ecc_aggregate: Some(7),
            rows: Some(Rows::default()),
            retirement_pending: Some(false),
            retired_pages: Some(60),
            links: Some(18),
            link_errors: [Some(1000), None, Some(100), None],
            temperature: Some(86),
            slowdown_at: Some(87),
            shutdown_at: Some(92),
        };
        let before = Before {
            links: 18,
            link_errors: [Some(950), None, Some(50), None],
        };
        assert!(signs(&rules, &well, before, false).is_empty());
    }

    #[test]
    fn each_sign_is_found_and_the_drivers_word_outweighs_what_it_knows_of() {
        let rules = Rules {
            actions: [(Sign::EccAggregate, Action::Warn)].into(),
            ..Rules::default()
        };
        let sick = Reading {
            ecc_volatile: Some(1),
            ecc_aggregate: Some(1),
            rows: Some(Rows {
                pending: true,
                failed: true,
                ..Rows::default()
            }),
            retirement_pending: Some(true),
            retired_pages: Some(61),
            links: Some(17),
            link_errors: [Some(51), Some(51), None, None],
            temperature: Some(95),
            slowdown_at: Some(87),
            shutdown_at: Some(92),
        };
        let before = Before {
            links: 18,
            link_errors: [Some(1), Some(0), None, None],
        };
        // Of a card that contains errors, and of one that does not and has no rows either.
        let contains: Vec<Sign> = Sign::ALL
            .into_iter()
            .filter(|s| *s != Sign::EccVolatile)
            .collect();
        assert_eq!(signs(&rules, &sick, before, false), contains);
        let other = Reading {
            rows: None,
            ..sick.clone()
        };
        let found = signs(&rules, &other, before, false);
        assert!(found.contains(&Sign::EccVolatile) && !found.contains(&Sign::EccContained));
        let told: Vec<Sign> = Sign::ALL.into_iter().filter(|s| !s.drivers_own()).collect();
        assert_eq!(signs(&rules, &sick, before, true), told);
        // Each is named as in the configuration, and says what is wrong.
        for f in rules.found(&sick, before, false) {
            let name = serde_json::to_string(&f.sign).expect("JSON");
            assert_eq!(name, format!("\"{}\"", f.sign));
            assert!(f.text.len() > 20, "{f:?}");
        }
    }

    #[test]
    fn counters_that_began_anew_and_links_that_were_never_up_are_no_signs() {
        let rules = Rules::default();
        let anew = Reading {
            link_errors: [Some(500), Some(7), None, None],
            links: Some(2),
            ..Reading::default()
        };
        // One that was not told at the last look, or never.
        for link_errors in [
            LinkErrors::default(),
            [Some(1_000_000), Some(7), None, None],
            [None, Some(7), Some(3), None],
        ] {
            let before = Before {
                links: 2,
                link_errors,
            };
            assert!(signs(&rules, &anew, before, false).is_empty(), "{before:?}");
        }
    }
}
