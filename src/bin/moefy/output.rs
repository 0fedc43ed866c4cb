//! What commands print on standard output.

use std::io::Write;
use std::path::Path;

use comfy_table::{CellAlignment, Table, TableStyle};
use serde::Serialize;

use crate::Common;

/// Prints a line; a closed pipe (`moefy … | head`) ends the program quietly, anything else that is in the
/// way with an error.
pub fn line(text: &str) {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: cannot write to standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// A path for JSON, whose strings are UTF-8.
pub fn path(path: &Path) -> String {
    path.display().to_string()
}

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) {
    line(&serde_json::to_string_pretty(value).expect("numbers, strings and lists"));
}

/// A table without rulings: the first column to the left, numbers to the right.
pub fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Says where a model went.
pub fn written(common: &Common, out: &Path) {
    if common.json {
        json(&serde_json::json!({ "out": path(out) }));
    } else {
        line(&format!("wrote {}", out.display()));
    }
}
