//! The two-layer routers as functions to be fitted: their losses and gradients.

use rand::{Rng, RngExt};

use crate::cpu::{Matrix, MatrixMut, gemm, linear};
use crate::error::Result;
use crate::ffn::{MlpKind, Router};
use crate::tensor::Tensor;

/// Inputs and what the router should say about them.
pub(super) struct Batch {
    /// \[T, d_model\]; of unit length for MoEfication's router.
    pub(super) inputs: Vec<f32>,
    /// \[T, num_experts\].
    pub(super) targets: Vec<f32>,
}

/// The weights: W1 \[hidden, d_model\], then W2 \[num_experts, hidden\].
#[derive(Clone)]
pub(super) struct Network {
    pub(super) kind: MlpKind,
    pub(super) d_model: usize,
    pub(super) hidden: usize,
    pub(super) num_experts: usize,
    pub(super) values: Vec<f32>,
}

impl Network {
    /// Uniform weights that keep the size of what passes through them (He et al., arXiv 1502.01852).
    pub(super) fn random(
        kind: MlpKind,
        d_model: usize,
        hidden: usize,
        num_experts: usize,
        rng: &mut impl Rng,
    ) -> Self {
        let mut values = Vec::with_capacity(hidden * (d_model + num_experts));
        for (fan_in, outputs) in [(d_model, hidden), (hidden, num_experts)] {
            let bound = (6.0 / fan_in as f32).sqrt();
            values.extend((0..fan_in * outputs).map(|_| rng.random_range(-bound..bound)));
        }
        Self { kind, d_model, hidden, num_experts, values }
    }

    pub(super) fn w1(&self) -> &[f32] {
        &self.values[..self.hidden * self.d_model]
    }

    pub(super) fn w2(&self) -> &[f32] {
        &self.values[self.hidden * self.d_model..]
    }

    /// The weights as a router.
    pub(super) fn router(&self) -> Result<Router> {
        let w1 = Tensor::matrix(self.w1().to_vec(), [self.hidden, self.d_model])?;
        let w2 = Tensor::matrix(self.w2().to_vec(), [self.num_experts, self.hidden])?;
        Ok(Router::Mlp { kind: self.kind, w1, w2 })
    }

    /// relu or tanh of W1 x \[T, hidden\], and W2 of that \[T, num_experts\], before the last function.
    pub(super) fn layers(&self, inputs: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let tokens = inputs.len() / self.d_model;
        let mut inner = vec![0.0; tokens * self.hidden];
        linear(&mut inner, inputs, self.w1(), None, self.d_model, self.hidden);
        match self.kind {
            MlpKind::D2dMoe => inner.iter_mut().for_each(|z| *z = z.max(0.0)),
            MlpKind::Moefication => inner.iter_mut().for_each(|z| *z = z.tanh()),
        }
        let mut output = vec![0.0; tokens * self.num_experts];
        linear(&mut output, &inner, self.w2(), None, self.hidden, self.num_experts);
        (inner, output)
    }

    /// The scores \[T, num_experts\], and the loss against the targets.
    pub(super) fn scores_and_loss(&self, batch: &Batch) -> (Vec<f32>, f64) {
        let (_, mut output) = self.layers(&batch.inputs);
        let mut loss = 0.0;
        for (z, &target) in output.iter_mut().zip(&batch.targets) {
            loss += self.loss_and_slope(*z, target).0;
            *z = match self.kind {
                MlpKind::D2dMoe => z.abs(),
                MlpKind::Moefication => 1.0 / (1.0 + (-*z).exp()),
            };
        }
        let count = output.len() as f64;
        (output, loss / count)
    }

    /// Of one entry: (|z| − target)², or the binary cross-entropy of sigmoid(z), and its derivative.
    fn loss_and_slope(&self, z: f32, target: f32) -> (f64, f32) {
        match self.kind {
            MlpKind::D2dMoe => {
                let error = z.abs() - target;
                (f64::from(error * error), 2.0 * error * 1f32.copysign(z))
            }
            MlpKind::Moefication => {
                // −t ln σ(z) − (1 − t) ln(1 − σ(z)), without overflow.
                let loss = z.max(0.0) - z * target + (-z.abs()).exp().ln_1p();
                (loss.into(), 1.0 / (1.0 + (-z).exp()) - target)
            }
        }
    }

