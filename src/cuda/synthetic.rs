//! Layers, tokens and routing made of random numbers, for benchmarks and checks.

use std::sync::Arc;

use half::{bf16, f16};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::LayerShape;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::ffn::{self, DenseFfn, ExpertMask, MlpKind, Partition, Router, Selection};
use crate::tensor::Tensor;

impl LayerShape {
    /// Neurons of an expert.
    ///
    /// # Errors
    /// When the experts cannot share the neurons equally, or a size is one that no layer on a device has.
    pub fn expert_width(&self) -> Result<usize> {
        if self.d_model == 0 || !self.d_model.is_multiple_of(8) {
            let expected = "a positive multiple of 8";
            return Err(Error::argument("layer", "d_model", expected, self.d_model));
        }
        Partition::width_of_experts(self.d_ff, self.num_experts, self.shared)
    }

    /// Draws a layer with random weights. A plain one has biases, a GLU none, as in most models; a router of two layers is a
    /// D2DMoE router.
    ///
    /// # Errors
    /// When the sizes do not fit together, or it should have a compensation.
    pub(super) fn draw(&self) -> Result<ffn::MoeFfn> {
        let Self { d_model, d_ff, glu, activation, num_experts, dtype, .. } = *self;
        let width = self.expert_width()?;
        if self.rank > 0 {
            return Err(Error::argument("layer", "rank", "0: none is drawn", self.rank));
        }
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        let scale = |depth: usize| (3.0 / depth as f32).sqrt();
        let inputs = if glu { 2 * d_ff } else { d_ff };
        let w_in = random(rng, [inputs, d_model], scale(d_model), dtype);
        let w_out = random(rng, [d_ff, d_model], scale(d_ff), dtype);
        let biases = (!glu)
            .then(|| [random(rng, [1, inputs], 0.5, dtype), random(rng, [1, d_model], 0.5, dtype)]);
        let [b_in, b_out] = biases.map_or([None, None], |biases| biases.map(Some));
        let neurons = DenseFfn::from_neuron_major(activation, glu, w_in, b_in, w_out, b_out)?;
        let router = match self.router_hidden {
            0 => Router::Linear { w: random(rng, [num_experts, d_model], scale(d_model), dtype) },
            hidden => Router::Mlp {
                kind: MlpKind::D2dMoe,
                w1: random(rng, [hidden, d_model], scale(d_model), dtype),
                w2: random(rng, [num_experts, hidden], scale(hidden), dtype),
            },
        };
        let labels = (0..d_ff).map(|n| (n / width).min(num_experts) as u32).collect();
        let partition = Partition::new(num_experts, labels)?;
        ffn::MoeFfn::from_expert_order(neurons, partition, router, IMPOSED)
    }
}

/// Which experts the tokens run. It is imposed through the scores that selection reads, after the
/// router has run.
#[derive(Clone, Debug)]
pub enum Routing {
    /// Independent random experts, as many for each token as make the density exact.
    Random {
        /// Executed share of the routed neurons. Every token runs at least one expert.
        density: f64,
    },
    /// As many independent random experts for every token, which the layer selects by top-k; by a threshold otherwise.
    TopK {
        /// k.
        k: usize,
    },
    /// Masks that were recorded.
    Trace {
        /// What to call it.
        name: String,
        /// Consecutive rows are used, from the beginning again at the end.
        masks: Arc<ExpertMask>,
    },
}

impl Routing {
    /// Turns imposed scores into masks.
    pub(super) fn selection(&self) -> Selection {
        match *self {
            Self::TopK { k } => Selection::top_k(k),
            _ => IMPOSED,
        }
    }

    /// The masks of `num_tokens` tokens from the `first` on.
    ///
    /// # Errors
    /// When a trace is of another number of experts, or empty.
    pub(super) fn draw(
        &self,
        rng: &mut ChaCha8Rng,
        first: usize,
        num_tokens: usize,
        num_experts: usize,
    ) -> Result<ExpertMask> {
        let mut mask = ExpertMask::none(num_tokens, num_experts);
        match self {
            Self::Trace { name, masks } => {
                if masks.num_experts() != num_experts || masks.num_tokens() == 0 {
                    let expected = format!("masks of {num_experts} experts for at least 1 token");
                    let got = format!("{} for {}", masks.num_experts(), masks.num_tokens());
                    return Err(Error::argument("bench", format!("trace:{name}"), expected, got));
                }
                for token in 0..num_tokens {
                    let row = (first + token) % masks.num_tokens();
                    masks.experts(row).for_each(|expert| mask.insert(token, expert));
                    if mask.count(token) == 0 {
                        // Selection by a threshold runs one at least.
                        mask.insert(token, 0);
                    }
                }
            }
            Self::Random { density } => {
                let k = density.clamp(0.0, 1.0) * num_experts as f64;
                // Floor and ceiling mixed so that the mean is k.
                let upto = |token: usize| (token as f64 * k + 0.5).floor() as usize;
                let count = |token| upto(first + token + 1) - upto(first + token);
                insert_random(rng, &mut mask, |token| count(token).clamp(1, num_experts));
            }
            Self::TopK { k } => insert_random(rng, &mut mask, |_| (*k).min(num_experts)),
        }
        Ok(mask)
    }
}

