//! Layer norm on the CPU against the reference.

mod support;

use moefy::cpu::Cpu;
use moefy::model::{Backend, LayerNorm};
use moefy::reference;
use support::{Random, on_threads, relative_error, widened};

#[test]
fn layer_norm_is_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(1);
    for d_model in [1, 2, 7, 16, 33, 384] {
        let norm = LayerNorm {
            weight: random.values(d_model),
            bias: random.values(d_model),
            epsilon: random.pick(&[1e-12, 1e-5]),
            d_model,
        };
        for num_tokens in [0, 1, 2, 19, 99] {
            let used = num_tokens * d_model;
            // One row more than there are tokens, to be left alone.
            let x: Vec<f32> = random.values(used + d_model).iter().map(|x| 3.0 + x).collect();
            let branch = random.values(used + d_model);
            for branch in [None, Some(&branch)] {
                let run = || {
                    let mut y = x.clone();
                    Cpu.layer_norm(&mut y, branch, &norm, num_tokens).unwrap();
                    y
                };
                let y = run();
                let mut sum = widened(&x[..used]);
                if let Some(branch) = branch {
                    sum.iter_mut().zip(branch).for_each(|(x, &b)| *x += f64::from(b));
                }
                let (weight, bias) = (widened(&norm.weight), widened(&norm.bias));
                let expected = reference::layer_norm(&weight, &bias, norm.epsilon, &sum);
                let error = relative_error(&y[..used], &expected);
                // Two values that nearly agree lose digits in x + branch already.
                let bound = if d_model == 2 { 1e-3 } else { 5e-6 };
                assert!(error < bound, "{num_tokens} x {d_model}: {error:e}");
                assert_eq!(y[used..], x[used..]);
                for threads in [1, 2, 5] {
                    assert_eq!(on_threads(threads, run), y);
                }
            }
        }
    }
}
