//! The co-activation graph, cut into equal parts.

use rand::Rng;

use crate::error::Result;

/// Labels \[N\] of `num_parts` equal parts for symmetric `weights` \[N, N\]: METIS cuts the graph of
/// every neuron's strongest edges so that little weight is cut, and what METIS leaves unbalanced is
/// balanced by the best assignment of neurons to its parts, by their total weight there.
#[cfg(feature = "metis")]
pub(super) fn cut(weights: &[f32], num_parts: usize, rng: &mut impl Rng) -> Result<Vec<u32>> {
    let cut = metis_labels(weights, num_parts, rng.next_u32() >> 1)?;
    Ok(balanced(weights, num_parts, &cut))
}

/// Without METIS there is no cut.
#[cfg(not(feature = "metis"))]
pub(super) fn cut(_: &[f32], _: usize, _: &mut impl Rng) -> Result<Vec<u32>> {
    let expected = "kmeans, joint or random in a build without the feature `metis`";
    Err(crate::Error::argument("partition", "method", expected, "graph"))
}

/// Edges of a neuron that are kept, with those of its neighbours to it.
#[cfg(feature = "metis")]
const EDGES: usize = 64;
/// The largest weight of an edge: METIS counts in 32-bit integers.
#[cfg(feature = "metis")]
const MAX_WEIGHT: f32 = 10_000.0;

#[cfg(feature = "metis")]
fn metis_labels(weights: &[f32], num_parts: usize, seed: u32) -> Result<Vec<u32>> {
    use metis::{Graph, option};

    let count = weights.len().isqrt();
    if num_parts == 1 {
        return Ok(vec![0; count]);
    }
    let mut kept = vec![false; count * count];
    let mut order: Vec<usize> = Vec::new();
    let mut strongest = 0.0f32;
    for (n, row) in weights.chunks_exact(count).enumerate() {
        order.clear();
        order.extend((0..count).filter(|&m| m != n && row[m] > 0.0));
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        for &m in order.iter().take(EDGES) {
            (kept[n * count + m], kept[m * count + n]) = (true, true);
            strongest = strongest.max(row[m]);
        }
    }
    let (mut offsets, mut neighbours, mut edge_weights) = (vec![0], Vec::new(), Vec::new());
    for n in 0..count {
        for m in (0..count).filter(|m| kept[n * count + m]) {
            // The sums of a product and of its transpose differ by rounding; METIS wants one weight.
            let weight = weights[n.min(m) * count + n.max(m)];
            neighbours.push(m as i32);
            edge_weights.push((weight / strongest * MAX_WEIGHT).ceil().max(1.0) as i32);
        }
        offsets.push(neighbours.len() as i32);
    }
    let refuse = |e: &dyn std::fmt::Display| {
        crate::Error::argument("partition", "graph", "one that METIS can cut", e)
    };
    let mut labels = vec![0i32; count];
    Graph::new(1, num_parts as i32, &offsets, &neighbours)
        .map_err(|e| refuse(&e))?
        .set_adjwgt(&edge_weights)
        .set_option(option::Seed(seed as i32))
        .part_kway(&mut labels)
        .map_err(|e| refuse(&e))?;
    Ok(labels.into_iter().map(|label| label as u32).collect())
}

/// The balanced labels with the largest sum of every neuron's weight to the part that it goes to, as
/// the parts were.
#[cfg(feature = "metis")]
fn balanced(weights: &[f32], num_parts: usize, labels: &[u32]) -> Vec<u32> {
    const EPSILON: f64 = 1e-5;
    let count = labels.len();
    let mut scores = vec![0.0f32; count * num_parts];
    for (n, row) in weights.chunks_exact(count).enumerate() {
        let scores = &mut scores[n * num_parts..][..num_parts];
        for (m, &label) in labels.iter().enumerate().filter(|(m, _)| *m != n) {
            scores[label as usize] += row[m];
        }
        let total: f32 = scores.iter().sum();
        scores.iter_mut().for_each(|score| *score /= total.max(f32::MIN_POSITIVE));
    }
    super::assignment::assign(&scores, &mut vec![0.0; num_parts], EPSILON)
}
