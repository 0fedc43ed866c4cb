//! The speed-up as a picture: over density where there are several, else over tokens.

use moefy::cuda::bench::FfnRow;
use plotters::prelude::*;

use super::shapes::label;
use crate::output::percent;

const SIZE: (u32, u32) = (860, 480);

/// A line of the picture.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The rows as SVG: a line for every way in which they differ, and one where the dense layer is.
pub fn svg(rows: &[FfnRow]) -> String {
    let over_density = rows.iter().any(|row| differ(row.density, rows[0].density));
    let series = series(rows, over_density);
    let mut text = String::new();
    let drawn = draw(&mut text, &series, over_density);
    drawn.expect("a string takes any picture");
    text
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

fn draw(
    text: &mut String,
    series: &[Series],
    over_density: bool,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let points = || series.iter().flat_map(|series| &series.points);
    let most = |pick: fn(&(f64, f64)) -> f64| points().map(pick).fold(1.0, f64::max);
    let least_x = points().map(|point| point.0).fold(f64::INFINITY, f64::min).min(most(|p| p.0));
    let xs = if over_density { 0.0..most(|p| p.0) } else { least_x..most(|p| p.0) };
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    // The names stand beside the lines, however many there are.
    let longest = series.iter().map(|series| series.name.len()).max().unwrap_or(0) as u32;
    let (picture, names) =
        area.split_horizontally(SIZE.0.saturating_sub(60 + 7 * longest).max(360));
    let mut chart = ChartBuilder::on(&picture)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(xs.clone(), 0.0..1.08 * most(|p| p.1))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(if over_density { 10 } else { (xs.end - xs.start) as usize + 1 })
        .x_desc(if over_density { "executed density, %" } else { "tokens" })
        .x_label_formatter(&|x| {
            if over_density { format!("{x:.0}") } else { format!("{:.0}", x.exp2()) }
        })
        .y_desc("speed-up over dense")
        .y_label_formatter(&|y| format!("{y:.1}"))
        .draw()?;
    chart.draw_series(LineSeries::new([(xs.start, 1.0), (xs.end, 1.0)], BLACK))?;
    for (index, Series { name, points }) in series.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        let dot = |&point: &(f64, f64)| Circle::new(point, 3, colour.filled());
        chart.draw_series(points.iter().map(dot))?;
        let y = 24 + 16 * index as i32;
        names.draw(&Circle::new((8, y + 6), 4, colour.filled()))?;
        names.draw(&Text::new(name.clone(), (18, y), ("sans-serif", 12)))?;
    }
    drop(chart);
    area.present()
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
