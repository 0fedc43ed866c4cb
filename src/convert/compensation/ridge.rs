//! Weighted ridge regression, of full or of reduced rank.

use crate::cpu::{Matrix, MatrixMut, gemm};

/// Rounds of orthogonal iteration: what is left of a direction falls with the power of the ratio of
/// its eigenvalue to the last kept one, and directions that are nearly as good are as good.
const ROUNDS: usize = 600;

/// The moments of inputs x \[d_in\], which get a 1 appended, and targets y \[d_out\].
pub(super) struct Moments {
    d_in: usize,
    d_out: usize,
    /// Σ w x̃ x̃ᵀ \[d_in + 1, d_in + 1\], x̃ = (x, 1).
    xx: Vec<f64>,
    /// Σ w x̃ yᵀ \[d_in + 1, d_out\].
    xy: Vec<f64>,
}

/// y ≈ Uᵀᵀ (V x) + c.
pub(super) struct LowRank {
    /// \[rank, d_out\].
    pub(super) u: Vec<f64>,
    /// \[rank, d_in\].
    pub(super) v: Vec<f64>,
    /// \[d_out\].
    pub(super) c: Vec<f64>,
}

impl Moments {
    pub(super) fn new(d_in: usize, d_out: usize) -> Self {
        let rows = d_in + 1;
        Self { d_in, d_out, xx: vec![0.0; rows * rows], xy: vec![0.0; rows * d_out] }
    }

    /// Adds tokens with weights w: x \[T, d_in\], y \[T, d_out\], w \[T\].
    pub(super) fn add(&mut self, x: &[f32], y: &[f32], weights: &[f32]) {
        let (rows, tokens) = (self.d_in + 1, weights.len());
        let mut extended = Vec::with_capacity(tokens * rows);
        let mut weighted = Vec::with_capacity(tokens * rows);
        for (x, &w) in x.chunks_exact(self.d_in).zip(weights) {
            extended.extend_from_slice(x);
            extended.push(1.0);
            weighted.extend(x.iter().map(|x| w * x));
            weighted.push(w);
        }
        let weighted = Matrix::new(&weighted, [tokens, rows]).transposed();
        let products = [(&extended[..], rows, &mut self.xx), (y, self.d_out, &mut self.xy)];
        for (right, cols, sums) in products {
            let mut product = vec![0.0f32; rows * cols];
            let c = MatrixMut::new(&mut product, [rows, cols]);
            gemm(1.0, weighted, Matrix::new(right, [tokens, cols]), 0.0, c);
            sums.iter_mut().zip(product).for_each(|(sum, p)| *sum += f64::from(p));
        }
    }

