//! The router as a function to be fitted: r(x) = |W2 relu(W1 x)|, its loss and its gradient.

use rand::{Rng, RngExt};

use crate::cpu::{Matrix, MatrixMut, gemm, linear};

/// Inputs and what the router should say about them.
pub(super) struct Batch {
    /// \[T, d_model\].
    pub(super) inputs: Vec<f32>,
    /// \[T, num_experts\].
    pub(super) targets: Vec<f32>,
}

/// The weights: W1 \[hidden, d_model\], then W2 \[num_experts, hidden\].
#[derive(Clone)]
pub(super) struct Network {
    pub(super) d_model: usize,
    pub(super) hidden: usize,
    pub(super) num_experts: usize,
    pub(super) values: Vec<f32>,
}

impl Network {
    /// Uniform weights that keep the size of what passes through them (He et al., arXiv 1502.01852).
    pub(super) fn random(
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
        Self { d_model, hidden, num_experts, values }
    }

    pub(super) fn w1(&self) -> &[f32] {
        &self.values[..self.hidden * self.d_model]
    }

    pub(super) fn w2(&self) -> &[f32] {
        &self.values[self.hidden * self.d_model..]
    }

    /// relu(W1 x) \[T, hidden\] and W2 relu(W1 x) \[T, num_experts\], before the absolute value.
    pub(super) fn forward(&self, inputs: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let tokens = inputs.len() / self.d_model;
        let mut inner = vec![0.0; tokens * self.hidden];
        linear(&mut inner, inputs, self.w1(), None, self.d_model, self.hidden);
        inner.iter_mut().for_each(|z| *z = z.max(0.0));
        let mut output = vec![0.0; tokens * self.num_experts];
        linear(&mut output, &inner, self.w2(), None, self.hidden, self.num_experts);
        (inner, output)
    }

    /// The mean of (r − target)² over all entries, and its gradient in the layout of `values`.
    pub(super) fn loss_and_gradient(&self, batch: &Batch) -> (f64, Vec<f32>) {
        let (d_model, hidden, num_experts) = (self.d_model, self.hidden, self.num_experts);
        let tokens = batch.inputs.len() / d_model;
        let (inner, output) = self.forward(&batch.inputs);

        let per_entry = 2.0 / output.len() as f32;
        let mut loss = 0.0;
        let d_output: Vec<f32> = output
            .iter()
            .zip(&batch.targets)
            .map(|(&z, &target)| {
                let error = z.abs() - target;
                loss += f64::from(error * error);
                per_entry * error * 1f32.copysign(z)
            })
            .collect();

        let mut d_inner = vec![0.0; tokens * hidden];
        gemm(
            1.0,
            Matrix::new(&d_output, [tokens, num_experts]),
            Matrix::new(self.w2(), [num_experts, hidden]),
            0.0,
            MatrixMut::new(&mut d_inner, [tokens, hidden]),
        );
        d_inner
            .iter_mut()
            .zip(&inner)
            .filter(|(_, inner)| **inner == 0.0)
            .for_each(|(d, _)| *d = 0.0);

        let mut gradient = vec![0.0; self.values.len()];
        let (d_w1, d_w2) = gradient.split_at_mut(hidden * d_model);
        gemm(
            1.0,
            Matrix::new(&d_inner, [tokens, hidden]).transposed(),
            Matrix::new(&batch.inputs, [tokens, d_model]),
            0.0,
            MatrixMut::new(d_w1, [hidden, d_model]),
        );
        gemm(
            1.0,
            Matrix::new(&d_output, [tokens, num_experts]).transposed(),
            Matrix::new(&inner, [tokens, hidden]),
            0.0,
            MatrixMut::new(d_w2, [num_experts, hidden]),
        );
        (loss / output.len() as f64, gradient)
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
        let network = Network::random(d_model, hidden, num_experts, &mut rng);
        let mut random = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let batch =
            Batch { inputs: random(tokens * d_model), targets: random(tokens * num_experts) };
        let (_, gradient) = network.loss_and_gradient(&batch);
        // Large enough for f32, small enough to cross few kinks.
        let step = 1e-3;
        let mut worst = 0.0f32;
        for (i, derivative) in gradient.iter().enumerate() {
            let loss_at = |delta: f32| {
                let mut moved = network.clone();
                moved.values[i] += delta;
                moved.loss_and_gradient(&batch).0
            };
            let difference = (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
            worst = worst.max((difference as f32 - derivative).abs());
        }
        let largest = gradient.iter().fold(0.0f32, |max, g| max.max(g.abs()));
        assert!(worst < 0.01 * largest, "{worst} of {largest}");
    }
}
