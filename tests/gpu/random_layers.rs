//! Layers with random weights, what they should give, and how far off it may be.

use moefy::ffn::{
    self, Activation, Compensation, DenseFfn, ExpertMask, Partition, Router, Selection,
};
use moefy::{DType, Tensor, reference};
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::harness::uniform;

/// The sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub d_model: usize,
    pub num_experts: usize,
    pub expert_width: usize,
    pub shared: usize,
    pub rank: usize,
    pub glu: bool,
}

/// A layer of this shape with random weights, and everything else drawn as well.
pub fn random_layer(rng: &mut ChaCha8Rng, shape: Shape, dtype: DType) -> ffn::MoeFfn {
    let activation = *Activation::ALL.choose(rng).expect("there are some");
    let biased = rng.random_bool(0.7);
    let layer = biased_layer(rng, shape, dtype, activation, biased);
    if shape.rank > 0 || rng.random_bool(0.7) {
        return layer;
    }
    let mean = uniform(rng, layer.d_ff()).into_iter().map(|v| v * 0.2).collect();
    let mean = Tensor::matrix(mean, [1, layer.d_ff()]).expect("sizes fit").to_dtype(dtype);
    layer.with_compensation(Compensation::Mean { mean }).expect("shapes fit")
}

/// A layer without means.
pub fn biased_layer(
    rng: &mut ChaCha8Rng,
    shape: Shape,
    dtype: DType,
    activation: Activation,
    biased: bool,
) -> ffn::MoeFfn {
    let Shape { d_model, num_experts, expert_width, shared, rank, glu } = shape;
    let d_ff = num_experts * expert_width + shared;
    let inputs = if glu { 2 * d_ff } else { d_ff };
    let mut draw = |rows: usize, cols: usize, scale: f32| {
        let values = uniform(rng, rows * cols).into_iter().map(|v| v * scale).collect::<Vec<f32>>();
        Tensor::matrix(values, [rows, cols]).expect("sizes fit").to_dtype(dtype)
    };
    let w_in = draw(inputs, d_model, (3.0 / d_model as f32).sqrt());
    let w_out = draw(d_ff, d_model, (3.0 / d_ff as f32).sqrt());
    let (b_in, b_out) = (draw(1, inputs, 0.5), draw(1, d_model, 0.5));
    let (u, v, c) = (draw(rank, d_model, 0.1), draw(rank, d_model, 0.1), draw(1, d_model, 0.2));
    let w = draw(num_experts, d_model, 1.0);
    let neurons = DenseFfn::from_neuron_major(
        activation,
        glu,
        w_in,
        biased.then_some(b_in),
        w_out,
        biased.then_some(b_out),
    );
    let labels = (0..d_ff).map(|n| (n / expert_width).min(num_experts) as u32).collect();
    let layer = ffn::MoeFfn::from_expert_order(
        neurons.expect("shapes fit"),
        Partition::new(num_experts, labels).expect("labels fit"),
        Router::Linear { w },
        Selection::dynamic_k(0.5),
    );
    let layer = layer.expect("sizes fit");
    if rank > 0 {
        return layer.with_compensation(Compensation::Linear { u, v, c }).expect("shapes fit");
    }
    layer
}

pub fn tokens(rng: &mut ChaCha8Rng, num_tokens: usize, d_model: usize, dtype: DType) -> Tensor {
    let values = uniform(rng, num_tokens * d_model);
    Tensor::matrix(values, [num_tokens, d_model]).expect("sizes fit").to_dtype(dtype)
}

/// The reference, several tokens at a time.
pub fn expected(
    layer: &ffn::MoeFfn,
    x: &Tensor,
    mask: &ExpertMask,
    scores: Option<&[f32]>,
) -> Vec<f64> {
    let (d_model, num_experts) = (layer.d_model(), layer.num_experts());
    let x = x.to_f64();
    let scores: Option<Vec<f64>> = scores.map(|s| s.iter().map(|&r| f64::from(r)).collect());
    let per_task = mask.num_tokens().div_ceil(16).max(1);
    let tasks: Vec<usize> = (0..mask.num_tokens()).step_by(per_task).collect();
    let of_task = |&first: &usize| {
        let rows = first..(first + per_task).min(mask.num_tokens());
        let words = rows.clone().flat_map(|token| mask.row(token).to_vec()).collect();
        let mask = ExpertMask::from_words(rows.len(), num_experts, words).expect("rows of a mask");
        let scores = scores.as_ref().map(|s| &s[rows.start * num_experts..rows.end * num_experts]);
        reference::experts(layer, &x[rows.start * d_model..rows.end * d_model], &mask, scores)
    };
    tasks.par_iter().flat_map_iter(of_task).collect()
}

/// The bar for ‖out − ref‖ / ‖ref‖.
pub fn tolerance(layer: &ffn::MoeFfn, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-6 * (layer.d_model().max(layer.d_ff()) as f64 / 64.0).sqrt(),
        DType::F16 => 1e-3,
        DType::BF16 => 6e-3,
    }
}
