//! Multi-head self-attention within each sequence.

use std::array::from_fn;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::activation::exp;
use super::lanes::{LANES, copy, fold, sum};

/// Queries that one piece of work handles: enough that packing keys and values again for every
/// piece costs little, few enough that a long sequence feeds several threads.
const QUERIES: usize = 64;

/// y \[T, d_model\] = softmax(Q Kᵀ / √d_head) V; `qkv` \[T, 3·d_model\].
///
/// One thread computes a piece, in an order that depends only on the sequence.
pub(super) fn attention(
    y: &mut [f32],
    qkv: &[f32],
    sequence_offsets: &[u32],
    d_model: usize,
    num_heads: usize,
) {
    let mut rest = y;
    let mut pieces = Vec::new();
    for bounds in sequence_offsets.windows(2) {
        let sequence = bounds[0] as usize..bounds[1] as usize;
        for start in sequence.clone().step_by(QUERIES) {
            let queries = start..sequence.end.min(start + QUERIES);
            let (y, after) = rest.split_at_mut(queries.len() * d_model);
            rest = after;
            pieces.push((y, queries, sequence.clone()));
        }
    }
    let arch = Arch::new();
    pieces.into_par_iter().for_each_init(Scratch::default, |scratch, (y, queries, keys)| {
        arch.dispatch(Piece { y, qkv, queries, keys, d_model, num_heads, scratch });
    });
}

/// Some queries of one sequence against all its keys.
struct Piece<'a> {
    /// \[queries, d_model\].
    y: &'a mut [f32],
    qkv: &'a [f32],
    queries: Range<usize>,
    keys: Range<usize>,
    d_model: usize,
    num_heads: usize,
    scratch: &'a mut Scratch,
}

/// What one head needs. Rows are padded to a multiple of [`LANES`], so that no loop has a tail.
#[derive(Default)]
struct Scratch {
    /// Kᵀ \[d_head, keys\] in [`Panels`].
    keys: Vec<f32>,
    /// V \[keys, d_head\] in [`Panels`].
    values: Vec<f32>,
    /// \[queries, keys\].
    scores: Vec<f32>,
    /// \[queries, d_head\].
    output: Vec<f32>,
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { y, qkv, queries, keys, d_model, num_heads, scratch } = self;
        let d_head = d_model / num_heads;
        let scale = 1.0 / (d_head as f32).sqrt();
        let row = 3 * d_model;
        let keys_padded = keys.len().next_multiple_of(LANES);
        let head_padded = d_head.next_multiple_of(LANES);
        scratch.scores.resize(queries.len() * keys_padded, 0.0);
        scratch.output.resize(queries.len() * head_padded, 0.0);
        for head in 0..num_heads {
            let [q, k, v] = from_fn(|part| part * d_model + head * d_head);
            let mut panels = Panels::new::<S>(&mut scratch.keys, d_head, keys_padded);
            for (j, token) in keys.clone().enumerate() {
                panels.set_column(j, &qkv[token * row + k..][..d_head]);
            }
            let q = Rows { data: &qkv[queries.start * row + q..], stride: row, cols: d_head };
            panels.multiply(simd, &mut scratch.scores, q);
            for row in scratch.scores.chunks_exact_mut(keys_padded) {
                row[keys.len()..].fill(f32::NEG_INFINITY);
                softmax(row, scale);
            }
            let mut panels = Panels::new::<S>(&mut scratch.values, keys.len(), head_padded);
            for (j, token) in keys.clone().enumerate() {
                panels.set_row(j, &qkv[token * row + v..][..d_head]);
            }
            let weights = Rows { data: &scratch.scores, stride: keys_padded, cols: keys.len() };
            panels.multiply(simd, &mut scratch.output, weights);
            let rows = scratch.output.chunks_exact(head_padded);
            for (y, row) in y.chunks_exact_mut(d_model).zip(rows) {
                copy(&mut y[head * d_head..], &row[..d_head]);
            }
        }
    }
}

/// Rows that are `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    cols: usize,
}

/// The right side of a product, \[k, n\], cut into panels of `width` columns, the last of them
/// perhaps narrower; each is contiguous, row after row.
struct Panels<'a> {
    data: &'a mut [f32],
    k: usize,
    n: usize,
    width: usize,
}

