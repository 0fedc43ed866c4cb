//! Random layers and inputs for the tests of the operations.
#![allow(dead_code)]

use moefy::ffn::{
    Activation, Compensation, DenseFfn, MlpKind, MoeFfn, Partition, Router, Selection,
};
use moefy::{DType, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.0.random_range(-1.0f32..1.0)).collect()
    }

    /// Scaled so that products with unit-size inputs have unit size.
    pub fn weights(&mut self, [rows, cols]: [usize; 2], dtype: DType) -> Tensor {
        let scale = (3.0 / cols as f32).sqrt();
        let values = self.values(rows * cols).into_iter().map(|v| v * scale).collect();
        Tensor::matrix::<f32>(values, [rows, cols]).unwrap().to_dtype(dtype)
    }

    pub fn vector(&mut self, len: usize, dtype: DType) -> Tensor {
        Tensor::vector(self.values(len)).to_dtype(dtype)
    }

    pub fn dense(&mut self, shape: &Shape) -> DenseFfn {
        let Shape { d_model, activation, glu, biases, dtype, .. } = *shape;
        let d_ff = shape.d_ff();
        let rows = if glu { 2 * d_ff } else { d_ff };
        let w_in = self.weights([rows, d_model], dtype);
        let b_in = biases.then(|| self.vector(rows, dtype));
        let w_out = self.weights([d_model, d_ff], dtype).transposed();
        let b_out = biases.then(|| self.vector(d_model, dtype));
        DenseFfn::from_neuron_major(activation, glu, w_in, b_in, w_out, b_out).unwrap()
    }

    pub fn router(
        &mut self,
        kind: usize,
        num_experts: usize,
        d_model: usize,
        dtype: DType,
    ) -> Router {
        let mlp = |random: &mut Self, kind| Router::Mlp {
            kind,
            w1: random.weights([17, d_model], dtype),
            w2: random.weights([num_experts, 17], dtype),
        };
        match kind % 4 {
            0 => Router::Linear { w: self.weights([num_experts, d_model], dtype) },
            1 => mlp(self, MlpKind::D2dMoe),
            2 => mlp(self, MlpKind::Moefication),
            _ => Router::Centroid { centroids: self.weights([num_experts, d_model], dtype) },
        }
    }

    pub fn moe(&mut self, shape: &Shape, router: usize, selection: Selection) -> MoeFfn {
        let dense = self.dense(shape);
        let mut labels: Vec<u32> = (0..shape.num_experts)
            .flat_map(|e| std::iter::repeat_n(e as u32, shape.expert_width))
            .chain(std::iter::repeat_n(shape.num_experts as u32, shape.shared))
            .collect();
        for i in (1..labels.len()).rev() {
            labels.swap(i, self.below(i + 1));
        }
        let partition = Partition::new(shape.num_experts, labels).unwrap();
        let router = self.router(router, shape.num_experts, shape.d_model, shape.dtype);
        MoeFfn::new(&dense, partition, router, selection).unwrap()
    }

    pub fn compensation(&mut self, shape: &Shape, kind: usize) -> Option<Compensation> {
        let (d, dtype) = (shape.d_model, shape.dtype);
        match kind % 3 {
            0 => None,
            1 => Some(Compensation::Mean { mean: self.vector(shape.d_ff(), dtype) }),
            _ => Some(Compensation::Linear {
                u: self.weights([5, d], dtype),
                v: self.weights([5, d], dtype),
                c: self.vector(d, dtype),
            }),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub d_model: usize,
    pub num_experts: usize,
    pub expert_width: usize,
    pub shared: usize,
    pub activation: Activation,
    pub glu: bool,
    pub biases: bool,
    pub dtype: DType,
}

impl Shape {
    pub fn d_ff(&self) -> usize {
        self.num_experts * self.expert_width + self.shared
    }
}

pub fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

pub fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// Largest |got − expected| relative to the largest |expected|, or to 1: sums of values of unit size
/// may cancel.
pub fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(1.0f64, |max, v| max.max(v.abs()));
    let error = |(&got, expected): (&f32, &f64)| {
        let error = (f64::from(got) - expected).abs();
        if error.is_nan() { f64::INFINITY } else { error }
    };
    got.iter().zip(expected).map(error).fold(0.0, f64::max) / largest
}
