//! Routers on the CPU.

use pulp::Arch;
use rayon::prelude::*;

use super::activation::{map, sigmoid, tanh};
use super::buffer::Buffer;
use super::kernels::Products;
use super::neurons::WORTH_A_THREAD;
use super::tokens_of;
use crate::error::Result;
use crate::ffn::{self, MlpKind};

/// Tokens of one task, at most.
const TASK_TOKENS: usize = 96;

/// A router with f32 weights: one or two matrices, and what happens around them.
#[derive(Clone, Debug)]
pub struct Router {
    d_model: usize,
    /// \[hidden, d_model\] and \[E, hidden\], or \[E, d_model\] alone.
    hidden: Option<(MlpKind, usize, Buffer)>,
    output: Buffer,
    unit_input: bool,
    finish: Finish,
}

#[derive(Clone, Copy, Debug)]
enum Finish {
    Magnitude,
    Sigmoid,
    Positive,
}

impl Router {
    pub fn new(router: &ffn::Router, d_model: usize) -> Self {
        let (hidden, output, unit_input, finish) = match router {
            ffn::Router::Linear { w } => {
                (None, Buffer::copy_of(&w.to_f32()), false, Finish::Magnitude)
            }
            ffn::Router::Mlp { kind, w1, w2 } => {
                let (unit_input, finish) = match kind {
                    MlpKind::D2dMoe => (false, Finish::Magnitude),
                    MlpKind::Moefication => (true, Finish::Sigmoid),
                };
                let hidden = (*kind, w1.shape()[0], Buffer::copy_of(&w1.to_f32()));
                (Some(hidden), Buffer::copy_of(&w2.to_f32()), unit_input, finish)
            }
            ffn::Router::Centroid { centroids } => {
                let mut units = centroids.to_f32().into_owned();
                units.chunks_exact_mut(d_model).for_each(|c| scale(c, inverse_norm(c)));
                (None, Buffer::copy_of(&units), true, Finish::Positive)
            }
        };
        Self { d_model, hidden, output, unit_input, finish }
    }

    pub fn bytes(&self) -> usize {
        self.output.bytes() + self.hidden.as_ref().map_or(0, |(_, _, w)| w.bytes())
    }

    /// x \[T, d_model\] → r \[T, E\]; `ids` holds 0..T, `scratch` is for hidden values.
    pub fn scores(&self, x: &[f32], ids: &[u32], scratch: &mut Buffer, scores: &mut [f32]) {
        // The length of x only scales what the first matrix gives.
        let unit = |token: usize, z: &mut [f32]| {
            if self.unit_input {
                scale(z, inverse_norm(&x[token * self.d_model..][..self.d_model]));
            }
        };
        let finish = |z: &mut [f32]| match self.finish {
            Finish::Magnitude => map(z, f32::abs),
            Finish::Sigmoid => map(z, sigmoid),
            Finish::Positive => map(z, |z| z.max(0.0)),
        };
        match &self.hidden {
            None => layer(x, self.d_model, ids, &self.output, scores, |token, z| {
                unit(token, z);
                finish(z);
            }),
            Some((kind, width, w)) => {
                let hidden = scratch.first(ids.len() * width);
                layer(x, self.d_model, ids, w, hidden, |token, z| {
                    unit(token, z);
                    match kind {
                        MlpKind::D2dMoe => map(z, |z| z.max(0.0)),
                        MlpKind::Moefication => map(z, tanh),
                    }
                });
                layer(hidden, *width, ids, &self.output, scores, |_, z| finish(z));
            }
        }
    }
}

/// The scores r \[T, E\] of x \[T, d_model\], without an FFN around the router.
///
/// # Errors
/// When x is not whole tokens, or the router's weights are not for tokens of this width or not finite.
pub fn router_scores(router: &ffn::Router, x: &[f32], d_model: usize) -> Result<Vec<f32>> {
    let num_tokens = tokens_of("router_scores", x, d_model)?;
    let num_experts = router.num_experts();
    router.check(num_experts, d_model)?;
    let router = Router::new(router, d_model);
    let ids: Vec<u32> = (0..num_tokens as u32).collect();
    let mut scores = vec![0.0; num_tokens * num_experts];
    if num_tokens > 0 {
        router.scores(x, &ids, &mut Buffer::default(), &mut scores);
    }
    Ok(scores)
}

/// z \[T, rows\] = x · wᵀ, and `finish` on every row of z, or on parts of the only one.
fn layer(
    x: &[f32],
    d: usize,
    ids: &[u32],
    w: &Buffer,
    z: &mut [f32],
    finish: impl Fn(usize, &mut [f32]) + Sync,
) {
    let num_rows = z.len() / ids.len();
    let task = |ids: &[u32], row: usize, z: &mut [f32]| {
        let rows = z.len() / ids.len();
        z.fill(0.0);
        let w = &w.as_slice()[row * d..(row + rows) * d];
        Arch::new().dispatch(Products { x, d, ids, w, z: &mut *z });
        for (&token, z) in ids.iter().zip(z.chunks_exact_mut(rows)) {
            finish(token as usize, z);
        }
    };
    let threads = rayon::current_num_threads();
    if threads == 1 || ids.len() * num_rows * d < WORTH_A_THREAD {
        task(ids, 0, z);
    } else if ids.len() == 1 {
        let rows = num_rows.div_ceil(threads);
        z.par_chunks_mut(rows).enumerate().for_each(|(i, z)| task(ids, i * rows, z));
    } else {
        let tokens = ids.len().div_ceil(threads).min(TASK_TOKENS);
        z.par_chunks_mut(tokens * num_rows)
            .zip(ids.par_chunks(tokens))
            .for_each(|(z, ids)| task(ids, 0, z));
    }
}

/// 1/‖x‖, or 0 for the zero vector; of the shortest vectors it is no f32.
fn inverse_norm(x: &[f32]) -> f64 {
    let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    if square > 0.0 { square.sqrt().recip() } else { 0.0 }
}

fn scale(values: &mut [f32], factor: f64) {
    values.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
}
