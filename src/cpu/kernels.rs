//! The two products of a feed-forward network over the rows that a set of tokens needs, with the
//! widest instructions that the machine has.
//!
//! Every element of a result is summed in one order, whatever rows, columns and tokens a call
//! covers. So the work can be cut anywhere, and the bits do not change with the cut.
//!
//! Vector operations stand in loops, never in closures: a closure does not inherit the instruction
//! set of the function around it, and would call every operation out of line.
#![allow(clippy::needless_range_loop)]

use std::array::from_fn;
use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

/// Columns of one step of a dot product: 7 rows of a tile (28 KB) stay in the first-level cache.
const CHUNK: usize = 1024;
/// f32 elements of x that stay in the second-level cache.
const NEARBY: usize = 96 * 1024;
/// f32 elements of x or y that stay in the first-level cache while weights stream past.
const NEAR: usize = 6 * 1024;
/// Tokens and rows of a tile: 12 sums, 3 + 1 operands, the 16 registers of AVX2.
const TOKENS: usize = 3;
const ROWS: usize = 4;
/// Up to this many tokens, weights are read row by row, as they lie in memory: one long stream comes
/// twice as fast as four short ones.
const FEW: usize = 8;
/// How far ahead of them weights are asked for, where they are read row by row.
const ROWS_AHEAD: usize = 8;

/// z \[ids, rows\] += x\[ids\] · wᵀ.
pub struct Products<'a> {
    /// \[T, d\].
    pub x: &'a [f32],
    /// d.
    pub d: usize,
    /// Which rows of x.
    pub ids: &'a [u32],
    /// \[rows, d\].
    pub w: &'a [f32],
    /// \[ids.len(), rows\].
    pub z: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, d, ids, w, z } = self;
        let num_rows = w.len() / d;
        let block = (NEARBY / d).max(TOKENS);
        for (ids, z) in ids.chunks(block).zip(z.chunks_mut(block * num_rows)) {
            let few = ids.len() <= FEW && ids.len() * d <= NEAR;
            let rows_at_once = if few { 1 } else { ROWS };
            for row in (0..num_rows).step_by(rows_at_once) {
                if few {
                    prefetch(w, (row + ROWS_AHEAD) * d, d);
                }
                for start in (0..d).step_by(CHUNK) {
                    let cols = start..d.min(start + CHUNK);
                    let tiles = DotTiles { x, d, ids, w, z: &mut *z, num_rows, row, cols };
                    match rows_at_once.min(num_rows - row) {
                        1 => tiles.run::<S, 1>(simd),
                        2 => tiles.run::<S, 2>(simd),
                        3 => tiles.run::<S, 3>(simd),
                        _ => tiles.run::<S, ROWS>(simd),
                    }
                }
            }
        }
    }
}

/// Asks for elements `start..start + len` of the rows `w` of weights, or of what lies behind them,
/// so that they are in the second-level cache when their turn comes.
#[inline(always)]
fn prefetch(w: &[f32], start: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (start..start + len).step_by(64 / size_of::<f32>()) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: only a hint, which no address makes fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(w.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (w, start, len);
}

/// N rows of weights against all tokens.
struct DotTiles<'a> {
    x: &'a [f32],
    d: usize,
    ids: &'a [u32],
    w: &'a [f32],
    z: &'a mut [f32],
    num_rows: usize,
    row: usize,
    cols: Range<usize>,
}

impl DotTiles<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        let Self { x, d, ids, w, z, num_rows, row, cols } = self;
        let w: [&[f32]; N] = from_fn(|j| &w[(row + j) * d..][cols.clone()]);
        let x_row = |id: u32| &x[id as usize * d..][cols.clone()];
        let mut add = |token: usize, sums: [f32; N]| {
            let z = &mut z[token * num_rows + row..][..N];
            z.iter_mut().zip(sums).for_each(|(z, sum)| *z += sum);
        };
        let whole = ids.len() / TOKENS * TOKENS;
        for token in (0..whole).step_by(TOKENS) {
            let x: [&[f32]; TOKENS] = from_fn(|i| x_row(ids[token + i]));
            let sums = dot_tile(simd, x, w);
            (0..TOKENS).for_each(|i| add(token + i, sums[i]));
        }
        match ids[whole..] {
            [a, b] => {
                let sums = dot_tile(simd, [x_row(a), x_row(b)], w);
                (0..2).for_each(|i| add(whole + i, sums[i]));
            }
            [a] => add(whole, dot_tile(simd, [x_row(a)], w)[0]),
            _ => {}
        }
    }
}

