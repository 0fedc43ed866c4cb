//! The gradient of self-attention with respect to queries, keys and values.

use rayon::prelude::*;

use crate::cpu::{Matrix, MatrixMut, gemm};
use crate::model::Batch;

/// dL/d(qkv) \[T, 3·d\] from dL/d(context) \[T, d\], for context = softmax(Q Kᵀ/√d_head) V of every
/// head, within each sequence. The probabilities are computed again rather than kept.
pub(super) fn backward(
    qkv: &[f32],
    d_context: &[f32],
    batch: &Batch,
    d_model: usize,
    num_heads: usize,
) -> Vec<f32> {
    let mut d_qkv = vec![0.0; qkv.len()];
    let mut rest = (qkv, d_context, d_qkv.as_mut_slice());
    let mut sequences = Vec::with_capacity(batch.num_sequences());
    for sequence in batch.sequences() {
        let tokens = sequence.len();
        let (qkv, qkv_after) = rest.0.split_at(tokens * 3 * d_model);
        let (d_context, d_context_after) = rest.1.split_at(tokens * d_model);
        let (d_qkv, d_qkv_after) = rest.2.split_at_mut(tokens * 3 * d_model);
        sequences.push((tokens, qkv, d_context, d_qkv));
        rest = (qkv_after, d_context_after, d_qkv_after);
    }
    let d_head = d_model / num_heads;
    sequences.into_par_iter().for_each(|(tokens, qkv, d_context, d_qkv)| {
        for head in 0..num_heads {
            let first = head * d_head;
            let d_context =
                Matrix::with_strides(&d_context[first..], [tokens, d_head], [d_model, 1]);
            head_backward(qkv, d_context, d_qkv, tokens, d_model, first, d_head);
        }
    });
    d_qkv
}

/// One head of one sequence; its parts of a row of `qkv` begin at `first`, `first` + d_model and
/// `first` + 2·d_model.
fn head_backward(
    qkv: &[f32],
    d_context: Matrix<'_>,
    d_qkv: &mut [f32],
    tokens: usize,
    d_model: usize,
    first: usize,
    d_head: usize,
) {
    let (shape, strides) = ([tokens, d_head], [3 * d_model, 1]);
    let part = |part: usize| Matrix::with_strides(&qkv[part * d_model + first..], shape, strides);
    let [q, k, v] = [part(0), part(1), part(2)];
    let scale = 1.0 / (d_head as f32).sqrt();
    let square = [tokens, tokens];

    let mut p = vec![0.0; tokens * tokens];
    gemm(scale, q, k.transposed(), 0.0, MatrixMut::new(&mut p, square));
    for row in p.chunks_exact_mut(tokens) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|s| *s = (*s - max).exp());
        let inverse = row.iter().sum::<f32>().recip();
        row.iter_mut().for_each(|s| *s *= inverse);
    }
    // dS = P ⊙ (dP − rowsum(dP ⊙ P)), dP = dO Vᵀ.
    let mut d_scores = vec![0.0; tokens * tokens];
    gemm(1.0, d_context, v.transposed(), 0.0, MatrixMut::new(&mut d_scores, square));
    for (d, p) in d_scores.chunks_exact_mut(tokens).zip(p.chunks_exact(tokens)) {
        let along: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
        d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - along));
    }
    let mut write = |part: usize, alpha: f32, a: Matrix<'_>, b: Matrix<'_>| {
        let out = MatrixMut::with_strides(&mut d_qkv[part * d_model + first..], shape, strides);
        gemm(alpha, a, b, 0.0, out);
    };
    let d_scores = Matrix::new(&d_scores, square);
    write(0, scale, d_scores, k);
    write(1, scale, d_scores.transposed(), q);
    write(2, 1.0, Matrix::new(&p, square).transposed(), d_context);
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{assert_gradient, dot, random};
    use super::*;
    use crate::cpu::Cpu;
    use crate::model::Backend;

    #[test]
    fn gradient_is_that_of_finite_differences() {
        let (d_model, num_heads) = (6, 2);
        let batch = Batch::pack([vec![0; 4], vec![0; 1], vec![0; 3]]).unwrap();
        let cpu_batch = Cpu.batch(&batch, Vec::new()).unwrap();
        let qkv = random(0, batch.num_tokens() * 3 * d_model);
        let direction = random(1, batch.num_tokens() * d_model);
        let gradient = backward(&qkv, &direction, &batch, d_model, num_heads);
        assert_gradient(&qkv, &gradient, |qkv| {
            let mut context = vec![0.0; direction.len()];
            Cpu.attention(&mut context, &qkv.to_vec(), &cpu_batch, d_model, num_heads).unwrap();
            dot(&context, &direction)
        });
    }
}
