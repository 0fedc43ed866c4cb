//! Rows on a terminal.

use moefy::cuda::bench::FfnRow;

use super::shapes::label;
use crate::output;

pub fn table(rows: &[FfnRow]) -> String {
    let header = [
        "layer",
        "type",
        "router",
        "T",
        "routing",
        "density",
        "path",
        "us",
        "dense us",
        "speed-up",
        "spread",
        "of bound",
        "router us",
        "index us",
        "experts us",
    ];
    output::table(
        header,
        rows.iter().map(|row| {
            let us = |us: f64| format!("{us:.1}");
            let path = match row.path_forced {
                true => row.path.to_string(),
                false => format!("auto, {}: {}", row.fallback, row.path),
            };
            [
                label(row.d_model, row.d_ff, row.glu, row.num_experts),
                row.dtype.to_string(),
                row.router.clone(),
                row.tokens.to_string(),
                row.routing.clone(),
                output::percent(row.density),
                path,
                us(row.us),
                us(row.dense_us),
                format!("{:.2}x", row.speedup),
                output::percent(row.spread),
                output::percent(row.share_of_bound),
                us(row.router_select_us),
                us(row.index_us),
                us(row.experts_us),
            ]
        }),
    )
}