#[inline(always)]
fn dot_tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    x: [&[f32]; M],
    w: [&[f32]; N],
) -> [[f32; N]; M] {
    let x: [(&[S::f32s], &[f32]); M] = from_fn(|i| S::as_simd_f32s(x[i]));
    let w: [(&[S::f32s], &[f32]); N] = from_fn(|j| S::as_simd_f32s(w[j]));
    let steps = w[0].0.len();
    // Tells the compiler that no index below is out of bounds.
    let x_head: [&[S::f32s]; M] = from_fn(|i| &x[i].0[..steps]);
    let w_head: [&[S::f32s]; N] = from_fn(|j| &w[j].0[..steps]);
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    for step in 0..steps {
        for j in 0..N {
            let w = w_head[j][step];
            for i in 0..M {
                sums[i][j] = simd.mul_add_e_f32s(x_head[i][step], w, sums[i][j]);
            }
        }
    }
    let mut totals = [[0.0; N]; M];
    for i in 0..M {
        for j in 0..N {
            let rest: f32 = x[i].1.iter().zip(w[j].1).map(|(x, w)| x * w).sum();
            totals[i][j] = simd.reduce_sum_f32s(sums[i][j]) + rest;
        }
    }
    totals
}

/// y\[ids, cols\] += h · w\[.., cols\].
pub struct Accumulate<'a> {
    /// \[T, d\]; tasks that run at once share it and write other columns or other rows.
    pub y: SharedMut<'a>,
    /// d.
    pub d: usize,
    /// Which rows of y, each at most once.
    pub ids: &'a [u32],
    /// Which columns; cuts are at multiples of [`COLUMNS`].
    pub cols: Range<usize>,
    /// \[ids.len(), rows\].
    pub h: &'a [f32],
    /// \[rows, d\].
    pub w: &'a [f32],
}

/// Columns are cut at multiples of this, so that a column is always in a vector or never.
pub const COLUMNS: usize = 64;

impl WithSimd for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let num_rows = self.w.len() / self.d;
        let vectors = self.cols.start..self.cols.end / S::F32_LANES * S::F32_LANES;
        if self.ids.len() <= FEW {
            let width = NEAR / self.ids.len() / COLUMNS * COLUMNS;
            for start in vectors.clone().step_by(width) {
                let cols = start..vectors.end.min(start + width);
                for row in 0..num_rows {
                    prefetch(self.w, (row + ROWS_AHEAD) * self.d + cols.start, cols.len());
                    self.add_row(simd, row, cols.clone());
                }
            }
        } else {
            let wide = ROWS * S::F32_LANES;
            let split = vectors.start + vectors.len() / wide * wide;
            for col in (vectors.start..split).step_by(wide) {
                self.add_columns::<S, ROWS>(simd, col, num_rows);
            }
            for col in (split..vectors.end).step_by(S::F32_LANES) {
                self.add_columns::<S, 1>(simd, col, num_rows);
            }
        }
        for col in vectors.end..self.cols.end {
            for (token, &id) in self.ids.iter().enumerate() {
                let h = &self.h[token * num_rows..][..num_rows];
                // SAFETY: as in `add_row_to`.
                let y = unsafe { &mut *self.y.at(id as usize * self.d + col) };
                h.iter().enumerate().for_each(|(n, h)| *y += h * self.w[n * self.d + col]);
            }
        }
    }
}