    /// The mean loss over all entries, and its gradient in the layout of `values`.
    pub(super) fn loss_and_gradient(&self, batch: &Batch) -> (f64, Vec<f32>) {
        let (inner, output) = self.layers(&batch.inputs);

        let per_entry = 1.0 / output.len() as f32;
        let mut loss = 0.0;
        let d_output: Vec<f32> = output
            .iter()
            .zip(&batch.targets)
            .map(|(&z, &target)| {
                let (of_entry, slope) = self.loss_and_slope(z, target);
                loss += of_entry;
                per_entry * slope
            })
            .collect();

        let count = output.len() as f64;
        (loss / count, self.gradient(&batch.inputs, &inner, &d_output))
    }

    /// The gradient in the layout of `values`, from that of the second of [`layers`](Self::layers), and
    /// the first.
    pub(super) fn gradient(&self, inputs: &[f32], inner: &[f32], d_output: &[f32]) -> Vec<f32> {
        let (d_model, hidden, num_experts) = (self.d_model, self.hidden, self.num_experts);
        let tokens = inputs.len() / d_model;
        let mut d_inner = vec![0.0; tokens * hidden];
        gemm(
            1.0,
            Matrix::new(d_output, [tokens, num_experts]),
            Matrix::new(self.w2(), [num_experts, hidden]),
            0.0,
            MatrixMut::new(&mut d_inner, [tokens, hidden]),
        );
        d_inner.iter_mut().zip(inner).for_each(|(d, inner)| {
            *d *= match self.kind {
                MlpKind::D2dMoe => f32::from(u8::from(*inner > 0.0)),
                MlpKind::Moefication => 1.0 - inner * inner,
            }
        });

        let mut gradient = vec![0.0; self.values.len()];
        let (d_w1, d_w2) = gradient.split_at_mut(hidden * d_model);
        gemm(
            1.0,
            Matrix::new(&d_inner, [tokens, hidden]).transposed(),
            Matrix::new(inputs, [tokens, d_model]),
            0.0,
            MatrixMut::new(d_w1, [hidden, d_model]),
        );
        gemm(
            1.0,
            Matrix::new(d_output, [tokens, num_experts]).transposed(),
            Matrix::new(inner, [tokens, hidden]),
            0.0,
            MatrixMut::new(d_w2, [num_experts, hidden]),
        );
        gradient
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn gradient_agrees_with_central_differences() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let (d_model, hidden, num_experts, tokens) = (5, 7, 3, 19);
        for kind in [MlpKind::D2dMoe, MlpKind::Moefication] {
            let network = Network::random(kind, d_model, hidden, num_experts, &mut rng);
            let mut random = |n: usize| (0..n).map(|_| rng.random_range(0.0f32..1.0)).collect();
            let batch =
                Batch { inputs: random(tokens * d_model), targets: random(tokens * num_experts) };
            check_gradient(&network, &batch);
        }
    }

    fn check_gradient(network: &Network, batch: &Batch) {
        let (_, gradient) = network.loss_and_gradient(batch);
        // Large enough for f32, small enough to cross few kinks.
        let step = 1e-3;
        let mut worst = 0.0f32;
        for (i, derivative) in gradient.iter().enumerate() {
            let loss_at = |delta: f32| {
                let mut moved = network.clone();
                moved.values[i] += delta;
                moved.loss_and_gradient(batch).0
            };
            let difference = (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
            worst = worst.max((difference as f32 - derivative).abs());
        }
        let largest = gradient.iter().fold(0.0f32, |max, g| max.max(g.abs()));
        assert!(worst < 0.01 * largest, "{worst} of {largest}");
    }
}
