//! The speed-up as a picture: over density where there are several, else over tokens.

use moefy::cuda::bench::FfnRow;

use super::shapes::label;
use crate::chart::{self, Axis, Panel, Series};
use crate::output::percent;

/// The rows as SVG: a line for every way in which they differ, and one where the dense layer is.
pub fn svg(rows: &[FfnRow]) -> String {
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

fn series(rows: &[FfnRow], over_density: bool) -> Vec<Series> {
    let fields = |row: &FfnRow| {
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
    }
    series
}

#[cfg(test)]
mod tests {
    use moefy::DType;
    use moefy::ffn::Activation;

    use super::*;

    fn row(tokens: usize, density: f64, path: &'static str) -> FfnRow {
        FfnRow {
            d_model: 768,
            d_ff: 3072,
            glu: false,
            activation: Activation::GeluTanh,
            num_experts: 96,
            shared: 0,
            dtype: DType::BF16,
            router: "d2dmoe-128".into(),
            tokens,
            routing: "random".into(),
            density,
            fallback: "exact",
            path,
            path_forced: true,
            us: 5.0,
            dense_us: 10.0,
            speedup: 2.0,
            spread: 0.01,
            bound_us: 1.0,
            share_of_bound: 0.2,
            executed_bytes: 1,
            router_select_us: 1.0,
            index_us: 1.0,
            experts_us: 3.0,
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
