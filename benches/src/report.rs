//! Figures, their bars, the table and the JSON.

use crate::sample::Summary;
use serde::Serialize;
use std::fmt::Write;

/// What a figure is to reach.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    /// Median minus the floor's median.
    DifferenceAtMost(f64),
    /// Median over the floor's median.
    RatioAtMost(f64),
    /// Median over the floor's median.
    RatioAtLeast(f64),
    /// The median itself.
    AtMost(f64),
    /// The median, or so many times the floor's median where that is higher.
    AtMostOrRatio(f64, f64),
}

/// A figure against its bar.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Verdict {
    pub(crate) value: f64,
    pub(crate) limit: f64,
    pub(crate) met: bool,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    pub(crate) accel: String,
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) measured: Summary,
    pub(crate) floor_is: String,
    pub(crate) floor: Option<Summary>,
    pub(crate) bar: Option<Bar>,
    pub(crate) verdict: Option<Verdict>,
}

impl Row {
    pub(crate) fn new(
        bench: &'static str,
        accel: impl ToString,
        what: impl Into<String>,
        unit: &'static str,
        measured: Summary,
    ) -> Row {
        Row {
            bench,
            accel: accel.to_string(),
            what: what.into(),
            unit,
            measured,
            floor_is: String::new(),
            floor: None,
            bar: None,
            verdict: None,
        }
    }

    pub(crate) fn floor(mut self, is: impl Into<String>, floor: Summary) -> Row {
        self.floor_is = is.into();
        self.floor = Some(floor);
        self.judge()
    }

    pub(crate) fn bar(mut self, bar: Bar) -> Row {
        self.bar = Some(bar);
        self.judge()
    }

    fn judge(mut self) -> Row {
        let floor = self.floor.map(|f| f.median);
        self.verdict = self
            .bar
            .and_then(|bar| judge(bar, self.measured.median, floor));
        self
    }
}

fn judge(bar: Bar, measured: f64, floor: Option<f64>) -> Option<Verdict> {
    let at_most = |value, limit| Verdict {
        value,
        limit,
        met: value <= limit,
    };
    Some(match bar {
        Bar::DifferenceAtMost(limit) => at_most(measured - floor?, limit),
        Bar::RatioAtMost(limit) => at_most(measured / floor?, limit),
        Bar::RatioAtLeast(limit) => {
            let value = measured / floor?;
            Verdict {
                value,
                limit,
                met: value >= limit,
            }
        }
        Bar::AtMost(limit) => at_most(measured, limit),
        Bar::AtMostOrRatio(limit, ratio) => {
            at_most(measured, limit.max(floor.map_or(limit, |f| f * ratio)))
        }
    })
}

/// Something that was not measured, and why.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Skip {
    pub(crate) bench: String,
    pub(crate) why: String,
}

/// Everything that a run has to say.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) host: String,
    pub(crate) quick: bool,
    pub(crate) rows: Vec<Row>,
    pub(crate) skipped: Vec<Skip>,
    pub(crate) failed: Vec<Skip>,
}

impl Report {
    pub(crate) fn skip(&mut self, bench: impl Into<String>, why: impl Into<String>) {
        self.skipped.push(Skip {
            bench: bench.into(),
            why: why.into(),
        });
    }

    /// The readable form.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}", self.host);
        let mut bench = "";
        for row in &self.rows {
            if row.bench != bench {
                bench = row.bench;
                let _ = writeln!(
                    out,
                    "\n{bench}\n  {:<8} {:<52} {:>30}  {:>30}  bar",
                    "accel", "figure", "median [p10 .. p90]", "floor"
                );
            }
            let measured = format!("{} {}", spread(&row.measured), row.unit);
            let floor = row.floor.as_ref().map_or(String::new(), |floor| {
                format!("{} {}", spread(floor), row.unit)
            });
            let _ = writeln!(
                out,
                "  {:<8} {:<52} {measured:>30}  {floor:>30}  {}",
                row.accel,
                row.what,
                bar_text(row)
            );
            if !row.floor_is.is_empty() {
                let _ = writeln!(out, "  {:<8}   floor: {}", "", row.floor_is);
            }
        }
        for skip in &self.skipped {
            let _ = writeln!(out, "\nskipped: {}: {}", skip.bench, skip.why);
        }
        for failure in &self.failed {
            let _ = writeln!(out, "\nFAILED: {}: {}", failure.bench, failure.why);
        }
        let (met, judged) = self
            .rows
            .iter()
            .filter_map(|row| row.verdict)
            .fold((0, 0), |(met, all), v| (met + i32::from(v.met), all + 1));
        let _ = writeln!(out, "\n{met} of {judged} bars met");
        out
    }
}

fn bar_text(row: &Row) -> String {
    let (Some(bar), Some(verdict)) = (row.bar, row.verdict) else {
        let ratio = row.floor.map(|floor| row.measured.median / floor.median);
        return ratio.map_or(String::new(), |ratio| format!("ratio: {}", number(ratio)));
    };
    let met = if verdict.met { "met" } else { "NOT met" };
    let (value, limit) = (number(verdict.value), number(verdict.limit));
    let unit = row.unit;
    match bar {
        Bar::DifferenceAtMost(_) => {
            format!("difference <= {limit} {unit}: {value} {unit}, {met}")
        }
        Bar::RatioAtMost(_) => format!("ratio <= {limit}: {value}, {met}"),
        Bar::RatioAtLeast(_) => format!("ratio >= {limit}: {value}, {met}"),
        Bar::AtMost(_) | Bar::AtMostOrRatio(..) => {
            format!("<= {limit} {unit}: {value} {unit}, {met}")
        }
    }
}

fn spread(summary: &Summary) -> String {
    format!(
        "{} [{} .. {}]",
        number(summary.median),
        number(summary.p10),
        number(summary.p90)
    )
}

/// Three or so digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_judged_at_and_past_their_limit() {
        let met = |bar, measured, floor| judge(bar, measured, floor).unwrap().met;
        assert!(met(Bar::DifferenceAtMost(0.5), 2.5, Some(2.0)));
        assert!(!met(Bar::DifferenceAtMost(0.5), 2.6, Some(2.0)));
        assert!(met(Bar::RatioAtMost(1.25), 5.0, Some(4.0)));
        assert!(!met(Bar::RatioAtMost(1.25), 5.1, Some(4.0)));
        assert!(met(Bar::RatioAtLeast(0.5), 2.0, Some(4.0)));
        assert!(!met(Bar::RatioAtLeast(0.5), 1.9, Some(4.0)));
        assert!(met(Bar::AtMost(0.1), 0.1, None) && !met(Bar::AtMost(0.1), 0.2, None));
        assert!(met(Bar::AtMostOrRatio(2.0, 1.2), 2.3, Some(2.0)));
        assert!(!met(Bar::AtMostOrRatio(2.0, 1.2), 2.3, Some(1.0)));
        assert!(judge(Bar::RatioAtMost(1.0), 1.0, None).is_none());
    }
}
