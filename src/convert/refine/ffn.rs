//! The weights of a MoEfied FFN as something to be trained.

use rayon::prelude::*;

use super::router::{LearningRouter, RouterTrace};
use crate::convert::adam::Adam;
use crate::convert::options::check_refinable;
use crate::cpu::{self, Matrix, MatrixMut, activate, activate_with_slope, gemm, linear};
use crate::error::Result;
use crate::ffn::{Activation, Compensation, DenseFfn, ExpertMask, MoeFfn};
use crate::tensor::Tensor;

/// What is trained besides the router, or its gradient: all of it in expert order.
#[derive(Clone)]
pub(super) struct Weights {
    /// W1 \[F, d\].
    pub(super) w_in: Vec<f32>,
    /// b1 \[F\].
    pub(super) b_in: Vec<f32>,
    /// W2ᵀ \[F, d\].
    pub(super) w_out: Vec<f32>,
    /// b2, or what a linear compensation adds to it, \[d\].
    pub(super) bias: Vec<f32>,
    /// Uᵀ \[rank, d\] of a linear compensation.
    pub(super) u: Vec<f32>,
    /// V \[rank, d\].
    pub(super) v: Vec<f32>,
}

impl Weights {
    pub(super) fn arrays(&self) -> [&Vec<f32>; 6] {
        [&self.w_in, &self.b_in, &self.w_out, &self.bias, &self.u, &self.v]
    }

    pub(super) fn arrays_mut(&mut self) -> [&mut Vec<f32>; 6] {
        let Self { w_in, b_in, w_out, bias, u, v } = self;
        [w_in, b_in, w_out, bias, u, v]
    }
}

/// A layer's FFN while it is trained.
pub(super) struct Trained {
    pub(super) weights: Weights,
    moe: MoeFfn,
    /// b2 where `bias` is a compensation's, zeros otherwise.
    fixed_bias: Vec<f32>,
    rank: usize,
    optimisers: Vec<Adam>,
    pub(super) router: Option<LearningRouter>,
}

/// What a step changes.
pub(super) struct Gradients {
    weights: Weights,
    router: Option<Vec<f32>>,
}

/// What the way back needs.
pub(super) struct Trace {
    /// \[T, d\].
    inputs: Vec<f32>,
    /// φ(z) \[T, F\], zero where the expert is skipped.
    hidden: Vec<f32>,
    /// φ′(z) \[T, F\], zero where the expert is skipped.
    slope: Vec<f32>,
    /// V x \[T, rank\].
    low: Vec<f32>,
    /// φ(z) \[T, F\] of every expert, where the router learns.
    hidden_of_all: Vec<f32>,
    pub(super) router: Option<RouterTrace>,
}

impl Trained {
    /// # Errors
    /// For a GLU, a mean compensation, and gates.
    pub(super) fn new(moe: MoeFfn) -> Result<Self> {
        let neurons = moe.neurons();
        let has_mean = matches!(moe.compensation(), Some(Compensation::Mean { .. }));
        check_refinable(neurons.is_glu(), has_mean, moe.gate())?;
        let values = |tensor: Option<&Tensor>, len: usize| {
            tensor.map_or_else(|| vec![0.0; len], |tensor| tensor.to_f32().into_owned())
        };
        let b_out = values(neurons.b_out(), moe.d_model());
        let (fixed_bias, bias, u, v) = match moe.compensation() {
            Some(Compensation::Linear { u, v, c }) => {
                let [u, v, c] = [u, v, c].map(|tensor| tensor.to_f32().into_owned());
                (b_out, c, u, v)
            }
            _ => (vec![0.0; moe.d_model()], b_out, Vec::new(), Vec::new()),
        };
        let weights = Weights {
            w_in: neurons.w_in().to_f32().into_owned(),
            b_in: values(neurons.b_in(), moe.d_ff()),
            w_out: neurons.w_out().to_f32().into_owned(),
            bias,
            u,
            v,
        };
        let rank = weights.u.len() / moe.d_model();
        let optimisers = weights.arrays().map(|array| Adam::new(array.len())).into();
        let router = LearningRouter::new(&moe);
        Ok(Self { weights, fixed_bias, rank, optimisers, router, moe })
    }

    pub(super) fn moe(&self) -> &MoeFfn {
        &self.moe
    }

