//! Activations over slices, written so that the compiler vectorises them: no branch, no call.

use pulp::{Arch, WithSimd};

use crate::ffn::Activation;

/// z\[i\] ← φ(z\[i\]), in f32.
///
/// Within about 1e-6 of the exact value, relative, wherever the result is a normal number (GeluTanh
/// loses accuracy with the size of its exponent, 1e-7 · |log φ(z)/z|).
pub fn activate(activation: Activation, z: &mut [f32]) {
    match activation {
        Activation::Relu => map(z, |z| z.max(0.0)),
        Activation::Gelu => map(z, gelu),
        Activation::GeluTanh => map(z, gelu_tanh),
        Activation::Silu => map(z, |z| z * sigmoid(z)),
        Activation::Identity => {}
    }
}

/// z\[i\] ← φ(z\[i\]) and slope\[i\] ← φ′(z\[i\]), in f32; φ′(0) of a ReLU is 0.
pub(crate) fn activate_with_slope(activation: Activation, z: &mut [f32], slope: &mut [f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    slope.copy_from_slice(z);
    match activation {
        Activation::Relu => map(slope, |z| if z > 0.0 { 1.0 } else { 0.0 }),
        Activation::Gelu => map(slope, |z| {
            const INVERSE_SQRT_2_PI: f32 = 0.398_942_3;
            normal_cdf(z) + z * INVERSE_SQRT_2_PI * exp(-0.5 * z * z, 0.0)
        }),
        Activation::GeluTanh => map(slope, |z| {
            let inner = SQRT_2_OVER_PI * (z + 0.044715 * (z * z * z));
            let s = sigmoid(2.0 * inner);
            s + z * s * (1.0 - s) * 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * z * z)
        }),
        Activation::Silu => map(slope, |z| {
            let s = sigmoid(z);
            s + z * s * (1.0 - s)
        }),
        Activation::Identity => slope.fill(1.0),
    }
    activate(activation, z);
}

/// z\[i\] ← f(z\[i\]) with the widest instructions that the machine has.
pub(super) fn map(z: &mut [f32], f: impl Fn(f32) -> f32) {
    struct Map<'a, F>(&'a mut [f32], F);
    impl<F: Fn(f32) -> f32> WithSimd for Map<'_, F> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) {
            let Self(z, f) = self;
            simd.vectorize(|| z.iter_mut().for_each(|z| *z = f(*z)));
        }
    }
    Arch::new().dispatch(Map(z, f));
}

