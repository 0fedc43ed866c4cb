//! Attention on the CPU against the reference.

mod support;

use moefy::cpu::Cpu;
use moefy::model::{Backend, Batch};
use moefy::reference;
use support::{Random, on_threads, relative_error, widened};

/// More rows than the batch has: an operation must leave them alone.
const GUARD: usize = 3;

fn batch(lengths: &[usize]) -> Batch {
    Batch::pack(lengths.iter().map(|&length| vec![0; length])).unwrap()
}

fn attention(qkv: &[f32], batch: &Batch, d_model: usize, num_heads: usize) -> Vec<f32> {
    let device_batch = Cpu.batch(batch, vec![0; batch.num_tokens()]).unwrap();
    let used = batch.num_tokens() * d_model;
    let mut y = vec![f32::NAN; used + GUARD * d_model];
    Cpu.attention(&mut y, &qkv.to_vec(), &device_batch, d_model, num_heads).unwrap();
    assert!(y.split_off(used).into_iter().all(f32::is_nan));
    y
}

#[test]
fn attention_is_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(1);
    let batches: [&[usize]; 7] =
        [&[], &[1], &[2, 1, 1], &[19], &[3, 130, 7], &[64, 65, 63], &[15, 16, 17, 99]];
    for [num_heads, d_head] in [[1, 1], [3, 5], [2, 8], [4, 16], [12, 32], [1, 80]] {
        for lengths in batches {
            let (d_model, batch) = (num_heads * d_head, batch(lengths));
            let qkv = random.values((batch.num_tokens() + GUARD) * 3 * d_model);
            let y = attention(&qkv, &batch, d_model, num_heads);
            let used = widened(&qkv[..batch.num_tokens() * 3 * d_model]);
            let expected =
                reference::attention(&used, batch.sequence_offsets(), d_model, num_heads);
            let error = relative_error(&y, &expected);
            assert!(error < 2e-6, "{num_heads} x {d_head}, {lengths:?}: {error:e}");
            for threads in [1, 2, 5] {
                assert_eq!(on_threads(threads, || attention(&qkv, &batch, d_model, num_heads)), y);
            }
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    let mut random = Random::new(2);
    let (d_model, num_heads, lengths) = (24, 3, [70, 1, 33, 128, 5]);
    let all = batch(&lengths);
    let qkv = random.values(all.num_tokens() * 3 * d_model);
    let y = attention(&qkv, &all, d_model, num_heads);
    for (bounds, length) in all.sequence_offsets().windows(2).zip(lengths) {
        let tokens = bounds[0] as usize..bounds[1] as usize;
        let qkv = &qkv[tokens.start * 3 * d_model..tokens.end * 3 * d_model];
        let alone = attention(qkv, &batch(&[length]), d_model, num_heads);
        assert_eq!(alone, y[tokens.start * d_model..tokens.end * d_model]);
    }
}

/// Scores of ±1e4 overflow an exponential that is taken before subtracting the largest.
#[test]
fn large_scores_do_not_overflow() {
    let mut random = Random::new(3);
    let (d_model, num_heads, batch) = (16, 1, batch(&[40]));
    let qkv: Vec<f32> =
        random.values(40 * 3 * d_model).into_iter().map(|v| (v * 100.0).round()).collect();
    let y = attention(&qkv, &batch, d_model, num_heads);
    let expected =
        reference::attention(&widened(&qkv), batch.sequence_offsets(), d_model, num_heads);
    assert!(relative_error(&y, &expected) < 1e-5);
}

#[test]
fn nan_stays_in_its_sequence() {
    let mut random = Random::new(4);
    let (d_model, num_heads, batch) = (10, 2, batch(&[5, 9, 20]));
    let clean = random.values(34 * 3 * d_model);
    let mut qkv = clean.clone();
    qkv[7 * 3 * d_model..8 * 3 * d_model].fill(f32::NAN);
    on_threads(1, || {
        let (y, expected) = [&qkv, &clean].map(|x| attention(x, &batch, d_model, num_heads)).into();
        assert_eq!(y[..5 * d_model], expected[..5 * d_model]);
        assert!(y[5 * d_model..14 * d_model].iter().all(|v| v.is_nan()));
        assert_eq!(y[14 * d_model..], expected[14 * d_model..]);
    });
}