    /// The layer with its weights as they are now, in the format that it came in.
    pub(super) fn to_moe(&self) -> Result<MoeFfn> {
        let old = self.moe.neurons();
        let (d, dtype) = (self.moe.d_model(), old.dtype());
        let matrix = |values: &[f32]| {
            Ok(Tensor::matrix(values.to_vec(), [values.len() / d, d])?.to_dtype(dtype))
        };
        let vector = |values: &[f32]| Tensor::vector(values.to_vec()).to_dtype(dtype);
        let Weights { w_in, b_in, w_out, bias, u, v } = &self.weights;
        let compensation = match self.moe.compensation() {
            None => None,
            Some(_) => Some(Compensation::Linear { u: matrix(u)?, v: matrix(v)?, c: vector(bias) }),
        };
        let b_out = if compensation.is_some() { &self.fixed_bias } else { bias };
        let neurons = DenseFfn::from_neuron_major(
            old.activation(),
            false,
            matrix(w_in)?,
            Some(vector(b_in)),
            matrix(w_out)?,
            Some(vector(b_out)),
        )?;
        let partition = self.moe.partition().clone();
        let router = match &self.router {
            Some(router) => router.to_router()?,
            None => self.moe.router().clone(),
        };
        let moe = MoeFfn::from_expert_order(neurons, partition, router, self.moe.selection())?;
        match compensation {
            Some(compensation) => moe.with_compensation(compensation),
            None => Ok(moe),
        }
    }

    /// x + FFN(x) with the experts that the router selects.
    pub(super) fn forward(&self, inputs: Vec<f32>) -> Result<(Vec<f32>, Trace)> {
        let (d, num_experts) = (self.moe.d_model(), self.moe.num_experts());
        let mut mask = ExpertMask::none(inputs.len() / d, num_experts);
        let router = match &self.router {
            Some(router) => {
                let trace = router.forward(&inputs);
                cpu::select(&router.selection(), &trace.scores, &mut mask);
                Some(trace)
            }
            None => {
                let scores = cpu::router_scores(self.moe.router(), &inputs, d)?;
                cpu::select(&self.moe.selection(), &scores, &mut mask);
                None
            }
        };
        let (sums, trace) = self.forward_selected(inputs, &mask);
        Ok((sums, Trace { router, ..trace }))
    }

    /// x + FFN(x) with the experts of `mask`.
    fn forward_selected(&self, inputs: Vec<f32>, mask: &ExpertMask) -> (Vec<f32>, Trace) {
        let Weights { w_in, b_in, w_out, bias, u, v } = &self.weights;
        let (d, d_ff, rank) = (self.moe.d_model(), self.moe.d_ff(), self.rank);
        let tokens = inputs.len() / d;
        let mut hidden = vec![0.0; tokens * d_ff];
        linear(&mut hidden, &inputs, w_in, Some(b_in), d, d_ff);
        let mut slope = vec![0.0; tokens * d_ff];
        let (activation, width) = (self.moe.neurons().activation(), self.moe.expert_width());
        let mut hidden_of_all = Vec::new();
        if self.router.is_some() {
            hidden_of_all.clone_from(&hidden);
            hidden_of_all.par_chunks_exact_mut(d_ff).for_each(|z| activate(activation, z));
        }
        hidden
            .par_chunks_exact_mut(d_ff)
            .zip(slope.par_chunks_exact_mut(d_ff))
            .enumerate()
            .for_each(|(token, (hidden, slope))| {
                activate_selected(activation, hidden, slope, mask, token, width)
            });

        let mut sums = inputs.clone();
        for sum in sums.chunks_exact_mut(d) {
            let biases = bias.iter().zip(&self.fixed_bias);
            sum.iter_mut().zip(biases).for_each(|(sum, (a, b))| *sum += a + b);
        }
        let outputs = |sums: &mut Vec<f32>, h: &[f32], w: &[f32], cols: usize| {
            let (h, w) = (Matrix::new(h, [tokens, cols]), Matrix::new(w, [cols, d]));
            gemm(1.0, h, w, 1.0, MatrixMut::new(sums, [tokens, d]));
        };
        outputs(&mut sums, &hidden, w_out, d_ff);
        let mut low = vec![0.0; tokens * rank];
        if rank > 0 {
            linear(&mut low, &inputs, v, None, d, rank);
            outputs(&mut sums, &low, u, rank);
        }
        (sums, Trace { inputs, hidden, slope, low, hidden_of_all, router: None })
    }

