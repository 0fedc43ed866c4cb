//! Reductions in an order that a compiler can vectorise: one partial result per lane.

/// As many as the widest registers have.
pub(super) const LANES: usize = 16;

/// Σ f(x).
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    fold(x, 0.0, |sum, x| sum + f(x), |a, b| a + b)
}

/// `step` from `init` over the elements of each lane, then `join` over the lanes.
#[inline(always)]
pub(super) fn fold(
    x: &[f32],
    init: f32,
    step: impl Fn(f32, f32) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [init; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, x);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// Copies `from` to the start of `to`: for a few elements, faster than calling `memcpy`.
#[inline(always)]
pub(super) fn copy(to: &mut [f32], from: &[f32]) {
    let to = &mut to[..from.len()];
    let (from, from_rest) = from.as_chunks::<LANES>();
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    to_rest.iter_mut().zip(from_rest).for_each(|(to, from)| *to = *from);
}
