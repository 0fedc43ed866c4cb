//! Routers that learn which experts the loss needs.
//!
//! With a mask m \[T, E\] the routed part of an FFN is Σ m\[t,e\] expert_e(x\[t\]): the loss has the
//! derivative v\[t,e\] = ⟨dL/dy\[t\], expert_e(x\[t\])⟩ by m\[t,e\], whether the expert runs or not.
//! Dynamic-k, m = 1 where q = r/(τ max r) ≥ 1, has no slope. On the way back a ramp of half-width w stands
//! in for it (a straight-through estimator; Bengio et al., arXiv 1308.3432): dL/dq = k (v − λ) with
//! k = max(0, 1 − |q − 1|/w)/w. λ = Σ k v / Σ k is what an expert at the threshold is worth on average.
//! Without it every expert that helps at all would be called for; with it experts take each other's
//! place, and the density stays. What it drifts all the same, τ makes up for.

use crate::convert::adam::Adam;
use crate::convert::router_network::Network;
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{MlpKind, MoeFfn, Router, Selection, SelectionRule};
use crate::tensor::Tensor;

/// w.
const HALF_WIDTH: f32 = 0.5;
/// The part of a batch's τ in the running one.
const NEW_SHARE: f32 = 0.1;

/// A layer's D2DMoE router while it is trained.
pub(super) struct LearningRouter {
    /// Its weights have about the size that they begin with in a router's own training, so that one
    /// learning rate suits every layer.
    network: Network,
    /// What W1 and W2 are to be multiplied with: powers of two, which round nothing.
    scales: [f32; 2],
    dtype: DType,
    optimiser: Adam,
    /// τ.
    rel_threshold: f32,
    max_experts: Option<usize>,
}

/// What the way back needs.
pub(super) struct RouterTrace {
    /// \[T, hidden\].
    inner: Vec<f32>,
    /// ±r \[T, E\].
    output: Vec<f32>,
    /// r \[T, E\].
    pub(super) scores: Vec<f32>,
}

impl LearningRouter {
    /// Nothing for other routers, and where k is not dynamic.
    pub(super) fn new(moe: &MoeFfn) -> Option<Self> {
        let Selection { rule, max_experts } = moe.selection();
        let SelectionRule::DynamicK { rel_threshold } = rule else { return None };
        let Router::Mlp { kind: kind @ MlpKind::D2dMoe, w1, w2 } = moe.router() else {
            return None;
        };
        let mut values = Vec::with_capacity(w1.len() + w2.len());
        let scales = [w1, w2].map(|w| {
            let w_f32 = w.to_f32();
            let square = w_f32.iter().map(|w| w * w).sum::<f32>() / w.len() as f32;
            let scale = (square * w.shape()[1] as f32 / 2.0).sqrt().log2().round().exp2();
            let scale = if scale.is_normal() { scale } else { 1.0 };
            values.extend(w_f32.iter().map(|w| w / scale));
            scale
        });
        let (hidden, num_experts) = (w1.shape()[0], moe.num_experts());
        let optimiser = Adam::new(values.len());
        let network = Network { kind: *kind, d_model: moe.d_model(), hidden, num_experts, values };
        Some(Self { network, scales, dtype: w1.dtype(), optimiser, rel_threshold, max_experts })
    }

    /// The router as it is now.
    pub(super) fn to_router(&self) -> Result<Router> {
        let Network { kind, d_model, hidden, num_experts, .. } = self.network;
        let tensor = |w: &[f32], scale: f32, shape| {
            let w = w.iter().map(|w| w * scale).collect();
            Ok(Tensor::matrix(w, shape)?.to_dtype(self.dtype))
        };
        let w1 = tensor(self.network.w1(), self.scales[0], [hidden, d_model])?;
        let w2 = tensor(self.network.w2(), self.scales[1], [num_experts, hidden])?;
        Ok(Router::Mlp { kind, w1, w2 })
    }

    /// Scores of x \[T, d\], but for a factor.
    pub(super) fn forward(&self, inputs: &[f32]) -> RouterTrace {
        let (inner, output) = self.network.layers(inputs);
        let scores = output.iter().map(|z| z.abs()).collect();
        RouterTrace { inner, output, scores }
    }

    pub(super) fn selection(&self) -> Selection {
        let rule = SelectionRule::DynamicK { rel_threshold: self.rel_threshold };
        Selection { rule, max_experts: self.max_experts }
    }

    /// Moves τ towards that of a batch.
    pub(super) fn follow(&mut self, rel_threshold: f32) {
        self.rel_threshold += NEW_SHARE * (rel_threshold - self.rel_threshold);
    }

    /// The gradient of W1 and W2 for x \[T, d\] and v \[T, E\].
    pub(super) fn backward(&self, inputs: &[f32], trace: &RouterTrace, values: &[f32]) -> Vec<f32> {
        let num_experts = self.network.num_experts;
        let RouterTrace { inner, output, scores } = trace;
        let slopes = self.slopes(scores);
        let worth = worth_at_threshold(&slopes, values);
        let mut d_output = Vec::with_capacity(output.len());
        let parts = slopes.chunks_exact(num_experts).zip(values.chunks_exact(num_experts));
        for (r, (slopes, values)) in scores.chunks_exact(num_experts).zip(parts) {
            let max = max_of(r);
            let row = d_output.len();
            // Where τ is 0, every expert runs and no slope is left.
            let per_score = 1.0 / (self.rel_threshold * max).max(f32::MIN_POSITIVE);
            d_output.extend(slopes.iter().zip(values).map(|(k, v)| k * (v - worth) * per_score));
            let through_max: f32 = d_output[row..].iter().zip(r).map(|(d, r)| d * r / max).sum();
            if let Some(argmax) = r.iter().position(|&r| r == max) {
                d_output[row + argmax] -= through_max;
            }
        }
        d_output.iter_mut().zip(output).for_each(|(d, z)| *d *= 1f32.copysign(*z));
        self.network.gradient(inputs, inner, &d_output)
    }