/// Draws so many experts for each token.
fn insert_random(rng: &mut ChaCha8Rng, mask: &mut ExpertMask, count: impl Fn(usize) -> usize) {
    let mut experts: Vec<usize> = (0..mask.num_experts()).collect();
    for token in 0..mask.num_tokens() {
        let (chosen, _) = experts.partial_shuffle(rng, count(token));
        chosen.iter().for_each(|&expert| mask.insert(token, expert));
    }
}

/// Turns imposed scores into masks, but for top-k.
pub(super) const IMPOSED: Selection = Selection::dynamic_k(0.5);

/// Scores that [`Routing::selection`] turns into these masks: 1 and a little for a selected expert, 0 for the others.
pub(super) fn imposed_scores(mask: &ExpertMask) -> Vec<f32> {
    let mut scores = vec![0.0; mask.num_tokens() * mask.num_experts()];
    for (token, row) in scores.chunks_exact_mut(mask.num_experts()).enumerate() {
        mask.experts(token).for_each(|expert| row[expert] = 1.0 + f32::EPSILON * expert as f32);
    }
    scores
}

/// Uniform values in −scale..scale.
pub(super) fn random(rng: &mut ChaCha8Rng, shape: [usize; 2], scale: f32, dtype: DType) -> Tensor {
    let (seed, len) = (rng.random(), shape[0] * shape[1]);
    match dtype {
        DType::F32 => (shape, uniform::<f32>(seed, len, scale)).into(),
        DType::F16 => (shape, uniform::<f16>(seed, len, scale)).into(),
        DType::BF16 => (shape, uniform::<bf16>(seed, len, scale)).into(),
    }
}

/// The same values for any number of threads.
fn uniform<E: Element>(seed: u64, len: usize, scale: f32) -> Vec<E> {
    let mut values = vec![E::zeroed(); len];
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, values)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(chunk as u64);
        values.fill_with(|| E::from_f32(rng.random_range(-scale..scale)));
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_masks_have_exactly_the_density_that_was_asked_for() {
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        let routing = Routing::Random { density: 0.1 };
        let masks = (0..5).map(|set| routing.draw(rng, 2 * set, 2, 96).unwrap());
        let pairs: Vec<usize> = masks.map(|mask| mask.num_pairs()).collect();
        assert_eq!(pairs.iter().sum::<usize>(), 96);
        assert!(pairs.iter().all(|k| (19..=20).contains(k)), "{pairs:?}");
        let full = Routing::Random { density: 1.0 }.draw(rng, 0, 3, 40).unwrap();
        assert_eq!(full, ExpertMask::all(3, 40));
        let least = Routing::Random { density: 0.0 }.draw(rng, 0, 3, 40).unwrap();
        assert_eq!(least.num_pairs(), 3);
    }

    #[test]
    fn traces_go_on_from_the_beginning() {
        let mut masks = ExpertMask::none(3, 5);
        (0..3).for_each(|token| masks.insert(token, token));
        let routing = Routing::Trace { name: "t".into(), masks: Arc::new(masks) };
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        let drawn = routing.draw(rng, 4, 4, 5).unwrap();
        let experts: Vec<usize> =
            (0..4).flat_map(|t| drawn.experts(t).collect::<Vec<_>>()).collect();
        assert_eq!(experts, [1, 2, 0, 1]);
        assert!(routing.draw(rng, 0, 1, 6).unwrap_err().to_string().contains("trace:t"));
    }

    #[test]
    fn imposed_scores_select_their_masks() {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        for routing in [Routing::Random { density: 0.3 }, Routing::TopK { k: 13 }] {
            let mask = routing.draw(rng, 0, 7, 129).unwrap();
            let scores = imposed_scores(&mask);
            let selected = crate::reference::select(&routing.selection(), &scores, 129);
            assert_eq!(selected.mask, mask);
        }
    }
}
