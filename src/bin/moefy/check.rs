//! `moefy check`

use std::sync::Arc;

use moefy::cuda::Device;
use moefy::cuda::check::{Checked, Verdict, check};
use moefy::{Error, Result};
use serde_json::json;

use crate::{Common, output};

#[derive(clap::Args)]
pub struct Check {}

impl Check {
    pub fn run(self, common: &Common) -> Result<()> {
        let device = Arc::new(Device::open(0)?);
        let mut all = Vec::new();
        check(&device, |checked| all.push(checked))?;
        let count = |verdict| all.iter().filter(|checked| checked.verdict == verdict).count();
        let [passed, failed, refused] =
            [Verdict::Passed, Verdict::Failed, Verdict::Refused].map(count);
        let name = &device.properties().name;
        if common.json {
            output::json(&json!({ "device": name, "passed": passed, "failed": failed,
                                  "refused": refused, "checks": all }));
        } else {
            output::line(&table(&all));
            output::line(&format!("{name}: {passed} passed, {failed} failed, {refused} refused"));
        }
        match failed {
            0 => Ok(()),
            _ => Err(Error::argument(
                "check",
                "errors",
                "at most the bars",
                format!("{failed} above"),
            )),
        }
    }
}

fn table(all: &[Checked]) -> String {
    let header = ["what", "shape", "type", "error", "bar", "verdict"];
    output::table(
        header,
        all.iter().map(|checked| {
            let number = |value: f64| match value {
                0.0 => "0".into(),
                value if value.is_nan() => "-".into(),
                value => format!("{value:.1e}"),
            };
            [
                checked.name.clone(),
                checked.shape.clone(),
                checked.dtype.map_or("-".into(), |dtype| dtype.to_string()),
                number(checked.error),
                number(checked.bar),
                match checked.verdict {
                    Verdict::Passed => "passed",
                    Verdict::Failed => "FAILED",
                    Verdict::Refused => "refused",
                }
                .into(),
            ]
        }),
    )
}
