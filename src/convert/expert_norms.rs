//! What a router learns to predict: the norm of every expert's output.

use rayon::prelude::*;

use super::hidden::for_each_hidden;
use crate::cpu::{Matrix, MatrixMut, gemm};
use crate::ffn::{DenseFfn, Partition};

/// Tokens of one task.
const BLOCK_TOKENS: usize = 64;

/// ‖W2_e (h_e − μ_e)‖₂, \[T, E\], for inputs x \[T, d_model\] and an FFN whose neurons are in the
/// partition's expert order: without `mean` μ \[d_ff\] the length of an expert's output (b2 left out),
/// with it the length of what the expert adds beyond its mean.
pub(super) fn expert_norms(
    ffn: &DenseFfn,
    partition: &Partition,
    inputs: &[f32],
    mean: Option<&[f32]>,
) -> Vec<f32> {
    let (d_model, d_ff) = (ffn.d_model(), ffn.d_ff());
    let (num_experts, width) = (partition.num_experts(), partition.expert_width());
    let w_out = ffn.w_out().to_f32();
    // ‖hᵀ W‖ = ‖hᵀ L‖ with L Lᵀ = W Wᵀ, and L is smaller where an expert is narrow.
    let factor_cols = width.min(d_model);
    let factors: Vec<Vec<f32>> = w_out[..num_experts * width * d_model]
        .par_chunks_exact(width * d_model)
        .map(|w| if width < d_model { gram_factor(w, width) } else { w.to_vec() })
        .collect();

    // μ_eᵀ L, where there is a mean.
    let offsets: Vec<Vec<f32>> = factors
        .iter()
        .enumerate()
        .map(|(expert, factor)| {
            let mut offset = vec![0.0; factor_cols];
            for (row, mean) in factor
                .chunks_exact(factor_cols)
                .zip(mean.map_or(&[][..], |mean| &mean[expert * width..(expert + 1) * width]))
            {
                offset.iter_mut().zip(row).for_each(|(offset, l)| *offset += mean * l);
            }
            offset
        })
        .collect();

    let mut norms = Vec::with_capacity(inputs.len() / d_model * num_experts);
    for_each_hidden(ffn, inputs, |hidden| {
        norms.par_extend(hidden.par_chunks(BLOCK_TOKENS * d_ff).flat_map_iter(|hidden| {
            let tokens = hidden.len() / d_ff;
            let mut block = vec![0.0; tokens * num_experts];
            let mut z = vec![0.0; tokens * factor_cols];
            for (expert, (factor, offset)) in factors.iter().zip(&offsets).enumerate() {
                gemm(
                    1.0,
                    Matrix::with_strides(&hidden[expert * width..], [tokens, width], [d_ff, 1]),
                    Matrix::new(factor, [width, factor_cols]),
                    0.0,
                    MatrixMut::new(&mut z, [tokens, factor_cols]),
                );
                for (token, z) in z.chunks_exact(factor_cols).enumerate() {
                    let square: f32 = z.iter().zip(offset).map(|(z, o)| (z - o).powi(2)).sum();
                    block[token * num_experts + expert] = square.sqrt();
                }
            }
            block
        }));
    });
    norms
}

/// The lower triangular L \[rows, rows\] with L Lᵀ = W Wᵀ (Cholesky), for W \[rows, cols\]. A row that
/// depends on earlier ones gets a zero column.
fn gram_factor(w: &[f32], rows: usize) -> Vec<f32> {
    let cols = w.len() / rows;
    let row = |i: usize| &w[i * cols..][..cols];
    let mut l = vec![0.0f64; rows * rows];
    for j in 0..rows {
        let gram = |i: usize| -> f64 {
            row(i).iter().zip(row(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let explained = |l: &[f64], i: usize| -> f64 {
            (0..j).map(|k| l[i * rows + k] * l[j * rows + k]).sum()
        };
        let length = gram(j);
        let pivot = length - explained(&l, j);
        // What rounding leaves of zero.
        if pivot <= length * 1e-12 {
            continue;
        }
        let diagonal = pivot.sqrt();
        l[j * rows + j] = diagonal;
        for i in j + 1..rows {
            l[i * rows + j] = (gram(i) - explained(&l, i)) / diagonal;
        }
    }
    l.into_iter().map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    #[test]
    fn gram_factor_reproduces_products_of_dependent_rows() {
        // Row 2 = row 0 + row 1, row 3 = 0.
        let w = [1.0, 2.0, -1.0, 0.5, 1.0, 3.0, 1.5, 3.0, 2.0, 0.0, 0.0, 0.0];
        let l = gram_factor(&w, 4);
        let product = |m: &[f32], cols: usize, i: usize, j: usize| -> f32 {
            (0..cols).map(|k| m[i * cols + k] * m[j * cols + k]).sum()
        };
        for i in 0..4 {
            for j in 0..4 {
                let expected = product(&w, 3, i, j);
                assert_relative_eq!(product(&l, 4, i, j), expected, epsilon = 1e-5);
            }
        }
    }
}