    /// The regression of rank at most `rank` that minimises Σ w ‖y − U V x − c‖² plus
    /// `ridge` · (mean diagonal of the covariance) · ‖coefficients‖²; the constant is free. Lengths are
    /// those of a metric, ‖e‖² = eᵀ M e, with M \[d_out, d_out\] symmetric and positive semidefinite.
    /// Products in f32 round, of a text that repeats itself the same way each time: where that leaves a
    /// covariance which the ridge does not make positive definite, a larger one does.
    ///
    /// With ridge regression S \[d_in, d_out\], the penalised covariance C of the inputs and M = L Lᵀ, the
    /// best rank-r coefficients are S L P Pᵀ L⁻¹, where P holds the r leading eigenvectors of
    /// Lᵀ Sᵀ C S L (reduced-rank regression: Izenman, Journal of Multivariate Analysis 5, 1975).
    pub(super) fn fit(&self, rank: usize, ridge: f64, metric: &[f64]) -> LowRank {
        let (d_in, d_out, rows) = (self.d_in, self.d_out, self.d_in + 1);
        let total = self.xx[rows * rows - 1];
        let mean_x: Vec<f64> = (0..d_in).map(|i| self.xx[i * rows + d_in] / total).collect();
        let mean_y: Vec<f64> = self.xy[d_in * d_out..].iter().map(|y| y / total).collect();

        let mut covariance = vec![0.0; d_in * d_in];
        for i in 0..d_in {
            for j in 0..d_in {
                covariance[i * d_in + j] = self.xx[i * rows + j] - total * mean_x[i] * mean_x[j];
            }
        }
        let trace: f64 = (0..d_in).map(|i| covariance[i * d_in + i]).sum();
        // Something positive where all inputs are alike.
        let mut penalty = (ridge * trace / d_in as f64).max(f64::MIN_POSITIVE.sqrt());
        let factor = loop {
            (0..d_in).for_each(|i| covariance[i * d_in + i] += penalty);
            let (factor, is_definite) = cholesky(&covariance, d_in);
            // Of inputs that are not finite no ridge makes anything; whoever takes the result sees that.
            if is_definite || !trace.is_finite() {
                break factor;
            }
            penalty *= 10.0;
        };
        let mut full = vec![0.0; d_in * d_out];
        for i in 0..d_in {
            for j in 0..d_out {
                full[i * d_out + j] = self.xy[i * d_out + j] - total * mean_x[i] * mean_y[j];
            }
        }
        let cross = full.clone();
        solve_lower(&factor, &mut full, d_in);
        solve_upper(&factor, &mut full, d_in);

        let rank = rank.min(d_in).min(d_out);
        let (factor, _) = cholesky(metric, d_out);
        // Sᵀ C S, because C S is `cross`.
        let explained = product_of_columns(&full, &cross, d_in, d_out);
        let explained = product_of_columns(&explained, &factor, d_out, d_out);
        let explained = product_of_columns(&factor, &explained, d_out, d_out);
        let p = leading_eigenvectors(&explained, d_out, rank);
        // L P, and L⁻ᵀ P, as rows.
        let mut u = Vec::with_capacity(rank * d_out);
        let mut v = Vec::with_capacity(rank * d_in);
        for p in p.chunks_exact(d_out) {
            let direction: Vec<f64> = factor.chunks_exact(d_out).map(|l| dot(l, p)).collect();
            v.extend(full.chunks_exact(d_out).map(|row| dot(row, &direction)));
            let start = u.len();
            u.extend_from_slice(p);
            solve_upper(&factor, &mut u[start..], d_out);
        }
        let mut c = mean_y;
        for (v, u) in v.chunks_exact(d_in).zip(u.chunks_exact(d_out)) {
            let at_mean = dot(v, &mean_x);
            c.iter_mut().zip(u).for_each(|(c, u)| *c -= at_mean * u);
        }
        LowRank { u, v, c }
    }
}

/// The lower triangular L with L Lᵀ = A, for a symmetric positive semidefinite A \[n, n\], and whether A is
/// positive definite. What rounding leaves of zero counts as a little more than that.
fn cholesky(a: &[f64], n: usize) -> (Vec<f64>, bool) {
    let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
    let least = (trace / n as f64 * 1e-9).max(f64::MIN_POSITIVE.sqrt());
    let (mut l, mut is_definite) = (vec![0.0; n * n], true);
    for i in 0..n {
        let (before, rest) = l.split_at_mut(i * n);
        let row = &mut rest[..n];
        for (j, other) in before.chunks_exact(n).enumerate() {
            row[j] = (a[i * n + j] - dot(&row[..j], &other[..j])) / other[j];
        }
        let pivot = a[i * n + i] - dot(&row[..i], &row[..i]);
        is_definite &= pivot >= least;
        row[i] = pivot.max(least).sqrt();
    }
    (l, is_definite)
}

/// x ← L⁻¹ x for x \[n, m\].
fn solve_lower(l: &[f64], x: &mut [f64], n: usize) {
    let m = x.len() / n;
    for i in 0..n {
        let (before, rest) = x.split_at_mut(i * m);
        for (k, other) in before.chunks_exact(m).enumerate() {
            rest[..m].iter_mut().zip(other).for_each(|(x, o)| *x -= l[i * n + k] * o);
        }
        rest[..m].iter_mut().for_each(|x| *x /= l[i * n + i]);
    }
}

/// x ← L⁻ᵀ x for x \[n, m\].
fn solve_upper(l: &[f64], x: &mut [f64], n: usize) {
    let m = x.len() / n;
    for i in (0..n).rev() {
        let (rest, after) = x.split_at_mut((i + 1) * m);
        let row = &mut rest[i * m..];
        for (k, other) in after.chunks_exact(m).enumerate() {
            row.iter_mut().zip(other).for_each(|(x, o)| *x -= l[(i + 1 + k) * n + i] * o);
        }
        row.iter_mut().for_each(|x| *x /= l[i * n + i]);
    }
}

