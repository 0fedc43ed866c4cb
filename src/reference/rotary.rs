//! Rotary positions (arXiv 2104.09864, §3.2.2): elements i and i + d_head/2 of a head turn by
//! `position · base^(−2i/d_head)`.

/// x \[T, num_heads · d_head\] → the same.
pub fn rotary(x: &[f64], position_ids: &[u32], d_head: usize, base: f64) -> Vec<f64> {
    let half = d_head / 2;
    let width = (x.len() / position_ids.len().max(1)).max(1);
    let mut y = x.to_vec();
    for (token, &position) in y.chunks_exact_mut(width).zip(position_ids) {
        for head in token.chunks_exact_mut(d_head) {
            for i in 0..half {
                let angle = f64::from(position) * base.powf(-(2.0 * i as f64) / d_head as f64);
                let (sine, cosine) = angle.sin_cos();
                let (first, second) = (head[i], head[i + half]);
                head[i] = first * cosine - second * sine;
                head[i + half] = second * cosine + first * sine;
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::rotary;

    #[test]
    fn pairs_turn_at_their_own_rates() {
        // Of four elements the second pair turns base^(-1/2) as fast.
        let y = rotary(&[1.0, 1.0, 0.0, 0.0], &[1], 4, 10_000.0);
        let (sine, cosine) = 1.0f64.sin_cos();
        assert!((y[0] - cosine).abs() < 1e-12 && (y[2] - sine).abs() < 1e-12);
        assert!((y[1] - 0.01f64.cos()).abs() < 1e-12 && (y[3] - 0.01f64.sin()).abs() < 1e-12);
        assert_eq!(rotary(&[1.0, 2.0], &[0], 2, 10_000.0), [1.0, 2.0]);
        assert!(rotary(&[], &[], 4, 10_000.0).is_empty());
    }
}
