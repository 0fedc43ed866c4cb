//! The mean over every sequence, scaled to unit length.

use rayon::prelude::*;

use super::lanes::sum;

/// y \[num_sequences, d_model\].
pub(super) fn pool(y: &mut [f32], x: &[f32], sequence_offsets: &[u32], d_model: usize) {
    let sequences = sequence_offsets.par_windows(2);
    y.par_chunks_exact_mut(d_model).zip(sequences).for_each(|(y, bounds)| {
        y.fill(0.0);
        for token in
            x[bounds[0] as usize * d_model..bounds[1] as usize * d_model].chunks_exact(d_model)
        {
            y.iter_mut().zip(token).for_each(|(y, x)| *y += x);
        }
        let count = (bounds[1] - bounds[0]) as f32;
        y.iter_mut().for_each(|y| *y /= count);
        let norm = sum(y, |y| y * y).sqrt().max(1e-12);
        y.iter_mut().for_each(|y| *y /= norm);
    });
}