    /// k \[T, E\].
    fn slopes(&self, scores: &[f32]) -> Vec<f32> {
        let rows = scores.chunks_exact(self.network.num_experts);
        let of_row = |r: &[f32]| {
            let threshold = self.rel_threshold * max_of(r);
            let distance = |r: &f32| (r / threshold - 1.0).abs() / HALF_WIDTH;
            r.iter().map(|r| (1.0 - distance(r)).max(0.0) / HALF_WIDTH).collect::<Vec<_>>()
        };
        rows.flat_map(of_row).collect()
    }

    pub(super) fn step(&mut self, gradient: &[f32], learning_rate: f32) {
        self.optimiser.step(&mut self.network.values, gradient, learning_rate);
    }
}

/// λ.
fn worth_at_threshold(slopes: &[f32], values: &[f32]) -> f32 {
    let total: f32 = slopes.iter().sum();
    if total == 0.0 {
        return 0.0;
    }
    slopes.iter().zip(values).map(|(k, v)| k * v).sum::<f32>() / total
}

fn max_of(scores: &[f32]) -> f32 {
    scores.iter().copied().fold(f32::MIN_POSITIVE, f32::max)
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{assert_gradient, random};
    use super::*;
    use crate::ffn::{Activation, DenseFfn, Partition};

    const D: usize = 5;
    const HIDDEN: usize = 6;
    const EXPERTS: usize = 4;
    const TOKENS: usize = 7;

    fn layer(selection: Selection) -> MoeFfn {
        let matrix = |seed, [rows, cols]: [usize; 2]| {
            Tensor::matrix(random(seed, rows * cols), [rows, cols]).unwrap()
        };
        let (w_in, w_out) = (matrix(0, [EXPERTS, D]), matrix(1, [EXPERTS, D]));
        let gelu = Activation::Gelu;
        let neurons = DenseFfn::from_neuron_major(gelu, false, w_in, None, w_out, None).unwrap();
        let partition = Partition::new(EXPERTS, vec![0, 1, 2, 3]).unwrap();
        let (w1, w2) = (matrix(2, [HIDDEN, D]), matrix(3, [EXPERTS, HIDDEN]));
        let router = Router::Mlp { kind: MlpKind::D2dMoe, w1, w2 };
        MoeFfn::from_expert_order(neurons, partition, router, selection).unwrap()
    }

    /// The integral of k, from 0 far below the threshold to 1 far above.
    fn ramp(q: f32) -> f32 {
        let s = ((q - 1.0) / HALF_WIDTH).clamp(-1.0, 1.0);
        if s < 0.0 { (1.0 + s).powi(2) / 2.0 } else { 1.0 - (1.0 - s).powi(2) / 2.0 }
    }

    #[test]
    fn gradient_is_that_of_finite_differences_of_the_ramp() {
        let mut router = LearningRouter::new(&layer(Selection::dynamic_k(0.5))).unwrap();
        let (inputs, values) = (random(4, TOKENS * D), random(5, TOKENS * EXPERTS));
        let trace = router.forward(&inputs);
        let gradient = router.backward(&inputs, &trace, &values);
        let worth = worth_at_threshold(&router.slopes(&trace.scores), &values);
        let at = router.network.values.clone();
        assert_gradient(&at, &gradient, |weights| {
            router.network.values.copy_from_slice(weights);
            let scores = router.forward(&inputs).scores;
            let rows = scores.chunks_exact(EXPERTS).zip(values.chunks_exact(EXPERTS));
            let of_row = |(r, v): (&[f32], &[f32])| -> f64 {
                let threshold = 0.5 * max_of(r);
                r.iter().zip(v).map(|(r, v)| f64::from(ramp(r / threshold) * (v - worth))).sum()
            };
            rows.map(of_row).sum()
        });
    }

    #[test]
    fn experts_of_equal_worth_stay() {
        let router = LearningRouter::new(&layer(Selection::dynamic_k(0.5))).unwrap();
        let (inputs, values) = (random(4, TOKENS * D), [-1.0; TOKENS * EXPERTS]);
        let gradient = router.backward(&inputs, &router.forward(&inputs), &values);
        assert!(gradient.iter().all(|g| g.abs() < 1e-5));
    }

    #[test]
    fn the_threshold_follows_slowly() {
        let mut router = LearningRouter::new(&layer(Selection::dynamic_k(0.5))).unwrap();
        router.follow(1.0);
        assert_eq!(router.selection(), Selection::dynamic_k(0.5 + 0.5 * NEW_SHARE));
    }

    #[test]
    fn untrained_weights_come_back_as_they_were() {
        let moe = layer(Selection::dynamic_k(0.5));
        let router = LearningRouter::new(&moe).unwrap();
        assert_eq!(router.to_router().unwrap(), *moe.router());
        assert!(LearningRouter::new(&layer(Selection::top_k(2))).is_none());
    }

    #[test]
    fn without_a_threshold_nothing_is_learned() {
        let router = LearningRouter::new(&layer(Selection::dynamic_k(0.0))).unwrap();
        let inputs = random(4, TOKENS * D);
        let values = random(5, TOKENS * EXPERTS);
        let gradient = router.backward(&inputs, &router.forward(&inputs), &values);
        assert!(gradient.iter().all(|g| *g == 0.0));
    }
}