/// aᵀ b \[cols, cols\] for a, b \[rows, cols\].
fn product_of_columns(a: &[f64], b: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut product = vec![0.0; cols * cols];
    for row in 0..rows {
        let (a, b) = (&a[row * cols..][..cols], &b[row * cols..][..cols]);
        for (out, a) in product.chunks_exact_mut(cols).zip(a) {
            out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
        }
    }
    product
}

/// Orthonormal rows \[count, n\] that span, nearly, the eigenvectors of a positive semidefinite
/// a \[n, n\] with the largest eigenvalues.
fn leading_eigenvectors(a: &[f64], n: usize, count: usize) -> Vec<f64> {
    // The axes with the largest diagonal: no randomness, and close where the axes matter.
    let mut axes: Vec<usize> = (0..n).collect();
    axes.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    let mut vectors = vec![0.0; count * n];
    for (vector, axis) in vectors.chunks_exact_mut(n).zip(axes) {
        vector[axis] = 1.0;
    }
    let mut next = vec![0.0; count * n];
    for _ in 0..ROUNDS {
        for (next, vector) in next.chunks_exact_mut(n).zip(vectors.chunks_exact(n)) {
            next.iter_mut().zip(a.chunks_exact(n)).for_each(|(next, row)| *next = dot(row, vector));
        }
        orthonormalise(&mut next, &vectors, n);
        std::mem::swap(&mut next, &mut vectors);
    }
    vectors
}

/// Modified Gram-Schmidt, twice against cancellation. A vector that vanishes (a has a lower rank) is
/// replaced by what of the old ones is orthogonal to the rest, or by zero.
fn orthonormalise(vectors: &mut [f64], old: &[f64], n: usize) {
    for i in 0..vectors.len() / n {
        let (before, rest) = vectors.split_at_mut(i * n);
        let vector = &mut rest[..n];
        let length = dot(vector, vector).sqrt();
        if !project_out(vector, before, n, 1e-9 * length) {
            let old = old.chunks_exact(n);
            let fits = old.into_iter().any(|old| {
                vector.copy_from_slice(old);
                project_out(vector, before, n, 1e-3)
            });
            if !fits {
                vector.fill(0.0);
            }
        }
    }
}