impl Accumulate<'_> {
    /// Adds one row to every token: weights are read as they lie, y stays in the cache.
    #[inline(always)]
    fn add_row<S: Simd>(&self, simd: S, row: usize, cols: Range<usize>) {
        let whole = self.ids.len() / TOKENS * TOKENS;
        for token in (0..whole).step_by(TOKENS) {
            self.add_row_to::<S, TOKENS>(simd, token, row, cols.clone());
        }
        match self.ids.len() - whole {
            1 => self.add_row_to::<S, 1>(simd, whole, row, cols),
            2 => self.add_row_to::<S, 2>(simd, whole, row, cols),
            _ => {}
        }
    }

    #[inline(always)]
    fn add_row_to<S: Simd, const M: usize>(
        &self,
        simd: S,
        token: usize,
        row: usize,
        cols: Range<usize>,
    ) {
        let num_rows = self.w.len() / self.d;
        let mut h = [simd.splat_f32s(0.0); M];
        for i in 0..M {
            h[i] = simd.splat_f32s(self.h[(token + i) * num_rows + row]);
        }
        let y: [*mut f32; M] =
            from_fn(|i| self.y.at(self.ids[token + i] as usize * self.d + cols.start));
        let w = S::as_simd_f32s(&self.w[row * self.d..][cols]).0;
        for (step, &w) in w.iter().enumerate() {
            for i in 0..M {
                // SAFETY: `cols` lies inside row ids[token + i] of y, and no other task writes
                // these columns of that row.
                unsafe {
                    let at = y[i].add(step * S::F32_LANES).cast::<S::f32s>();
                    at.write_unaligned(simd.mul_add_e_f32s(h[i], w, at.read_unaligned()));
                }
            }
        }
    }

    /// Adds all rows to V vectors of columns of every token: y stays in registers.
    #[inline(always)]
    fn add_columns<S: Simd, const V: usize>(&self, simd: S, col: usize, num_rows: usize) {
        let whole = self.ids.len() / TOKENS * TOKENS;
        for token in (0..whole).step_by(TOKENS) {
            self.add_columns_to::<S, TOKENS, V>(simd, token, col, num_rows);
        }
        match self.ids.len() - whole {
            1 => self.add_columns_to::<S, 1, V>(simd, whole, col, num_rows),
            2 => self.add_columns_to::<S, 2, V>(simd, whole, col, num_rows),
            _ => {}
        }
    }

    #[inline(always)]
    fn add_columns_to<S: Simd, const M: usize, const V: usize>(
        &self,
        simd: S,
        token: usize,
        col: usize,
        num_rows: usize,
    ) {
        let h: [&[f32]; M] = from_fn(|i| &self.h[(token + i) * num_rows..][..num_rows]);
        let y: [*mut S::f32s; M] =
            from_fn(|i| self.y.at(self.ids[token + i] as usize * self.d + col).cast());
        // SAFETY: as in `add_row_to`; the V vectors of columns at `col` exist in every row of w.
        unsafe {
            let mut sums = [[simd.splat_f32s(0.0); V]; M];
            for i in 0..M {
                for v in 0..V {
                    sums[i][v] = y[i].add(v).read_unaligned();
                }
            }
            for n in 0..num_rows {
                let w = self.w.as_ptr().add(n * self.d + col).cast::<S::f32s>();
                let mut factors = [simd.splat_f32s(0.0); M];
                for i in 0..M {
                    factors[i] = simd.splat_f32s(h[i][n]);
                }
                for v in 0..V {
                    let w = w.add(v).read_unaligned();
                    for i in 0..M {
                        sums[i][v] = simd.mul_add_e_f32s(factors[i], w, sums[i][v]);
                    }
                }
            }
            for i in 0..M {
                for v in 0..V {
                    y[i].add(v).write_unaligned(sums[i][v]);
                }
            }
        }
    }
}

/// A slice that several tasks write at once, each to elements of its own.
#[derive(Clone, Copy)]
pub struct SharedMut<'a> {
    data: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]`, which may go to another thread; whoever dereferences what `at`
// gives answers for keeping the tasks apart.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// Where element `index` is.
    pub fn at(self, index: usize) -> *mut f32 {
        assert!(index <= self.len);
        // SAFETY: inside the slice, or one past its end.
        unsafe { self.data.add(index) }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No other task reads or writes it at the same time.
    pub unsafe fn part(self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// A part of the slice that several tasks may read.
    ///
    /// # Safety
    /// No task writes it any more.
    pub unsafe fn read(self, range: Range<usize>) -> &'a [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice, and only read.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }
}
