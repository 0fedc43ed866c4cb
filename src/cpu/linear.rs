//! Matrix products of f32 matrices.

use ::gemm::Parallelism;

/// A borrowed matrix of f32: element \[i, j\] is `data[i · strides[0] + j · strides[1]]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

/// A [`Matrix`] that can be written.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// The row-major matrix \[rows, cols\] at the start of `data`.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn new(data: &'a [f32], shape: [usize; 2]) -> Self {
        Self::with_strides(data, shape, [shape[1], 1])
    }

    /// A matrix with any strides, counted in elements.
    ///
    /// # Panics
    /// When the last element lies outside `data`.
    pub fn with_strides(data: &'a [f32], shape: [usize; 2], strides: [usize; 2]) -> Self {
        check_extent(data.len(), shape, strides);
        Self { data, shape, strides }
    }

    /// The same memory read as the transpose.
    pub fn transposed(self) -> Self {
        let ([r, c], [rs, cs]) = (self.shape, self.strides);
        Self { shape: [c, r], strides: [cs, rs], ..self }
    }
}

impl<'a> MatrixMut<'a> {
    /// The row-major matrix \[rows, cols\] at the start of `data`.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn new(data: &'a mut [f32], shape: [usize; 2]) -> Self {
        Self::with_strides(data, shape, [shape[1], 1])
    }

    /// A matrix with any strides, counted in elements, that keep its elements apart.
    ///
    /// # Panics
    /// When the last element lies outside `data`, or two elements share a place.
    pub fn with_strides(data: &'a mut [f32], shape: [usize; 2], strides: [usize; 2]) -> Self {
        check_extent(data.len(), shape, strides);
        let ([rows, cols], [rs, cs]) = (shape, strides);
        let apart = |inner: usize, count: usize, outer: usize| inner > 0 && outer >= inner * count;
        let row_or_column = rows <= 1 && cs > 0 || cols <= 1 && rs > 0;
        assert!(
            rows == 0
                || cols == 0
                || rows.max(cols) == 1
                || row_or_column
                || apart(cs, cols, rs)
                || apart(rs, rows, cs),
            "strides {strides:?} overlap in a matrix of shape {shape:?}"
        );
        Self { data, shape, strides }
    }
}

fn check_extent(len: usize, [rows, cols]: [usize; 2], [rs, cs]: [usize; 2]) {
    if rows == 0 || cols == 0 {
        return;
    }
    let last = (rows - 1).checked_mul(rs).zip((cols - 1).checked_mul(cs));
    let last = last.and_then(|(row, col)| row.checked_add(col));
    assert!(
        last.is_some_and(|last| last < len),
        "a matrix [{rows}, {cols}] with strides [{rs}, {cs}] does not fit {len} elements"
    );
}

/// c \[m, n\] = α · a \[m, k\] · b \[k, n\] + β · c, in f32. With β = 0 the old c is not read.
///
/// The bits depend neither on the number of threads nor on the layout of the pool: threads share
/// out tiles of c, and every element sums over k in one order.
///
/// # Panics
/// When the shapes do not fit together.
pub fn gemm(alpha: f32, a: Matrix<'_>, b: Matrix<'_>, beta: f32, c: MatrixMut<'_>) {
    let ([m, k], n) = (a.shape, b.shape[1]);
    assert!(
        b.shape[0] == k && c.shape == [m, n],
        "{:?} x {:?} is not {:?}",
        a.shape,
        b.shape,
        c.shape
    );
    // SAFETY: `check_extent` has shown that every element of the three matrices is inside its
    // slice, c's elements do not overlap, and c is borrowed exclusively.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr(),
            c.strides[1] as isize,
            c.strides[0] as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.data.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            // That crate's alpha is the factor of the destination.
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}

/// y \[T, out\] = x \[T, in\] · wᵀ + bias, with w \[out, in\] as `nn.Linear` stores it and bias
/// \[out\]; T is y.len() / out. The bits do not depend on the number of threads.
///
/// # Panics
/// When a slice's length is not what the sizes say.
pub fn linear(
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    in_features: usize,
    out_features: usize,
) {
    if out_features == 0 {
        return;
    }
    let tokens = y.len() / out_features;
    assert_eq!(y.len(), tokens * out_features, "y is not [T, out]");
    assert_eq!(x.len(), tokens * in_features, "x is not [T, in]");
    assert_eq!(w.len(), out_features * in_features, "w is not [out, in]");
    let beta = match bias {
        Some(bias) => {
            y.chunks_exact_mut(out_features).for_each(|y| y.copy_from_slice(bias));
            1.0
        }
        None => 0.0,
    };
    let x = Matrix::new(x, [tokens, in_features]);
    let w = Matrix::new(w, [out_features, in_features]);
    gemm(1.0, x, w.transposed(), beta, MatrixMut::new(y, [tokens, out_features]));
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    #[test]
    fn linear_is_the_product_plus_bias_on_any_number_of_threads() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for tokens in [0, 1, 2, 3, 19, 99] {
            for (in_features, out_features) in [(1, 1), (7, 5), (384, 130), (1031, 257)] {
                let x = random(&mut rng, tokens * in_features);
                let w = random(&mut rng, out_features * in_features);
                let bias = random(&mut rng, out_features);
                for bias in [None, Some(bias.as_slice())] {
                    let run = |threads| {
                        let mut y = vec![f32::NAN; tokens * out_features];
                        on_threads(threads, || {
                            linear(&mut y, &x, &w, bias, in_features, out_features)
                        });
                        y
                    };
                    let y = run(1);
                    assert_eq!(y, run(2));
                    assert_eq!(y, run(5));
                    for (t, x) in x.chunks_exact(in_features).enumerate() {
                        for (o, w) in w.chunks_exact(in_features).enumerate() {
                            let dot: f64 =
                                x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                            let expected = dot + bias.map_or(0.0, |b| f64::from(b[o]));
                            let got = f64::from(y[t * out_features + o]);
                            assert!((got - expected).abs() < 1e-4, "[{t}, {o}] {got} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gemm_reads_any_strides_and_writes_only_its_own_elements() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (m, n, k, stride) = (13, 6, 9, 20);
        let a = random(&mut rng, k * m);
        let b = random(&mut rng, n * k);
        let c = random(&mut rng, m * stride);
        let mut got = c.clone();
        gemm(
            2.0,
            Matrix::new(&a, [k, m]).transposed(),
            Matrix::with_strides(&b, [k, n], [1, k]),
            0.5,
            MatrixMut::with_strides(&mut got[3..], [m, n], [stride, 1]),
        );
        for i in 0..m {
            for j in 0..stride {
                let old = c[i * stride + j];
                let expected = if (3..3 + n).contains(&j) {
                    let dot: f32 = (0..k).map(|l| a[l * m + i] * b[(j - 3) * k + l]).sum();
                    2.0 * dot + 0.5 * old
                } else {
                    old
                };
                assert!((got[i * stride + j] - expected).abs() < 1e-5);
            }
        }
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_matrix_beyond_its_data_is_refused() {
        Matrix::with_strides(&[0.0; 9], [2, 5], [5, 1]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_cannot_be_written() {
        MatrixMut::with_strides(&mut [0.0; 99], [2, 5], [4, 1]);
    }
}
