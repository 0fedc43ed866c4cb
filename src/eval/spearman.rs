//! Spearman's rank correlation.

use crate::error::{Error, Result};

/// Pearson correlation of the ranks of `a` and `b`; equal values share the mean of their ranks.
/// NaN when one side is constant.
///
/// # Errors
/// When the sides differ in length, have fewer than two values, or hold a NaN.
pub fn spearman(a: &[f64], b: &[f64]) -> Result<f64> {
    if a.len() != b.len() || a.len() < 2 {
        let got = format!("{} and {}", a.len(), b.len());
        return Err(Error::argument("spearman", "pairs", "at least two, complete", got));
    }
    if a.iter().chain(b).any(|v| v.is_nan()) {
        return Err(Error::argument("spearman", "values", "numbers", "NaN"));
    }
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() + 1) as f64 / 2.0;
    let covariance: f64 = a.iter().zip(&b).map(|(a, b)| (a - mean) * (b - mean)).sum();
    let spread = |ranks: &[f64]| ranks.iter().map(|r| (r - mean).powi(2)).sum::<f64>().sqrt();
    Ok(covariance / (spread(&a) * spread(&b)))
}

/// Ranks from 1; equal values share the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for tie in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = before as f64 + (tie.len() + 1) as f64 / 2.0;
        tie.iter().for_each(|&i| ranks[i] = rank);
        before += tie.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_share_the_mean_rank() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [3.5, 1.0, 3.5, 2.0]);
    }

    #[test]
    fn a_monotone_function_correlates_fully() {
        let a: Vec<f64> = (0..50).map(f64::from).collect();
        let b: Vec<f64> = a.iter().map(|x| x.exp()).collect();
        let down: Vec<f64> = a.iter().map(|x| -x.powi(3)).collect();
        approx::assert_relative_eq!(spearman(&a, &b).unwrap(), 1.0, epsilon = 1e-12);
        approx::assert_relative_eq!(spearman(&a, &down).unwrap(), -1.0, epsilon = 1e-12);
    }

    #[test]
    fn agrees_with_the_classic_formula_without_ties() {
        // 1 − 6 Σ d² / (n (n² − 1)) with rank differences 1, 1, 0, 1, 1.
        let r = spearman(&[1.0, 2.0, 3.0, 4.0, 5.0], &[2.0, 1.0, 3.0, 5.0, 4.0]).unwrap();
        approx::assert_relative_eq!(r, 1.0 - 6.0 * 4.0 / (5.0 * 24.0), epsilon = 1e-12);
    }

    #[test]
    fn refuses_what_has_no_rank() {
        assert!(spearman(&[1.0], &[1.0]).is_err());
        assert!(spearman(&[1.0, 2.0], &[1.0]).is_err());
        assert!(spearman(&[1.0, f64::NAN], &[1.0, 2.0]).is_err());
    }
}