    /// The gradients, and dL/dx from dL/d(x + FFN(x)), which it takes the place of.
    pub(super) fn backward(&self, gradient: &mut [f32], trace: &Trace) -> Gradients {
        let Weights { w_in, w_out, u, v, .. } = &self.weights;
        let (d, d_ff, rank) = (self.moe.d_model(), self.moe.d_ff(), self.rank);
        let tokens = gradient.len() / d;
        let zeros = |like: &Vec<f32>| vec![0.0; like.len()];
        let mut weights = Weights {
            w_in: zeros(w_in),
            b_in: Vec::new(),
            w_out: zeros(w_out),
            bias: column_sums(gradient, d),
            u: zeros(u),
            v: zeros(v),
        };
        let out = gradient.to_vec();
        let mut values = Vec::new();
        // Through one pair of matrices: y = a · w_out, a = act(x · w_inᵀ).
        let mut through = |inner: &[f32],
                           slope: Option<&[f32]>,
                           cols: usize,
                           [w_in, w_out]: [&[f32]; 2],
                           [d_w_in, d_w_out]: [&mut [f32]; 2],
                           gradient: &mut [f32]|
         -> Vec<f32> {
            let y = Matrix::new(&out, [tokens, d]);
            let inner = Matrix::new(inner, [tokens, cols]);
            gemm(1.0, inner.transposed(), y, 0.0, MatrixMut::new(d_w_out, [cols, d]));
            let mut d_inner = vec![0.0; tokens * cols];
            let w_out = Matrix::new(w_out, [cols, d]);
            gemm(1.0, y, w_out.transposed(), 0.0, MatrixMut::new(&mut d_inner, [tokens, cols]));
            if let Some(slope) = slope {
                values = self.values(&d_inner, &trace.hidden_of_all);
                d_inner.par_iter_mut().zip(slope).for_each(|(d, slope)| *d *= slope);
            }
            let z = Matrix::new(&d_inner, [tokens, cols]);
            let x = Matrix::new(&trace.inputs, [tokens, d]);
            gemm(1.0, z.transposed(), x, 0.0, MatrixMut::new(d_w_in, [cols, d]));
            let w_in = Matrix::new(w_in, [cols, d]);
            gemm(1.0, z, w_in, 1.0, MatrixMut::new(gradient, [tokens, d]));
            d_inner
        };
        let Weights { w_in: d_w_in, w_out: d_w_out, u: d_u, v: d_v, .. } = &mut weights;
        let d_hidden = through(
            &trace.hidden,
            Some(&trace.slope),
            d_ff,
            [w_in, w_out],
            [d_w_in, d_w_out],
            gradient,
        );
        if rank > 0 {
            through(&trace.low, None, rank, [v, u], [d_v, d_u], gradient);
        }
        weights.b_in = column_sums(&d_hidden, d_ff);
        let router = self.router.as_ref().zip(trace.router.as_ref());
        let router =
            router.map(|(router, learned)| router.backward(&trace.inputs, learned, &values));
        Gradients { weights, router }
    }

    /// What the loss changes by with every expert that runs, ⟨dL/dy, expert_e(x)⟩ \[T, E\], from dL/dh
    /// and h of all neurons \[T, F\].
    fn values(&self, d_hidden: &[f32], hidden: &[f32]) -> Vec<f32> {
        let (d_ff, width, num_experts) =
            (self.moe.d_ff(), self.moe.expert_width(), self.moe.num_experts());
        let tokens = d_hidden.par_chunks_exact(d_ff).zip(hidden.par_chunks_exact(d_ff));
        let of_token = |(d, h): (&[f32], &[f32])| -> Vec<f32> {
            let experts = d.chunks_exact(width).zip(h.chunks_exact(width)).take(num_experts);
            experts.map(|(d, h)| d.iter().zip(h).map(|(d, h)| d * h).sum()).collect()
        };
        tokens.flat_map_iter(of_token).collect()
    }

    pub(super) fn step(&mut self, gradients: &Gradients, learning_rate: f32) {
        let arrays = self.weights.arrays_mut().into_iter().zip(gradients.weights.arrays());
        for ((values, gradient), optimiser) in arrays.zip(&mut self.optimisers) {
            optimiser.step(values, gradient, learning_rate);
        }
        if let (Some(router), Some(gradient)) = (&mut self.router, &gradients.router) {
            router.step(gradient, learning_rate);
        }
    }
}

/// φ and φ′ of the neurons that a token runs; zeros for the others.
fn activate_selected(
    activation: Activation,
    hidden: &mut [f32],
    slope: &mut [f32],
    mask: &ExpertMask,
    token: usize,
    width: usize,
) {
    let routed = mask.num_experts() * width;
    let experts =
        hidden[..routed].chunks_exact_mut(width).zip(slope[..routed].chunks_exact_mut(width));
    for (expert, (hidden, slope)) in experts.enumerate() {
        if mask.contains(token, expert) {
            activate_with_slope(activation, hidden, slope);
        } else {
            hidden.fill(0.0);
        }
    }
    activate_with_slope(activation, &mut hidden[routed..], &mut slope[routed..]);
}