/// Removes `directions` from a vector and scales it to length 1; false where no more than `least` of
/// it is left.
fn project_out(vector: &mut [f64], directions: &[f64], n: usize, least: f64) -> bool {
    for _ in 0..2 {
        for direction in directions.chunks_exact(n) {
            let share = dot(vector, direction);
            vector.iter_mut().zip(direction).for_each(|(v, d)| *v -= share * d);
        }
    }
    let length = dot(vector, vector).sqrt();
    if length <= least {
        return false;
    }
    vector.iter_mut().for_each(|v| *v /= length);
    true
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const TOKENS: usize = 400;

    fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    /// M = A Aᵀ, and A.
    fn random_metric(rng: &mut ChaCha8Rng, n: usize) -> (Vec<f64>, Vec<f64>) {
        let a: Vec<f64> = random(rng, n * n).into_iter().map(f64::from).collect();
        let transposed: Vec<f64> = (0..n * n).map(|i| a[i % n * n + i / n]).collect();
        (product_of_columns(&transposed, &transposed, n, n), a)
    }

    /// Σ w ‖Aᵀ (y − U V x − c)‖².
    fn loss(fit: &LowRank, x: &[f32], y: &[f32], w: &[f32], a: &[f64]) -> f64 {
        let (d_out, d_in) = (fit.c.len(), x.len() / w.len());
        let mut loss = 0.0;
        for ((x, y), w) in x.chunks_exact(d_in).zip(y.chunks_exact(d_out)).zip(w) {
            let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
            let mut predicted = fit.c.clone();
            for (v, u) in fit.v.chunks_exact(d_in).zip(fit.u.chunks_exact(d_out)) {
                let z = dot(v, &x);
                predicted.iter_mut().zip(u).for_each(|(p, u)| *p += z * u);
            }
            let errors: Vec<f64> =
                predicted.iter().zip(y).map(|(p, &y)| p - f64::from(y)).collect();
            for j in 0..d_out {
                let along: f64 = (0..d_out).map(|i| a[i * d_out + j] * errors[i]).sum();
                loss += f64::from(*w) * along.powi(2);
            }
        }
        loss
    }

    #[test]
    fn an_exact_low_rank_map_is_found_from_two_parts() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let (d_in, d_out, rank) = (7, 5, 2);
        let (u, v) = (random(&mut rng, rank * d_out), random(&mut rng, rank * d_in));
        let (c, x) = (random(&mut rng, d_out), random(&mut rng, TOKENS * d_in));
        let weights: Vec<f32> = (0..TOKENS).map(|_| rng.random_range(0.1..2.0)).collect();
        let mut y = Vec::new();
        for x in x.chunks_exact(d_in) {
            let mut out = c.clone();
            for (v, u) in v.chunks_exact(d_in).zip(u.chunks_exact(d_out)) {
                let z: f32 = v.iter().zip(x).map(|(v, x)| v * x).sum();
                out.iter_mut().zip(u).for_each(|(o, u)| *o += z * u);
            }
            y.extend(out);
        }
        let mut moments = Moments::new(d_in, d_out);
        let half = TOKENS / 2;
        moments.add(&x[..half * d_in], &y[..half * d_out], &weights[..half]);
        moments.add(&x[half * d_in..], &y[half * d_out..], &weights[half..]);
        // A larger rank than needed does no harm, nor does one larger than there can be.
        let (metric, a) = random_metric(&mut rng, d_out);
        for rank in [2, 3, 99] {
            assert!(loss(&moments.fit(rank, 1e-9, &metric), &x, &y, &weights, &a) < 1e-5);
        }
        assert!(loss(&moments.fit(1, 1e-9, &metric), &x, &y, &weights, &a) > 1.0);
    }

    #[test]
    fn no_change_of_a_reduced_rank_fit_lowers_its_loss() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (d_in, d_out, rank) = (6, 8, 3);
        let (x, y) = (random(&mut rng, TOKENS * d_in), random(&mut rng, TOKENS * d_out));
        let weights: Vec<f32> = (0..TOKENS).map(|_| rng.random_range(0.1..2.0)).collect();
        let mut moments = Moments::new(d_in, d_out);
        moments.add(&x, &y, &weights);
        let (metric, a) = random_metric(&mut rng, d_out);
        let mut fit = moments.fit(rank, 1e-9, &metric);
        let best = loss(&fit, &x, &y, &weights, &a);
        let parts: [fn(&mut LowRank) -> &mut Vec<f64>; 3] =
            [|fit| &mut fit.u, |fit| &mut fit.v, |fit| &mut fit.c];
        for part in parts {
            for i in 0..part(&mut fit).len() {
                let kept = part(&mut fit)[i];
                for step in [1e-2, -1e-2] {
                    part(&mut fit)[i] = kept + step;
                    assert!(loss(&fit, &x, &y, &weights, &a) > best * (1.0 - 1e-6));
                }
                part(&mut fit)[i] = kept;
            }
        }
    }

    /// A covariance that rounding has left with a negative eigenvalue far beyond the ridge.
    #[test]
    fn a_covariance_that_is_none_gets_a_larger_ridge() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let (d_in, d_out) = (6, 4);
        let (x, y) = (random(&mut rng, TOKENS * d_in), random(&mut rng, TOKENS * d_out));
        let mut moments = Moments::new(d_in, d_out);
        moments.add(&x, &y, &[1.0; TOKENS]);
        let rows = d_in + 1;
        moments.xx[0] = moments.xx[rows * d_in].powi(2) / TOKENS as f64 - 1.0;
        let (metric, _) = random_metric(&mut rng, d_out);
        let fit = moments.fit(2, 1e-6, &metric);
        assert!([&fit.u, &fit.v, &fit.c].into_iter().flatten().all(|value| value.abs() < 1e3));
        // No ridge helps here; it ends all the same.
        moments.xx[0] = f64::NAN;
        assert!(moments.fit(2, 1e-6, &metric).v.iter().any(|value| !value.is_finite()));
    }

    #[test]
    fn constant_inputs_leave_the_mean() {
        let mut moments = Moments::new(3, 2);
        moments.add(&[2.0; 12], &[1.0, 5.0, 3.0, 5.0, 1.0, 5.0, 3.0, 5.0], &[1.0; 4]);
        let fit = moments.fit(2, 1e-3, &[1.0, 0.0, 0.0, 1.0]);
        let x = [2.0f64; 3];
        for (j, expected) in [2.0, 5.0].into_iter().enumerate() {
            let linear: f64 =
                (0..2).map(|r| dot(&fit.v[r * 3..][..3], &x) * fit.u[r * 2 + j]).sum();
            assert_relative_eq!(linear + fit.c[j], expected, epsilon = 1e-6);
        }
    }
}
