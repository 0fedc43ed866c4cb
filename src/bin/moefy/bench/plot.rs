//! The speed-up as a picture: over density where there are several, else over tokens; of rows that were just measured,
//! and `moefy bench plot`.

use std::path::PathBuf;

use moefy::cuda::bench::FfnRow;
use moefy::{DType, Error, Result};
use serde::Deserialize;

use super::shapes::label;
use crate::chart::{self, Axis, Panel, Series};
use crate::output::percent;

/// Rows that were measured earlier, as a picture.
#[derive(clap::Args)]
pub struct Plot {
    /// A record, or what `moefy bench ffn --json` printed
    rows: PathBuf,
    /// Where the picture goes
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,
    /// Only these numbers of tokens
    #[arg(long, value_name = "T", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Only these paths; auto is what the plan chose
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "auto")]
    path: Vec<String>,
    /// Only this routing
    #[arg(long, value_name = "WHAT", default_value = "random")]
    routing: String,
    /// Only this type
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    dtype: String,
    /// Only this router
    #[arg(long, value_name = "NAME", default_value = "d2dmoe-128")]
    router: String,
    /// Only with this fallback
    #[arg(long, value_name = "NAME", default_value = "exact")]
    fallback: String,
}

impl Plot {
    pub fn run(&self) -> Result<()> {
        let text = std::fs::read_to_string(&self.rows).map_err(Error::io("read", &self.rows))?;
        let mut rows = read(&text).map_err(|problem| Error::file(&self.rows, problem))?;
        rows.retain(|row| self.wants(row));
        if rows.is_empty() {
            let problem = "no row has these tokens, path, routing, type, router and fallback";
            return Err(Error::file(&self.rows, problem));
        }
        chart::write(&self.svg, &svg(&rows))
    }

    fn wants(&self, row: &Row) -> bool {
        let path = if row.path_forced { &row.path } else { "auto" };
        (self.tokens.is_empty() || self.tokens.contains(&row.tokens))
            && self.path.iter().any(|name| name == path)
            && (row.routing == self.routing && row.router == self.router)
            && (row.dtype.to_string() == self.dtype && row.fallback == self.fallback)
    }
}

/// The rows of a record, or one in each line.
fn read(text: &str) -> Result<Vec<Row>, String> {
    #[derive(Deserialize)]
    struct Record {
        bench: Vec<Row>,
    }
    if let Ok(record) = serde_json::from_str::<Record>(text) {
        return Ok(record.bench);
    }
    let row = |(number, line)| {
        serde_json::from_str(line)
            .map_err(|error| format!("line {} is no row: {error}", number + 1))
    };
    text.lines().enumerate().map(row).collect()
}

/// What a picture shows of a row.
#[derive(Deserialize)]
pub struct Row {
    d_model: usize,
    d_ff: usize,
    glu: bool,
    num_experts: usize,
    dtype: DType,
    router: String,
    tokens: usize,
    routing: String,
    density: f64,
    fallback: String,
    path: String,
    path_forced: bool,
    speedup: f64,
}

impl From<&FfnRow> for Row {
    fn from(row: &FfnRow) -> Self {
        Self {
            d_model: row.d_model,
            d_ff: row.d_ff,
            glu: row.glu,
            num_experts: row.num_experts,
            dtype: row.dtype,
            router: row.router.clone(),
            tokens: row.tokens,
            routing: row.routing.clone(),
            density: row.density,
            fallback: row.fallback.into(),
            path: row.path.into(),
            path_forced: row.path_forced,
            speedup: row.speedup,
        }
    }
}

/// The rows as SVG: a line for every way in which they differ, and one where the dense layer is.
pub fn svg(rows: &[Row]) -> String {
    let over_density = rows.iter().any(|row| differ(row.density, rows[0].density));
    let series = series(rows, over_density);
    let points = || series.iter().flat_map(|series| &series.points);
    let most = |pick: fn(&(f64, f64)) -> f64| points().map(pick).fold(1.0, f64::max);
    let end = most(|point| point.0);
    let x = if over_density {
        let name = "executed density, %".into();
        Axis { name, range: 0.0..end, labels: 10, label: |x| format!("{x:.0}") }
    } else {
        let start = points().map(|point| point.0).fold(end, f64::min);
        let label = |x: f64| format!("{:.0}", x.exp2());
        let labels = (end - start) as usize + 1;
        Axis { name: "tokens".into(), range: start..end, labels, label }
    };
    let y = Axis {
        name: "speed-up over dense".into(),
        range: 0.0..1.08 * most(|point| point.1),
        labels: 10,
        label: |y| format!("{y:.1}"),
    };
    chart::svg(&[Panel { x, y, level: Some(1.0), series }])
}

fn differ(a: f64, b: f64) -> bool {
    (a - b).abs() > 0.01
}

fn series(rows: &[Row], over_density: bool) -> Vec<Series> {
    let fields = |row: &Row| {
        let path =
            if row.path_forced { row.path.to_string() } else { format!("auto ({})", row.fallback) };
        [
            label(row.d_model, row.d_ff, row.glu, row.num_experts),
            row.dtype.to_string(),
            row.router.clone(),
            if over_density { format!("T {}", row.tokens) } else { percent(row.density) },
            row.routing.clone(),
            path,
        ]
    };
    let all: Vec<_> = rows.iter().map(fields).collect();
    // The layer is always named, the rest where it tells lines apart.
    let tells = |field: usize| field == 0 || all.iter().any(|f| f[field] != all[0][field]);
    let mut series: Vec<Series> = Vec::new();
    for (row, fields) in rows.iter().zip(&all) {
        let parts: Vec<&str> =
            (0..fields.len()).filter(|&i| tells(i)).map(|i| fields[i].as_str()).collect();
        let name = parts.join(", ");
        let x = if over_density { 100.0 * row.density } else { (row.tokens as f64).log2() };
        let point = (x, row.speedup);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    }
    for series in &mut series {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        // What two sets have in common was measured twice.
        series.points.dedup_by(|b, a| !differ(a.0, b.0));
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tokens: usize, density: f64, path: &str) -> Row {
        Row {
            d_model: 768,
            d_ff: 3072,
            glu: false,
            num_experts: 96,
            dtype: DType::BF16,
            router: "d2dmoe-128".into(),
            tokens,
            routing: "random".into(),
            density,
            fallback: "exact".into(),
            path: path.into(),
            path_forced: true,
            speedup: 2.0,
        }
    }

    #[test]
    fn one_line_for_each_way_over_density() {
        let rows = [row(1, 0.4, "few"), row(1, 0.1, "few"), row(1, 0.1, "expert-major")];
        let series = series(&rows, true);
        let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
        assert_eq!(names, ["d768 F3072 E96, few", "d768 F3072 E96, expert-major"]);
        assert_eq!(series[0].points, [(10.0, 2.0), (40.0, 2.0)]);
        let picture = svg(&rows);
        assert!(picture.starts_with("<svg") && picture.contains("executed density"), "{picture}");
        assert!(picture.contains("expert-major"));
    }

    #[test]
    fn over_tokens_where_the_density_is_one() {
        let picture = svg(&[row(1, 0.1, "few"), row(8, 0.1, "few")]);
        assert!(picture.contains("tokens") && picture.contains("d768 F3072 E96"), "{picture}");
        assert!(svg(&[row(8, 0.1, "few")]).starts_with("<svg"));
        assert!(svg(&[]).starts_with("<svg"));
    }
}
