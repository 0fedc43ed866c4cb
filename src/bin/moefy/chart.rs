//! Lines as SVG: panels one below the other, with the lines' names beside them.

use std::io::Write;
use std::ops::Range;
use std::path::Path;

use moefy::{Error, Result};
use plotters::prelude::*;
use tempfile::NamedTempFile;

const WIDTH: u32 = 860;
const PANEL_HEIGHT: u32 = 480;

/// A line.
#[derive(Clone)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Lines over one pair of axes. Lines of the same place in different panels have the same colour.
pub struct Panel {
    pub x: Axis,
    pub y: Axis,
    /// What to compare with: a black horizontal line.
    pub level: Option<f64>,
    pub series: Vec<Series>,
}

pub struct Axis {
    pub name: String,
    pub range: Range<f64>,
    pub labels: usize,
    pub label: fn(f64) -> String,
}

/// Writes a picture: the whole of it, or nothing.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, svg: &str) -> Result<()> {
    let mut picture = beside(path)?;
    picture.write_all(svg.as_bytes()).map_err(Error::io("write", path))?;
    picture.persist(path).map_err(|failed| Error::io("write", path)(failed.error)).map(drop)
}

/// Whether a picture can be written there: better now than after minutes of work.
///
/// # Errors
/// When it cannot.
pub fn check(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder: name a file for the picture"));
    }
    beside(path).map(drop)
}

/// A file of the same folder that is gone unless it takes the picture's name.
fn beside(path: &Path) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder.unwrap_or(Path::new("."))).map_err(Error::io("write", path))
}

/// The panels as a picture, with the names of the first panel's lines.
pub fn svg(panels: &[Panel]) -> String {
    let mut text = String::new();
    draw(&mut text, panels).expect("a string takes any picture");
    text
}

fn draw(
    text: &mut String,
    panels: &[Panel],
) -> std::result::Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let size = (WIDTH, PANEL_HEIGHT * panels.len().max(1) as u32);
    let area = SVGBackend::with_string(text, size).into_drawing_area();
    area.fill(&WHITE)?;
    let named: &[Series] = panels.first().map_or(&[], |panel| &panel.series);
    // The names stand beside the lines, however many there are.
    let longest = named.iter().map(|series| series.name.len()).max().unwrap_or(0) as u32;
    let (picture, names) = area.split_horizontally(WIDTH.saturating_sub(60 + 7 * longest).max(360));
    for (panel, area) in panels.iter().zip(picture.split_evenly((panels.len(), 1))) {
        draw_panel(panel, &area)?;
    }
    for (index, Series { name, .. }) in named.iter().enumerate() {
        let y = 24 + 16 * index as i32;
        names.draw(&Circle::new((8, y + 6), 4, colour(index).filled()))?;
        names.draw(&Text::new(name.clone(), (18, y), ("sans-serif", 12)))?;
    }
    area.present()
}

fn colour(index: usize) -> RGBAColor {
    Palette99::pick(index).to_rgba()
}

fn draw_panel<B: DrawingBackend>(
    Panel { x, y, level, series }: &Panel,
    area: &DrawingArea<B, plotters::coord::Shift>,
) -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(x.range.clone(), y.range.clone())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(x.labels)
        .x_desc(&x.name)
        .x_label_formatter(&|value| (x.label)(*value))
        .y_labels(y.labels)
        .y_desc(&y.name)
        .y_label_formatter(&|value| (y.label)(*value))
        .draw()?;
    if let Some(level) = *level {
        let ends = [(x.range.start, level), (x.range.end, level)];
        chart.draw_series(LineSeries::new(ends, BLACK))?;
    }
    for (index, Series { points, .. }) in series.iter().enumerate() {
        let colour = colour(index);
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        let dot = |&point: &(f64, f64)| Circle::new(point, 3, colour.filled());
        chart.draw_series(points.iter().map(dot))?;
    }
    Ok(())
}
