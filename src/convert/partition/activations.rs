//! What neurons have in common in what they do, over a sample of tokens.

use rand::{Rng, RngExt};

use crate::convert::hidden::for_each_hidden;
use crate::cpu::{Matrix, MatrixMut, gemm};
use crate::ffn::DenseFfn;

/// Tokens that are looked at.
const SAMPLE_TOKENS: usize = 16_384;
/// Length of a neuron's projected activations: inner products of unit vectors come out within about
/// 1/√384 = 0.05.
pub(super) const PROJECTED: usize = 384;

/// Every neuron's activations, centred, as a random projection onto [`PROJECTED`] directions of ±1
/// (Johnson-Lindenstrauss; signs: Achlioptas, JCSS 66, 2003), \[neurons, PROJECTED\].
pub(super) fn projected(
    ffn: &DenseFfn,
    inputs: &[f32],
    neurons: &[u32],
    rng: &mut impl Rng,
) -> Vec<f32> {
    let mut projected = vec![0.0; neurons.len() * PROJECTED];
    let (mut sign_sums, mut sums) = (vec![0.0f32; PROJECTED], vec![0.0f32; neurons.len()]);
    let mut num_tokens = 0;
    for_each_sample(ffn, inputs, neurons, |h| {
        let tokens = h.len() / neurons.len();
        let signs: Vec<f32> = (0..tokens * PROJECTED)
            .map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 })
            .collect();
        gemm(
            1.0,
            Matrix::new(h, [tokens, neurons.len()]).transposed(),
            Matrix::new(&signs, [tokens, PROJECTED]),
            1.0,
            MatrixMut::new(&mut projected, [neurons.len(), PROJECTED]),
        );
        for (sums, rows, cols) in
            [(&mut sign_sums, &signs[..], PROJECTED), (&mut sums, h, neurons.len())]
        {
            for row in rows.chunks_exact(cols) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
        num_tokens += tokens;
    });
    // Σ sign (h − mean) = Σ sign h − mean Σ sign.
    for (row, sum) in projected.chunks_exact_mut(PROJECTED).zip(&sums) {
        let mean = sum / num_tokens as f32;
        row.iter_mut().zip(&sign_sums).for_each(|(p, signs)| *p -= mean * signs);
    }
    projected
}

/// Σ over tokens of relu(h_n) · relu(h_m), \[neurons, neurons\]: how strongly two neurons fire together.
pub(super) fn coactivation(ffn: &DenseFfn, inputs: &[f32], neurons: &[u32]) -> Vec<f32> {
    let count = neurons.len();
    let mut weights = vec![0.0; count * count];
    for_each_sample(ffn, inputs, neurons, |h| {
        h.iter_mut().for_each(|h| *h = h.max(0.0));
        let h = Matrix::new(h, [h.len() / count, count]);
        gemm(1.0, h.transposed(), h, 1.0, MatrixMut::new(&mut weights, [count, count]));
    });
    weights
}

/// Calls `visit` with h \[n, neurons\] of consecutive chunks of a sample.
fn for_each_sample(
    ffn: &DenseFfn,
    inputs: &[f32],
    neurons: &[u32],
    mut visit: impl FnMut(&mut [f32]),
) {
    let sample = &inputs[..inputs.len().min(SAMPLE_TOKENS * ffn.d_model())];
    for_each_hidden(ffn, sample, |hidden| {
        let rows = hidden.chunks_exact(ffn.d_ff());
        let mut picked: Vec<f32> =
            rows.flat_map(|h| neurons.iter().map(|&neuron| h[neuron as usize])).collect();
        visit(&mut picked);
    });
}
