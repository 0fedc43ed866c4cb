//! Router scores on the CPU against the reference.

mod support;

use moefy::cpu::{self, Workspace};
use moefy::ffn::{Activation, Router, Selection};
use moefy::{Tensor, reference};
use support::{DTYPES, Random, Shape, on_threads, relative_error, widened};

#[test]
fn every_router_scores_like_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(3);
    let mut ws = Workspace::default();
    for router in 0..4 {
        for dtype in DTYPES {
            for (d_model, num_experts) in
                [(1, 1), (4, 3), (6, 6), (7, 3), (17, 2), (384, 48), (1100, 33)]
            {
                let shape = Shape {
                    d_model,
                    num_experts,
                    expert_width: 1,
                    shared: 0,
                    activation: Activation::Relu,
                    glu: false,
                    biases: false,
                    dtype,
                };
                let ffn = random.moe(&shape, router, Selection::top_k(1));
                let layer = cpu::MoeFfn::new(&ffn);
                for tokens in [0, 1, 2, 19, 99] {
                    let mut x = random.values(tokens * d_model);
                    // A token of zeros has no direction.
                    x.iter_mut().take(d_model).for_each(|x| *x = 0.0);
                    let x = if tokens == 1 { random.values(d_model) } else { x };
                    let scores = layer.scores(&x, &mut ws).unwrap().to_vec();
                    let expected = reference::router_scores(ffn.router(), &widened(&x), d_model);
                    let error = relative_error(&scores, &expected);
                    assert!(error < 1e-5, "router {router}, {shape:?}, {tokens} tokens: {error:e}");
                    assert_eq!(cpu::router_scores(ffn.router(), &x, d_model).unwrap(), scores);
                    for threads in [1, 2, 5] {
                        let again = on_threads(threads, || {
                            layer.scores(&x, &mut Workspace::default()).unwrap().to_vec()
                        });
                        assert_eq!(again, scores);
                    }
                }
            }
        }
    }
}

#[test]
fn tokens_that_do_not_fit_the_router_are_refused() {
    let w = Tensor::matrix(vec![0.5f32; 96], [3, 32]).unwrap();
    let router = Router::Linear { w };
    for (len, d_model, expected) in [
        (64, 64, "weight must be of shape [3, 64], got [3, 32]"),
        (33, 32, "a whole number of tokens of 32 values"),
        (0, 0, "a whole number of tokens of 0 values"),
    ] {
        let error = cpu::router_scores(&router, &vec![1.0; len], d_model).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
