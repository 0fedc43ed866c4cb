//! The weights of a MoEfied FFN as something to be trained.

use rayon::prelude::*;

use crate::convert::options::check_refinable;
use crate::cpu::{Matrix, MatrixMut, activate_with_slope, gemm, linear};
use crate::error::Result;
use crate::ffn::{Activation, Compensation, DenseFfn, ExpertMask, MoeFfn};
use crate::tensor::Tensor;

/// What is trained, or its gradient: all of it in expert order.
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
}

impl Trained {
    /// # Errors
    /// For a GLU, and for a mean compensation.
    pub(super) fn new(moe: MoeFfn) -> Result<Self> {
        let neurons = moe.neurons();
        let has_mean = matches!(moe.compensation(), Some(Compensation::Mean { .. }));
        check_refinable(neurons.is_glu(), has_mean)?;
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
        Ok(Self { weights, fixed_bias, rank, moe })
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
        let (partition, router) = (self.moe.partition().clone(), self.moe.router().clone());
        let moe = MoeFfn::from_expert_order(neurons, partition, router, self.moe.selection())?;
        match compensation {
            Some(compensation) => moe.with_compensation(compensation),
            None => Ok(moe),
        }
    }

    /// x + FFN(x) with the experts of `mask`.
    pub(super) fn forward(&self, inputs: Vec<f32>, mask: &ExpertMask) -> (Vec<f32>, Trace) {
        let Weights { w_in, b_in, w_out, bias, u, v } = &self.weights;
        let (d, d_ff, rank) = (self.moe.d_model(), self.moe.d_ff(), self.rank);
        let tokens = inputs.len() / d;
        let mut hidden = vec![0.0; tokens * d_ff];
        linear(&mut hidden, &inputs, w_in, Some(b_in), d, d_ff);
        let mut slope = vec![0.0; tokens * d_ff];
        let (activation, width) = (self.moe.neurons().activation(), self.moe.expert_width());
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
        (sums, Trace { inputs, hidden, slope, low })
    }

    /// The gradient of the weights, and dL/dx from dL/d(x + FFN(x)), which it takes the place of.
    pub(super) fn backward(&self, gradient: &mut [f32], trace: &Trace) -> Weights {
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
        // Through one pair of matrices: y = a · w_out, a = act(x · w_inᵀ).
        let through = |inner: &[f32],
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
        weights
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
    use crate::ffn::{Partition, Router, Selection};

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
        let router = Router::Linear { w: matrix(4, 3) };
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
            let (_, trace) = trained.forward(x.clone(), &mask());
            let mut gradient = direction.clone();
            let gradients = trained.backward(&mut gradient, &trace);
            assert_gradient(&x, &gradient, |x| {
                dot(&trained.forward(x.to_vec(), &mask()).0, &direction)
            });
            for array in 0..6 {
                let at = trained.weights.arrays()[array].clone();
                if at.is_empty() {
                    continue;
                }
                assert_gradient(&at, gradients.arrays()[array], |values| {
                    trained.weights.arrays_mut()[array].copy_from_slice(values);
                    dot(&trained.forward(x.clone(), &mask()).0, &direction)
                });
                trained.weights.arrays_mut()[array].copy_from_slice(&at);
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
        let (sums, _) = Trained::new(moe.clone()).unwrap().forward(x.clone(), &mask());
        let x: Vec<f64> = x.into_iter().map(f64::from).collect();
        let expected = crate::reference::experts(&moe, &x, &mask(), None);
        for ((sum, y), x) in sums.iter().zip(expected).zip(x) {
            assert!((f64::from(*sum) - y - x).abs() < 1e-5, "{sum} is not {}", x + y);
        }
    }
}
