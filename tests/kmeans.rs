//! Balanced k-means.

mod support;

use moefy::convert::partition::{Clusters, balanced_kmeans};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use support::{Random, on_threads};

fn unit_rows(random: &mut Random, num_rows: usize, dim: usize) -> Vec<f32> {
    let mut rows = random.values(num_rows * dim);
    for row in rows.chunks_exact_mut(dim) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    rows
}

fn cluster(rows: &[f32], dim: usize, num_clusters: usize, seed: u64) -> Clusters {
    balanced_kmeans(rows, dim, num_clusters, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap()
}

/// Clusters of long rows are those of short ones; rows whose distances are not finite are refused.
#[test]
fn long_rows() {
    let rows = unit_rows(&mut Random::new(9), 24, 5);
    let labels = cluster(&rows, 5, 4, 0).labels;
    let mut scaled = rows.clone();
    for scale in [2f32.powi(20), 2f32.powi(60)] {
        scaled.iter_mut().zip(&rows).for_each(|(scaled, x)| *scaled = x * scale);
        assert_eq!(cluster(&scaled, 5, 4, 0).labels, labels, "{scale:e}");
    }
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    for wrong in [f32::NAN, f32::INFINITY, 1e20] {
        scaled[7] = wrong;
        let error = balanced_kmeans(&scaled, 5, 4, rng).unwrap_err().to_string();
        assert!(error.contains("finite squared length") && error.contains("row 1"), "{error}");
    }
    for (rows, dim, num_clusters) in [(&rows[..], 5, 7), (&rows[1..], 5, 4), (&[], 5, 4)] {
        let error = balanced_kmeans(rows, dim, num_clusters, rng).unwrap_err().to_string();
        assert!(error.contains("positive multiple"), "{error}");
    }
    assert!(
        balanced_kmeans(&rows, 0, 4, rng).is_err() && balanced_kmeans(&rows, 5, 0, rng).is_err()
    );
}

/// Sum of squared distances to the means of the labels, in f64.
fn inertia(rows: &[f32], dim: usize, num_clusters: usize, labels: &[u32]) -> f64 {
    let mut means = vec![0.0f64; num_clusters * dim];
    let size = (rows.len() / dim / num_clusters) as f64;
    let cell = |label: u32, i: usize| label as usize * dim + i;
    for (row, &label) in rows.chunks_exact(dim).zip(labels) {
        row.iter().enumerate().for_each(|(i, &x)| means[cell(label, i)] += f64::from(x) / size);
    }
    rows.chunks_exact(dim).zip(labels).fold(0.0, |sum, (row, &label)| {
        let square = |(i, &x): (usize, &f32)| (f64::from(x) - means[cell(label, i)]).powi(2);
        sum + row.iter().enumerate().map(square).sum::<f64>()
    })
}

#[test]
fn labels_are_balanced_and_centroids_are_their_own() {
    let mut random = Random::new(0);
    for (num_rows, dim, num_clusters) in
        [(1, 1, 1), (7, 3, 7), (12, 1, 3), (99, 19, 9), (96, 64, 4)]
    {
        let rows = unit_rows(&mut random, num_rows, dim);
        let Clusters { labels, centroids, inertia: reported } =
            cluster(&rows, dim, num_clusters, 1);
        for label in 0..num_clusters as u32 {
            let members: Vec<usize> = (0..num_rows).filter(|&r| labels[r] == label).collect();
            assert_eq!(members.len(), num_rows / num_clusters);
            for i in 0..dim {
                let sum: f32 = members.iter().map(|&r| rows[r * dim + i]).sum();
                let centroid = centroids[label as usize * dim + i];
                assert!((sum / members.len() as f32 - centroid).abs() < 1e-6);
            }
        }
        let expected = inertia(&rows, dim, num_clusters, &labels);
        assert!((reported - expected).abs() < 1e-4 * (1.0 + expected), "{reported} {expected}");
    }
}

#[test]
fn no_exchange_of_two_rows_gains_much() {
    let (num_rows, dim, num_clusters) = (60, 40, 6);
    let rows = unit_rows(&mut Random::new(5), num_rows, dim);
    let clusters = cluster(&rows, dim, num_clusters, 0);
    let mut best = clusters.inertia;
    for a in 0..num_rows {
        for b in 0..a {
            let mut labels = clusters.labels.clone();
            labels.swap(a, b);
            best = best.min(inertia(&rows, dim, num_clusters, &labels));
        }
    }
    // Against a random split, the search gains several units.
    let split: Vec<u32> = (0..num_rows as u32).map(|r| r % num_clusters as u32).collect();
    let gain = inertia(&rows, dim, num_clusters, &split) - clusters.inertia;
    assert!(clusters.inertia - best < 0.05 * gain, "{} {best} {gain}", clusters.inertia);
}

#[test]
fn threads_do_not_change_a_bit() {
    let (num_rows, dim, num_clusters) = (480, 96, 24);
    let rows = unit_rows(&mut Random::new(2), num_rows, dim);
    let run = |threads| on_threads(threads, || cluster(&rows, dim, num_clusters, 7));
    let (one, three) = (run(1), run(3));
    assert_eq!(one.labels, three.labels);
    assert_eq!(one.centroids, three.centroids);
    assert_eq!(one.inertia.to_bits(), three.inertia.to_bits());
}

#[test]
fn rows_that_are_all_alike_or_zero_are_split_all_the_same() {
    for value in [0.0, 0.5] {
        let clusters = cluster(&[value; 24 * 4], 4, 6, 0);
        for label in 0..6 {
            assert_eq!(clusters.labels.iter().filter(|&&l| l == label).count(), 4);
        }
        assert!(clusters.inertia < 1e-9);
    }
}
