//! Neurons with their weights widened to f32, and the two phases that run them.
//!
//! First every piece of work (some neurons for the tokens that need them) computes its own block of
//! hidden values; then every task owns some rows and columns of y and adds up the pieces in order.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::activation::activate;
use super::buffer::Buffer;
use super::index::TokenIndex;
use super::kernels::{Accumulate, COLUMNS, Products, SharedMut};
use crate::ffn::{Activation, DenseFfn};
use crate::tensor::Tensor;

/// Neurons of one piece: their rows are read once from memory, and again from the cache.
const PIECE_ROWS: usize = 64;
/// Tokens of one piece.
const PIECE_TOKENS: usize = 256;
/// Columns and tokens of y that one task of the second phase owns when there are many tokens: they
/// stay in the second-level cache.
const Y_COLUMNS: usize = 256;
const Y_TOKENS: usize = 512;
/// Up to this many tokens, a task owns as many columns as there are for each thread.
const FEW_TOKENS: usize = 32;
/// Multiply-adds that take much longer than waking a thread, which on a virtual machine can be
/// 100 µs.
pub const WORTH_A_THREAD: usize = 3 << 18;

/// Neurons in neuron-major order.
#[derive(Clone, Debug)]
pub struct Neurons {
    activation: Activation,
    glu: bool,
    d_model: usize,
    d_ff: usize,
    /// \[G·d_ff, d_model\]
    w_in: Buffer,
    /// \[G·d_ff\]
    b_in: Option<Vec<f32>>,
    /// μ \[d_ff\], subtracted from the hidden values.
    mean: Option<Vec<f32>>,
    /// \[d_ff, d_model\]
    w_out: Buffer,
}

/// Neurons `rows` of part `part` for the tokens `ids[group]`.
#[derive(Clone, Debug)]
pub struct Piece {
    part: usize,
    rows: Range<usize>,
    group: Range<usize>,
    gated: bool,
    /// Where its block of hidden values starts: \[G, group.len(), rows.len()\].
    hidden: usize,
}

/// The work of one call, in the order in which y adds it up.
#[derive(Debug, Default)]
pub struct Pieces {
    list: Vec<Piece>,
    hidden: usize,
    macs: usize,
}

impl Pieces {
    pub fn clear(&mut self) {
        self.list.clear();
        (self.hidden, self.macs) = (0, 0);
    }

    /// Neurons `rows` of `neurons`, which is number `part`, for the tokens `ids[group]`.
    pub fn push(
        &mut self,
        neurons: &Neurons,
        part: usize,
        rows: Range<usize>,
        group: Range<usize>,
        gated: bool,
    ) {
        let blocks = if neurons.glu { 2 } else { 1 };
        for start in rows.clone().step_by(PIECE_ROWS) {
            let rows = start..rows.end.min(start + PIECE_ROWS);
            for first in group.clone().step_by(PIECE_TOKENS) {
                let group = first..group.end.min(first + PIECE_TOKENS);
                let hidden = self.hidden;
                self.hidden += blocks * group.len() * rows.len();
                self.macs += group.len() * rows.len() * neurons.d_model;
                self.list.push(Piece { part, rows: rows.clone(), group, gated, hidden });
            }
        }
    }
}

impl Neurons {
    pub fn new(ffn: &DenseFfn, mean: Option<&Tensor>) -> Self {
        Self {
            activation: ffn.activation(),
            glu: ffn.is_glu(),
            d_model: ffn.d_model(),
            d_ff: ffn.d_ff(),
            w_in: Buffer::copy_of(&ffn.w_in().to_f32()),
            b_in: ffn.b_in().map(|b| b.to_f32().into_owned()),
            mean: mean.map(|mean| mean.to_f32().into_owned()),
            w_out: Buffer::copy_of(&ffn.w_out().to_f32()),
        }
    }

    /// y += Uᵀ V x as neurons without an activation, one per rank.
    pub fn low_rank(u: &Tensor, v: &Tensor) -> Self {
        let [d_ff, d_model] = v.shape();
        Self {
            activation: Activation::Identity,
            glu: false,
            d_model,
            d_ff,
            w_in: Buffer::copy_of(&v.to_f32()),
            b_in: None,
            mean: None,
            w_out: Buffer::copy_of(&u.to_f32()),
        }
    }

    pub fn d_ff(&self) -> usize {
        self.d_ff
    }

    pub fn bytes(&self) -> usize {
        let vectors = [&self.b_in, &self.mean].into_iter().flatten().map(Vec::len).sum::<usize>();
        self.w_in.bytes() + self.w_out.bytes() + vectors * size_of::<f32>()
    }

