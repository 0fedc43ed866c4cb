//! Multi-head self-attention within each sequence.

use std::array::from_fn;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::activation::exp;
use super::super::kernels::SharedMut;
use super::lanes::{LANES, copy, fold, sum};

/// Queries whose scores are in memory at a time: with 512 keys, 128 KB.
const QUERIES: usize = 64;

/// y \[T, d_model\] = softmax(Q Kᵀ / √d_head) V; `qkv` \[T, 3·d_model\].
///
/// One thread computes a head of a sequence, in an order that depends only on the sequence.
pub(super) fn attention(
    y: &mut [f32],
    qkv: &[f32],
    sequence_offsets: &[u32],
    d_model: usize,
    num_heads: usize,
) {
    let (arch, y) = (Arch::new(), SharedMut::new(y));
    let pieces = (sequence_offsets.len() - 1) * num_heads;
    (0..pieces).into_par_iter().for_each_init(Scratch::default, |scratch, piece| {
        let (sequence, head) = (piece / num_heads, piece % num_heads);
        let tokens = sequence_offsets[sequence] as usize..sequence_offsets[sequence + 1] as usize;
        let d_head = d_model / num_heads;
        arch.dispatch(Head { y, qkv, tokens, d_model, first: head * d_head, d_head, scratch });
    });
}

/// One head of one sequence.
struct Head<'a> {
    /// \[T, d_model\].
    y: SharedMut<'a>,
    qkv: &'a [f32],
    tokens: Range<usize>,
    d_model: usize,
    /// The head's first element of a token.
    first: usize,
    d_head: usize,
    scratch: &'a mut Scratch,
}

/// What one head needs. Rows are padded to a multiple of [`LANES`], so that no loop has a tail.
#[derive(Default)]
struct Scratch {
    /// Kᵀ \[d_head, keys\] in [`Panels`].
    keys: Vec<f32>,
    /// V \[keys, d_head\] in [`Panels`].
    values: Vec<f32>,
    /// \[QUERIES, keys\].
    scores: Vec<f32>,
    /// \[QUERIES, d_head\].
    output: Vec<f32>,
}

impl WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { y, qkv, tokens, d_model, first, d_head, scratch } = self;
        let scale = 1.0 / (d_head as f32).sqrt();
        let [q, k, v] = from_fn(|part| part * d_model + first);
        let stride = 3 * d_model;
        let keys_padded = tokens.len().next_multiple_of(LANES);
        let head_padded = d_head.next_multiple_of(LANES);

        let mut keys = Panels::new::<S>(&mut scratch.keys, d_head, keys_padded);
        let mut values = Panels::new::<S>(&mut scratch.values, tokens.len(), head_padded);
        for (i, token) in tokens.clone().enumerate() {
            keys.set_column(i, &qkv[token * stride + k..][..d_head]);
            values.set_row(i, &qkv[token * stride + v..][..d_head]);
        }
        for start in tokens.clone().step_by(QUERIES) {
            let queries = QUERIES.min(tokens.end - start);
            scratch.scores.resize(queries * keys_padded, 0.0);
            scratch.output.resize(queries * head_padded, 0.0);
            let q = Rows { data: &qkv[start * stride + q..], stride, cols: d_head };
            keys.multiply(simd, &mut scratch.scores, q);
            for row in scratch.scores.chunks_exact_mut(keys_padded) {
                row[tokens.len()..].fill(f32::NEG_INFINITY);
                softmax(row, scale);
            }
            let weights = Rows { data: &scratch.scores, stride: keys_padded, cols: tokens.len() };
            values.multiply(simd, &mut scratch.output, weights);
            for (i, row) in scratch.output.chunks_exact(head_padded).enumerate() {
                let at = (start + i) * d_model + first;
                // SAFETY: no other task writes this head of this token, and none reads y.
                copy(unsafe { y.part(at..at + d_head) }, &row[..d_head]);
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
