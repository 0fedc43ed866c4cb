//! What gradients written by hand are compared with.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Between −1 and 1.
pub(super) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Σ a b, in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// # Panics
/// When `gradient` is not that of `f` at `at`, each part within 1 % of the largest.
pub(super) fn assert_gradient(at: &[f32], gradient: &[f32], mut f: impl FnMut(&[f32]) -> f64) {
    const STEP: f32 = 1e-2;
    assert_eq!(at.len(), gradient.len());
    let largest = gradient.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
    assert!(largest > 0.0, "a gradient of zeros shows nothing");
    let mut moved = at.to_vec();
    for i in 0..at.len() {
        let mut value_at = |value: f32| {
            moved[i] = value;
            f(&moved)
        };
        let difference = value_at(at[i] + STEP) - value_at(at[i] - STEP);
        moved[i] = at[i];
        let expected = difference / f64::from(2.0 * STEP);
        let error = (expected - f64::from(gradient[i])).abs();
        assert!(
            error <= 0.01 * f64::from(largest),
            "part {i} is {}, differences say {expected} (largest: {largest})",
            gradient[i]
        );
    }
}