/// 1 / (1 + e^−z). The exponential never overflows, and no digits cancel for negative z.
#[inline(always)]
pub(super) fn sigmoid(z: f32) -> f32 {
    let e = exp(-z.abs(), 0.0);
    (if z < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

/// tanh, within 1e-7 absolute.
#[inline(always)]
pub(super) fn tanh(z: f32) -> f32 {
    let e = exp(-2.0 * z.abs(), 0.0);
    ((1.0 - e) / (1.0 + e)).copysign(z)
}

#[inline(always)]
fn gelu_tanh(z: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    z * sigmoid(TWICE_SQRT_2_OVER_PI * (z + 0.044715 * (z * z * z)))
}

#[inline(always)]
fn gelu(z: f32) -> f32 {
    z * normal_cdf(z)
}

/// Φ(z), where Φ(−v) = e^(−v²/2) · t · P(t) for v ≥ 0 and t = 1 / (1 + 0.21 v). P, of degree 8,
/// was fitted in f64 at the Chebyshev nodes of 0 ≤ v ≤ 14.5; its relative error is 2.3e-8.
#[inline(always)]
fn normal_cdf(z: f32) -> f32 {
    const P: [f32; 9] = [
        0.083_712_28,
        0.085_061_17,
        0.069_219_87,
        0.124_859_675,
        -0.094_098_92,
        0.349_927_08,
        -0.330_938_86,
        0.284_023_94,
        -0.071_766_25,
    ];
    let v = if z.abs() > 14.5 { 14.5 } else { z.abs() };
    let t = 1.0 / (1.0 + 0.21 * v);
    // The square of the upper 12 bits is exact, so that −v²/2 = hi + lo loses nothing.
    let upper = f32::from_bits(v.to_bits() & 0xffff_f000);
    let (hi, lo) = (-0.5 * upper * upper, -0.5 * (v - upper) * (v + upper));
    let tail = exp(hi, lo) * t * polynomial(&P, t);
    if z < 0.0 { tail } else { 1.0 - tail }
}

/// e^(x + lo) for x ≤ 0 and a small lo; 0 where that is not a normal number.
#[inline(always)]
pub(super) fn exp(x: f32, lo: f32) -> f32 {
    /// Fitted at the Chebyshev nodes of |r| ≤ ln 2 / 2: relative error 3e-9.
    const P: [f32; 7] = [1.0, 1.0, 0.5, 0.166_664_15, 0.041_666_217, 0.008_375_129, 0.001_394_858];
    /// Adding it rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; products of the first with |n| < 128 are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1] + lo;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < -87.0 { 0.0 } else { power * polynomial(&P, r) }
}

#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[f32; N], x: f32) -> f32 {
    let mut value = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        value = value * x + coefficients[i];
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(activation: Activation, z: f32) -> f64 {
        match activation {
            // The definition cancels for negative z.
            Activation::Gelu => {
                let z = f64::from(z);
                0.5 * z * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2)
            }
            Activation::GeluTanh => {
                let z = f64::from(z);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z * z * z);
                z / (1.0 + (-2.0 * inner).exp())
            }
            other => other.apply(f64::from(z)),
        }
    }

    #[test]
    fn every_activation_is_close_to_its_definition() {
        let inputs: Vec<f32> =
            (-200_000..=200_000).map(|i| i as f32 * 1e-4).chain([1e-30, -1e-30, 3e38]).collect();
        for activation in Activation::ALL {
            let mut got = inputs.clone();
            activate(activation, &mut got);
            let mut worst = 0.0f64;
            for (&z, &got) in inputs.iter().zip(&got) {
                let expected = exact(activation, z);
                if expected.abs() < 1e-36 {
                    assert!(got.abs() < 1e-36, "{activation:?}({z}) = {got}, not {expected}");
                    continue;
                }
                let error = (f64::from(got) - expected).abs() / expected.abs();
                let exponent = (expected / f64::from(z)).abs().ln().abs();
                let scale = if activation == Activation::GeluTanh { 1.0 + exponent } else { 1.0 };
                worst = worst.max(error / scale);
            }
            assert!(worst < 6e-7, "{activation:?}: {worst:e}");
        }
    }

    #[test]
    fn slopes_agree_with_central_differences() {
        // Beside 0, where a ReLU has a kink.
        let inputs: Vec<f32> = (-8000..8000).map(|i| i as f32 * 1e-3 + 5e-4).collect();
        for activation in Activation::ALL {
            let (mut values, mut slopes) = (inputs.clone(), vec![f32::NAN; inputs.len()]);
            activate_with_slope(activation, &mut values, &mut slopes);
            let mut plain = inputs.clone();
            activate(activation, &mut plain);
            assert_eq!(values, plain);
            for (&z, &slope) in inputs.iter().zip(&slopes) {
                let at = |delta: f64| activation.apply(f64::from(z) + delta);
                let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                let error = (f64::from(slope) - expected).abs();
                assert!(error < 3e-6, "{activation:?}'({z}) = {slope}, not {expected}");
            }
        }
    }

    #[test]
    fn huge_and_undefined_inputs_stay_what_they_are() {
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
            let mut z = [f32::NAN, f32::INFINITY, -1e30];
            activate(activation, &mut z);
            assert!(z[0].is_nan() && z[1] == f32::INFINITY && z[2] == 0.0, "{activation:?} {z:?}");
        }
    }

    #[test]
    fn sigmoid_and_tanh() {
        for i in -3000..3000 {
            let z = i as f32 * 0.01;
            let exact = f64::from(z);
            assert!((f64::from(tanh(z)) - exact.tanh()).abs() < 2e-7);
            let expected = 1.0 / (1.0 + (-exact).exp());
            assert!((f64::from(sigmoid(z)) - expected).abs() < 3e-7 * expected);
        }
    }
}
