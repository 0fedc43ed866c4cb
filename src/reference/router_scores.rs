//! The scores r\[t, e\] of the three routers.

use super::dot;
use crate::ffn::{MlpKind, Router};

/// x \[T, d_model\] → r \[T, E\].
pub fn router_scores(router: &Router, x: &[f64], d_model: usize) -> Vec<f64> {
    match router {
        Router::Linear { w } => {
            let w = w.to_f64();
            per_token(x, d_model, |x| matvec(&w, x).into_iter().map(f64::abs).collect())
        }
        Router::Mlp { kind: MlpKind::D2dMoe, w1, w2 } => {
            let (w1, w2) = (w1.to_f64(), w2.to_f64());
            per_token(x, d_model, |x| {
                let hidden: Vec<f64> = matvec(&w1, x).into_iter().map(|z| z.max(0.0)).collect();
                matvec(&w2, &hidden).into_iter().map(f64::abs).collect()
            })
        }
        Router::Mlp { kind: MlpKind::Moefication, w1, w2 } => {
            let (w1, w2) = (w1.to_f64(), w2.to_f64());
            per_token(x, d_model, |x| {
                let hidden: Vec<f64> = matvec(&w1, &unit(x)).into_iter().map(f64::tanh).collect();
                matvec(&w2, &hidden).into_iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect()
            })
        }
        Router::Centroid { centroids } => {
            let centroids = centroids.to_f64();
            let unit_centroids: Vec<f64> = centroids.chunks_exact(d_model).flat_map(unit).collect();
            per_token(x, d_model, |x| {
                matvec(&unit_centroids, &unit(x)).into_iter().map(|cos| cos.max(0.0)).collect()
            })
        }
    }
}

fn per_token(x: &[f64], d_model: usize, scores: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    x.chunks_exact(d_model).flat_map(scores).collect()
}

fn matvec(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// x/‖x‖, or zero for the zero vector.
fn unit(x: &[f64]) -> Vec<f64> {
    let norm = dot(x, x).sqrt();
    x.iter().map(|v| if norm == 0.0 { 0.0 } else { v / norm }).collect()
}
