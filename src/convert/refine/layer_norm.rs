//! Layer norm and its gradient with respect to its input.

use rayon::prelude::*;

use crate::model::LayerNorm;

/// What the way back needs: (x − mean)/σ \[T, d\] and 1/σ \[T\].
pub(super) struct Normalised {
    unit: Vec<f32>,
    inverse: Vec<f32>,
}

/// y = (x − mean)/σ · weight + bias, row by row.
pub(super) fn forward(mut x: Vec<f32>, norm: &LayerNorm<Vec<f32>>) -> (Vec<f32>, Normalised) {
    let d = norm.d_model;
    let mut y = vec![0.0; x.len()];
    let mut inverse = vec![0.0; x.len() / d];
    x.par_chunks_exact_mut(d).zip(y.par_chunks_exact_mut(d)).zip(&mut inverse).for_each(
        |((x, y), inverse)| {
            let mean = x.iter().sum::<f32>() / d as f32;
            x.iter_mut().for_each(|x| *x -= mean);
            let variance = x.iter().map(|x| x * x).sum::<f32>() / d as f32;
            *inverse = (f64::from(variance) + norm.epsilon).sqrt().recip() as f32;
            for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(&norm.weight).zip(&norm.bias) {
                *x *= *inverse;
                *y = *x * weight + bias;
            }
        },
    );
    (y, Normalised { unit: x, inverse })
}

/// dL/dy becomes dL/dx = (g − mean g − unit · mean(g ⊙ unit))/σ, with g = dL/dy ⊙ weight.
pub(super) fn backward(gradient: &mut [f32], normalised: &Normalised, norm: &LayerNorm<Vec<f32>>) {
    let d = norm.d_model;
    let rows = gradient.par_chunks_exact_mut(d).zip(normalised.unit.par_chunks_exact(d));
    rows.zip(&normalised.inverse).for_each(|((g, unit), inverse)| {
        g.iter_mut().zip(&norm.weight).for_each(|(g, weight)| *g *= weight);
        let mean = g.iter().sum::<f32>() / d as f32;
        let along = g.iter().zip(unit).map(|(g, u)| g * u).sum::<f32>() / d as f32;
        g.iter_mut().zip(unit).for_each(|(g, u)| *g = (*g - mean - u * along) * inverse);
    });
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{assert_gradient, dot, random};
    use super::*;

    #[test]
    fn gradient_is_that_of_finite_differences() {
        let d = 7;
        let norm =
            LayerNorm { weight: random(0, d), bias: random(1, d), d_model: d, epsilon: 1e-3 };
        let (x, direction) = (random(2, 3 * d), random(3, 3 * d));
        let (_, normalised) = forward(x.clone(), &norm);
        let mut gradient = direction.clone();
        backward(&mut gradient, &normalised, &norm);
        assert_gradient(&x, &gradient, |x| dot(&forward(x.to_vec(), &norm).0, &direction));
    }
}