impl<'a> Panels<'a> {
    /// n is a multiple of [`LANES`]; columns that are never set hold any numbers.
    #[inline(always)]
    fn new<S: Simd>(memory: &'a mut Vec<f32>, k: usize, n: usize) -> Self {
        memory.resize(k * n, 0.0);
        Self { data: memory, k, n, width: 2 * S::F32_LANES }
    }

    /// Start and width of the panel that holds a column, and the column within it.
    #[inline(always)]
    fn panel(&self, col: usize) -> (usize, usize, usize) {
        let first = col / self.width * self.width;
        (first * self.k, self.width.min(self.n - first), col - first)
    }

    #[inline(always)]
    fn set_column(&mut self, col: usize, values: &[f32]) {
        let (start, width, col) = self.panel(col);
        let places = self.data[start..].iter_mut().skip(col).step_by(width);
        places.zip(values).for_each(|(place, value)| *place = *value);
    }

    #[inline(always)]
    fn set_row(&mut self, row: usize, values: &[f32]) {
        for (i, values) in values.chunks(self.width).enumerate() {
            let (start, width, _) = self.panel(i * self.width);
            copy(&mut self.data[start + row * width..], values);
        }
    }

    /// c \[rows, n\] = a \[rows, k\] · self.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, c: &mut [f32], a: Rows<'_>) {
        for col in (0..self.n).step_by(self.width) {
            let (start, width, _) = self.panel(col);
            let panel = &self.data[start..][..self.k * width];
            if width == self.width {
                multiply_panel::<S, 2>(simd, c, a, panel, self.n, col);
            } else {
                multiply_panel::<S, 1>(simd, c, a, panel, self.n, col);
            }
        }
    }
}

/// Columns `col..` of c \[rows, n\], as many as V vectors hold.
#[inline(always)]
fn multiply_panel<S: Simd, const V: usize>(
    simd: S,
    c: &mut [f32],
    a: Rows<'_>,
    panel: &[f32],
    n: usize,
    col: usize,
) {
    const ROWS: usize = 4;
    let mut row = 0;
    for c in c.chunks_mut(ROWS * n) {
        let a = Rows { data: &a.data[row * a.stride..], ..a };
        match c.len() / n {
            1 => multiply_tile::<S, 1, V>(simd, c, a, panel, n, col),
            2 => multiply_tile::<S, 2, V>(simd, c, a, panel, n, col),
            3 => multiply_tile::<S, 3, V>(simd, c, a, panel, n, col),
            _ => multiply_tile::<S, ROWS, V>(simd, c, a, panel, n, col),
        }
        row += ROWS;
    }
}

/// R rows of c, whose sums stay in registers.
#[inline(always)]
fn multiply_tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    c: &mut [f32],
    a: Rows<'_>,
    panel: &[f32],
    n: usize,
    col: usize,
) {
    let a: [&[f32]; R] = from_fn(|r| &a.data[r * a.stride..][..a.cols]);
    let (panel, _) = S::as_simd_f32s(panel);
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for (i, b) in panel.chunks_exact(V).enumerate().take(a[0].len()) {
        for r in 0..R {
            let a = simd.splat_f32s(a[r][i]);
            for v in 0..V {
                sums[r][v] = simd.mul_add_e_f32s(a, b[v], sums[r][v]);
            }
        }
    }
    for (row, sums) in c.chunks_exact_mut(n).zip(sums) {
        let (row, _) = S::as_mut_simd_f32s(&mut row[col..]);
        row[..V].copy_from_slice(&sums);
    }
}

/// softmax(scale · row) in place, for a multiple of [`LANES`] elements.
#[inline(always)]
fn softmax(row: &mut [f32], scale: f32) {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let max = fold(row, f32::NEG_INFINITY, larger, larger);
    for chunk in row.as_chunks_mut::<LANES>().0 {
        for x in chunk {
            *x = exp((*x - max) * scale, 0.0);
        }
    }
    let factor = 1.0 / sum(row, |x| x);
    row.iter_mut().for_each(|x| *x *= factor);
}