    /// One piece of the first phase.
    fn hidden(
        &self,
        x: &[f32],
        rows: Range<usize>,
        ids: &[u32],
        gates: Option<&[f32]>,
        z: &mut [f32],
    ) {
        let (z, up) = z.split_at_mut(ids.len() * rows.len());
        let products = |first_row: usize, z: &mut [f32]| {
            let rows = first_row + rows.start..first_row + rows.end;
            match &self.b_in {
                Some(b) => {
                    z.chunks_exact_mut(rows.len()).for_each(|z| z.copy_from_slice(&b[rows.clone()]))
                }
                None => z.fill(0.0),
            }
            let d = self.d_model;
            let w = &self.w_in.as_slice()[rows.start * d..rows.end * d];
            Arch::new().dispatch(Products { x, d, ids, w, z });
        };
        products(0, z);
        activate(self.activation, z);
        if self.glu {
            products(self.d_ff, up);
            z.iter_mut().zip(up).for_each(|(z, up)| *z *= *up);
        }
        if let Some(mean) = &self.mean {
            for z in z.chunks_exact_mut(rows.len()) {
                z.iter_mut().zip(&mean[rows.clone()]).for_each(|(z, mean)| *z -= mean);
            }
        }
        if let Some(gates) = gates {
            for (z, gate) in z.chunks_exact_mut(rows.len()).zip(gates) {
                z.iter_mut().for_each(|z| *z *= gate);
            }
        }
    }
}

/// y = bias + the pieces. `gates` has one factor per pair of `index`.
#[allow(clippy::too_many_arguments)]
pub fn run(
    parts: &[Neurons],
    bias: &[f32],
    pieces: &Pieces,
    index: &TokenIndex,
    gates: Option<&[f32]>,
    x: &[f32],
    y: &mut [f32],
    hidden: &mut Buffer,
) {
    let d_model = bias.len();
    let num_tokens = y.len() / d_model;
    let parallel = pieces.macs >= WORTH_A_THREAD && rayon::current_num_threads() > 1;

    let hidden = SharedMut::new(hidden.first(pieces.hidden));
    let first_phase = |piece: &Piece| {
        let neurons = &parts[piece.part];
        let ids = &index.ids()[piece.group.clone()];
        let block = ids.len() * piece.rows.len();
        let len = if neurons.glu { 2 * block } else { block };
        // SAFETY: every piece has a block of its own.
        let z = unsafe { hidden.part(piece.hidden..piece.hidden + len) };
        let gates = gates.filter(|_| piece.gated).map(|gates| &gates[piece.group.clone()]);
        neurons.hidden(x, piece.rows.clone(), ids, gates, z);
    };
    if parallel {
        pieces.list.par_iter().for_each(first_phase);
    } else {
        pieces.list.iter().for_each(first_phase);
    }

    let y = SharedMut::new(y);
    let second_phase = |tokens: Range<usize>, cols: Range<usize>| {
        for token in tokens.clone() {
            let at = token * d_model;
            // SAFETY: these rows and columns are this task's alone.
            let y = unsafe { y.part(at + cols.start..at + cols.end) };
            y.copy_from_slice(&bias[cols.clone()]);
        }
        for piece in &pieces.list {
            let neurons = &parts[piece.part];
            let ids = &index.ids()[piece.group.clone()];
            let first = ids.partition_point(|&id| (id as usize) < tokens.start);
            let end = ids.partition_point(|&id| (id as usize) < tokens.end);
            if first == end {
                continue;
            }
            let rows = piece.rows.len();
            // SAFETY: nobody writes hidden values any more.
            let h = unsafe { hidden.read(piece.hidden + first * rows..piece.hidden + end * rows) };
            Arch::new().dispatch(Accumulate {
                y,
                d: d_model,
                ids: &ids[first..end],
                cols: cols.clone(),
                h,
                w: &neurons.w_out.as_slice()[piece.rows.start * d_model..piece.rows.end * d_model],
            });
        }
    };
    if parallel {
        let threads = rayon::current_num_threads();
        let share = d_model.div_ceil(threads).next_multiple_of(COLUMNS);
        let columns = if num_tokens > FEW_TOKENS { share.min(Y_COLUMNS) } else { share };
        let stripes = d_model.div_ceil(columns);
        let blocks = num_tokens.div_ceil(Y_TOKENS);
        (0..stripes * blocks).into_par_iter().for_each(|task| {
            let (token, col) = (task / stripes * Y_TOKENS, task % stripes * columns);
            second_phase(token..num_tokens.min(token + Y_TOKENS), col..d_model.min(col + columns));
        });
    } else {
        second_phase(0..num_tokens, 0..d_model);
    }
}
