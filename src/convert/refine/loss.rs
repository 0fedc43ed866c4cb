//! How far final hidden states are from the dense model's, and the gradient.

use crate::model::Batch;

/// The two parts of a loss.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loss {
    /// mean over tokens of ‖h − h₀‖²/‖h₀‖².
    pub(super) tokens: f64,
    /// mean over sequences of ‖e − e₀‖², e the mean of a sequence's h, scaled to unit length.
    pub(super) embeddings: f64,
}

/// The loss of h \[T, d\] against h₀ \[T, d\], and the gradient of `tokens` + `embeddings` with respect
/// to h.
pub(super) fn loss_and_gradient(
    states: &[f32],
    dense: &[f32],
    batch: &Batch,
    d: usize,
) -> (Loss, Vec<f32>) {
    let mut loss = Loss::default();
    let mut gradient = Vec::with_capacity(states.len());
    let per_token = 1.0 / batch.num_tokens() as f32;
    for (h, dense) in states.chunks_exact(d).zip(dense.chunks_exact(d)) {
        let inverse = per_token / dense.iter().map(|h| h * h).sum::<f32>().max(f32::MIN_POSITIVE);
        let differences = h.iter().zip(dense).map(|(h, dense)| h - dense);
        loss.tokens += f64::from(inverse * differences.clone().map(|x| x * x).sum::<f32>());
        gradient.extend(differences.map(|x| 2.0 * inverse * x));
    }
    let per_sequence = 1.0 / batch.num_sequences() as f32;
    for bounds in batch.sequence_offsets().windows(2) {
        let (tokens, range) =
            (bounds[1] - bounds[0], bounds[0] as usize * d..bounds[1] as usize * d);
        let (mean, length) = mean_of(&states[range.clone()], d);
        let (mean_dense, length_dense) = mean_of(&dense[range.clone()], d);
        let e: Vec<f32> = mean.iter().map(|m| m / length).collect();
        let differences: Vec<f32> =
            e.iter().zip(&mean_dense).map(|(e, m)| e - m / length_dense).collect();
        let square: f32 = differences.iter().map(|x| x * x).sum();
        loss.embeddings += f64::from(per_sequence * square);
        // Through e = m/‖m‖ and m = Σ h / tokens.
        let along: f32 = differences.iter().zip(&e).map(|(x, e)| x * e).sum();
        let factor = 2.0 * per_sequence / (length * tokens as f32);
        for g in gradient[range].chunks_exact_mut(d) {
            let parts = differences.iter().zip(&e);
            g.iter_mut().zip(parts).for_each(|(g, (x, e))| *g += factor * (x - e * along));
        }
    }
    (loss, gradient)
}

/// The mean of the rows, and its length.
fn mean_of(rows: &[f32], d: usize) -> (Vec<f32>, f32) {
    let mut mean = vec![0.0f32; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let tokens = (rows.len() / d) as f32;
    mean.iter_mut().for_each(|m| *m /= tokens);
    let length = mean.iter().map(|m| m * m).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    (mean, length)
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{assert_gradient, random};
    use super::*;

    #[test]
    fn gradient_is_that_of_finite_differences() {
        let d = 5;
        let batch = Batch::pack([vec![0; 2], vec![0; 1], vec![0; 3]]).unwrap();
        let states = random(0, batch.num_tokens() * d);
        let dense = random(1, batch.num_tokens() * d);
        let (_, gradient) = loss_and_gradient(&states, &dense, &batch, d);
        assert_gradient(&states, &gradient, |states| {
            let (loss, _) = loss_and_gradient(states, &dense, &batch, d);
            loss.tokens + loss.embeddings
        });
    }

    #[test]
    fn the_dense_model_loses_nothing() {
        let batch = Batch::pack([vec![0; 2], vec![0; 3]]).unwrap();
        let dense = random(0, batch.num_tokens() * 4);
        let (loss, gradient) = loss_and_gradient(&dense, &dense, &batch, 4);
        assert_eq!((loss.tokens, loss.embeddings), (0.0, 0.0));
        assert!(gradient.iter().all(|g| *g == 0.0));
    }
}