/// \[cols\], summed row after row.
fn column_sums(matrix: &[f32], cols: usize) -> Vec<f32> {
    let mut sums = vec![0.0; cols];
    for row in matrix.chunks_exact(cols) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{assert_gradient, dot, random};
    use super::*;
    use crate::ffn::{MlpKind, Partition, Router, Selection};

    const D: usize = 5;
    const TOKENS: usize = 4;
    const RANK: usize = 2;

    /// Three experts of two neurons and two shared ones.
    fn layer(activation: Activation, compensated: bool) -> MoeFfn {
        let matrix = |seed, rows| Tensor::matrix(random(seed, rows * D), [rows, D]).unwrap();
        let vector = |seed, len| Tensor::vector(random(seed, len));
        let neurons = DenseFfn::from_neuron_major(
            activation,
            false,
            matrix(0, 8),
            Some(vector(1, 8)),
            matrix(2, 8),
            Some(vector(3, D)),
        );
        let partition = Partition::new(3, vec![0, 0, 1, 1, 2, 2, 3, 3]).unwrap();
        let (kind, w2) = (MlpKind::D2dMoe, Tensor::matrix(random(10, 3 * 4), [3, 4]).unwrap());
        let router = Router::Mlp { kind, w1: matrix(4, 4), w2 };
        let rule = Selection::dynamic_k(0.5);
        let moe = MoeFfn::from_expert_order(neurons.unwrap(), partition, router, rule).unwrap();
        if !compensated {
            return moe;
        }
        let [u, v, c] = [matrix(5, RANK), matrix(6, RANK), vector(7, D)];
        moe.with_compensation(Compensation::Linear { u, v, c }).unwrap()
    }

    fn mask() -> ExpertMask {
        let mut mask = ExpertMask::none(TOKENS, 3);
        for (token, expert) in [(0, 0), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)] {
            mask.insert(token, expert);
        }
        mask
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let smooth = [Activation::Gelu, Activation::GeluTanh, Activation::Silu];
        for (activation, compensated) in smooth.into_iter().zip([true, false, true]) {
            let mut trained = Trained::new(layer(activation, compensated)).unwrap();
            let (x, direction) = (random(8, TOKENS * D), random(9, TOKENS * D));
            let (_, trace) = trained.forward_selected(x.clone(), &mask());
            let mut gradient = direction.clone();
            let gradients = trained.backward(&mut gradient, &trace);
            assert_gradient(&x, &gradient, |x| {
                dot(&trained.forward_selected(x.to_vec(), &mask()).0, &direction)
            });
            for array in 0..6 {
                let at = trained.weights.arrays()[array].clone();
                if at.is_empty() {
                    continue;
                }
                assert_gradient(&at, gradients.weights.arrays()[array], |values| {
                    trained.weights.arrays_mut()[array].copy_from_slice(values);
                    dot(&trained.forward_selected(x.clone(), &mask()).0, &direction)
                });
                trained.weights.arrays_mut()[array].copy_from_slice(&at);
            }
        }
    }

    #[test]
    fn values_are_what_another_expert_changes() {
        let trained = Trained::new(layer(Activation::Gelu, true)).unwrap();
        let (x, direction) = (random(8, TOKENS * D), random(9, TOKENS * D));
        let (sums, trace) = trained.forward_selected(x.clone(), &mask());
        let d_hidden: Vec<f32> = direction
            .chunks_exact(D)
            .flat_map(|d| trained.weights.w_out.chunks_exact(D).map(|w| dot(d, w) as f32))
            .collect();
        let values = trained.values(&d_hidden, &trace.hidden_of_all);
        for token in 0..TOKENS {
            for expert in (0..3).filter(|&expert| !mask().contains(token, expert)) {
                let mut more = mask();
                more.insert(token, expert);
                let (with, _) = trained.forward_selected(x.clone(), &more);
                let change = dot(&with, &direction) - dot(&sums, &direction);
                assert!((change - f64::from(values[token * 3 + expert])).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn untrained_weights_come_back_as_they_were() {
        for compensated in [false, true] {
            let moe = layer(Activation::Gelu, compensated);
            assert_eq!(Trained::new(moe.clone()).unwrap().to_moe().unwrap(), moe);
        }
    }

    #[test]
    fn forward_is_the_layer_with_its_residual() {
        let moe = layer(Activation::Relu, true);
        let x = random(8, TOKENS * D);
        let (sums, _) = Trained::new(moe.clone()).unwrap().forward_selected(x.clone(), &mask());
        let x: Vec<f64> = x.into_iter().map(f64::from).collect();
        let expected = crate::reference::experts(&moe, &x, &mask(), None);
        for ((sum, y), x) in sums.iter().zip(expected).zip(x) {
            assert!((f64::from(*sum) - y - x).abs() < 1e-5, "{sum} is not {}", x + y);
        }
    }
}
