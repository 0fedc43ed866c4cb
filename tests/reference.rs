//! The reference itself: identities that follow from the mathematics, and small cases worked out by
//! hand.

use approx::assert_relative_eq;
use moefy::ffn::{
    Activation, Compensation, DenseFfn, ExpertMask, FfnTensors, Gate, MlpKind, MoeFfn, Partition,
    Router, Selection,
};
use moefy::reference::{dense_ffn, experts, moe_ffn, router_scores, select};
use moefy::{Tensor, TensorRef};
use proptest::prelude::*;
use rand::{Rng, RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

fn uniform(rng: &mut impl Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn random_dense(rng: &mut impl Rng, d_model: usize, d_ff: usize, glu: bool) -> DenseFfn {
    let [gate, input, output] = [0; 3].map(|_| uniform(rng, d_ff * d_model));
    let [gate_bias, input_bias] = [0; 2].map(|_| uniform(rng, d_ff));
    let output_bias = uniform(rng, d_model);
    let matrix = |data, shape| TensorRef::matrix(data, shape).unwrap();
    let tensors = FfnTensors {
        gate: glu.then(|| matrix(&gate[..], [d_ff, d_model])),
        gate_bias: glu.then(|| TensorRef::vector(&gate_bias)),
        input_bias: Some(TensorRef::vector(&input_bias)),
        output_bias: Some(TensorRef::vector(&output_bias)),
        ..FfnTensors::plain(matrix(&input, [d_ff, d_model]), matrix(&output, [d_model, d_ff]))
    };
    DenseFfn::new(Activation::Gelu, tensors).unwrap()
}

fn random_moe(rng: &mut impl Rng, [d, e, s, shared]: [usize; 4], glu: bool) -> MoeFfn {
    let dense = random_dense(rng, d, e * s + shared, glu);
    let mut labels: Vec<u32> = (0..e as u32).flat_map(|x| vec![x; s]).collect();
    labels.extend(vec![e as u32; shared]);
    labels.shuffle(rng);
    let partition = Partition::new(e, labels).unwrap();
    let router = Router::Linear { w: Tensor::matrix(uniform(rng, e * d), [e, d]).unwrap() };
    MoeFfn::new(&dense, partition, router, Selection::dynamic_k(0.5)).unwrap()
}

fn inputs(rng: &mut impl Rng, len: usize) -> Vec<f64> {
    uniform(rng, len).into_iter().map(f64::from).collect()
}

fn assert_close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).for_each(|(a, b)| assert_relative_eq!(a, b, epsilon = 1e-9));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn all_experts_are_the_dense_layer(
        d in 1usize..20, e in 1usize..9, s in 1usize..7, shared in 0usize..5, t in 0usize..4,
        glu: bool, mean: bool, seed: u64,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let mut moe = random_moe(rng, [d, e, s, shared], glu);
        if mean {
            let mean = Tensor::vector(uniform(rng, e * s + shared));
            moe = moe.with_compensation(Compensation::Mean { mean }).unwrap();
        }
        let x = inputs(rng, t * d);
        let dense = dense_ffn(&moe.to_dense(), &x);
        assert_close(&experts(&moe, &x, &ExpertMask::all(t, e), None), &dense);
        assert_close(&dense_ffn(moe.neurons(), &x), &dense);
    }

    #[test]
    fn disjoint_selections_add_up(
        d in 1usize..12, e in 2usize..9, s in 1usize..5, shared in 0usize..3, glu: bool, seed: u64,
    ) {
        // b2 and the shared neurons are in each of the three terms once.
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let moe = random_moe(rng, [d, e, s, shared], glu);
        let x = inputs(rng, d);
        let cut = rng.random_range(0..=e);
        let mut halves = [ExpertMask::none(1, e), ExpertMask::none(1, e)];
        (0..e).for_each(|expert| halves[usize::from(expert >= cut)].insert(0, expert));
        let [a, b] = halves.map(|mask| experts(&moe, &x, &mask, None));
        let none = experts(&moe, &x, &ExpertMask::none(1, e), None);
        let all = experts(&moe, &x, &ExpertMask::all(1, e), None);
        let sum: Vec<f64> = (0..d).map(|i| a[i] + b[i] - none[i]).collect();
        assert_close(&sum, &all);
    }

    #[test]
    fn converting_back_gives_the_same_bits(
        d in 1usize..12, e in 1usize..9, s in 1usize..5, shared in 0usize..3, glu: bool, seed: u64,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let dense = random_dense(rng, d, e * s + shared, glu);
        let mut labels: Vec<u32> = (0..(e * s) as u32).map(|n| n % e as u32).collect();
        labels.extend(vec![e as u32; shared]);
        labels.shuffle(rng);
        let router = Router::Linear { w: Tensor::matrix(uniform(rng, e * d), [e, d]).unwrap() };
        let partition = Partition::new(e, labels).unwrap();
        let moe = MoeFfn::new(&dense, partition, router, Selection::top_k(1)).unwrap();
        prop_assert_eq!(moe.to_dense(), dense);
    }

    #[test]
    fn a_higher_threshold_selects_a_subset(
        rows in prop::collection::vec(0.0f32..1.0, 1..70), low in 0.0f32..1.0, high in 0.0f32..1.0,
    ) {
        let (low, high) = (low.min(high), low.max(high));
        let selected = |threshold| select(&Selection::dynamic_k(threshold), &rows, rows.len()).mask;
        let (more, fewer) = (selected(low), selected(high));
        prop_assert!(fewer.count(0) >= 1);
        prop_assert!(fewer.experts(0).all(|e| more.contains(0, e)));
    }
}

fn selected(selection: Selection, row: &[f32]) -> Vec<usize> {
    select(&selection, row, row.len()).mask.experts(0).collect()
}

#[test]
fn top_k_breaks_ties_by_id() {
    assert_eq!(selected(Selection::top_k(2), &[1.0, 3.0, 3.0, 3.0]), [1, 2]);
    assert_eq!(selected(Selection::top_k(4), &[1.0, 3.0, f32::NAN, 2.0]), [0, 1, 3]);
}

#[test]
fn dynamic_k_compares_inclusively_in_f32() {
    assert_eq!(selected(Selection::dynamic_k(0.5), &[1.0, 2.0, 0.99999994, 4.0, 2.0]), [1, 3, 4]);
    assert_eq!(selected(Selection::dynamic_k(1.0), &[4.0, 2.0, 4.0]), [0, 2]);
    assert_eq!(selected(Selection::dynamic_k(0.0), &[4.0, 0.0, -1.0, f32::NAN]), [0, 1, 2]);
}

#[test]
fn dynamic_k_of_a_zero_row_runs_one_expert() {
    assert_eq!(selected(Selection::dynamic_k(0.3), &[0.0, 0.0, 0.0]), [0]);
    assert_eq!(selected(Selection::dynamic_k(0.3), &[f32::NAN, -1.0, 0.0, 0.0]), [2]);
    assert_eq!(selected(Selection::dynamic_k(0.0), &[0.0, 0.0, 0.0]), [0, 1, 2]);
}

#[test]
fn infinity_is_the_largest_score() {
    assert_eq!(selected(Selection::dynamic_k(0.5), &[1.0, f32::INFINITY, 2.0]), [1]);
    assert_eq!(selected(Selection::top_k(2), &[1.0, f32::INFINITY, 2.0]), [1, 2]);
    for share in [0.0, 0.5] {
        assert_eq!(selected(Selection::cumulative_share(share), &[1.0, f32::INFINITY, 2.0]), [1]);
    }
}

#[test]
fn a_row_without_a_finite_score_selects_nothing() {
    let rows = [f32::NAN, f32::NEG_INFINITY, 1.0, 2.0];
    let selected = select(&Selection::dynamic_k(0.9), &rows, 2);
    assert_eq!((selected.mask.count(0), selected.mask.count(1)), (0, 1));
    assert_eq!(selected.rows_without_score, 1);
}

#[test]
fn cumulative_share_includes_the_expert_that_crosses() {
    let row = [0.1, 0.4, 0.2, 0.3];
    assert_eq!(selected(Selection::cumulative_share(0.5), &row), [1, 3]);
    assert_eq!(selected(Selection::cumulative_share(1.0), &row), [0, 1, 2, 3]);
    assert_eq!(selected(Selection::cumulative_share(0.0), &row), [1]);
}

#[test]
fn the_cap_keeps_the_best() {
    let capped = Selection { max_experts: Some(2), ..Selection::dynamic_k(0.1) };
    assert_eq!(selected(capped, &[1.0, 3.0, 2.0, 3.0]), [1, 3]);
}

/// W1 = W2 = identity on two neurons, identity activation: an expert is a coordinate of x.
fn two_coordinates(gate: Gate) -> MoeFfn {
    let identity = [1.0f32, 0.0, 0.0, 1.0];
    let w = TensorRef::matrix(&identity, [2, 2]).unwrap();
    let bias = [100.0f32, 200.0];
    let tensors =
        FfnTensors { output_bias: Some(TensorRef::vector(&bias)), ..FfnTensors::plain(w, w) };
    let dense = DenseFfn::new(Activation::Identity, tensors).unwrap();
    let router = Router::Linear { w: w.to_owned() };
    let partition = Partition::new(2, vec![0, 1]).unwrap();
    MoeFfn::new(&dense, partition, router, Selection::top_k(1)).unwrap().with_gate(gate)
}

#[test]
fn gates_weigh_the_selected_experts() {
    let (e1, e3) = (1f64.exp(), 3f64.exp());
    let expected = [
        (Gate::One, 3.0),
        (Gate::Score, 9.0),
        (Gate::Softmax, 3.0 * e3 / (e1 + e3)),
        (Gate::Renormalised, 3.0),
    ];
    for (gate, second) in expected {
        let (y, mask) = moe_ffn(&two_coordinates(gate), &[1.0, 3.0]);
        assert_eq!(mask.experts(0).collect::<Vec<_>>(), [1]);
        assert_close(&y, &[100.0, 200.0 + second]);
    }
}

#[test]
fn a_skipped_neuron_contributes_its_mean() {
    let mean = Tensor::vector(vec![0.25f32, 0.5]);
    let moe = two_coordinates(Gate::One).with_compensation(Compensation::Mean { mean }).unwrap();
    assert_close(&moe_ffn(&moe, &[1.0, 3.0]).0, &[100.25, 203.0]);
}

#[test]
fn a_linear_compensation_is_always_added() {
    let [u, v] =
        [vec![1.0f32, 10.0], vec![2.0f32, 0.0]].map(|row| Tensor::matrix(row, [1, 2]).unwrap());
    let c = Tensor::vector(vec![0.5f32, 0.0]);
    let linear = Compensation::Linear { u, v, c };
    let moe = two_coordinates(Gate::One).with_compensation(linear).unwrap();
    // V x = 2, so U V x = (2, 20).
    assert_close(&moe_ffn(&moe, &[1.0, 3.0]).0, &[102.5, 223.0]);
}

#[test]
fn routers_follow_their_formulas() {
    let matrix = |rows: &[f32], shape| Tensor::matrix(rows.to_vec(), shape).unwrap();
    let x = [3.0, -4.0];
    let scores = |router| router_scores(&router, &x, 2);
    assert_close(&scores(Router::Linear { w: matrix(&[1.0, 1.0, 1.0, 0.0], [2, 2]) }), &[1.0, 3.0]);
    let centroids = matrix(&[0.0, -2.0, 0.0, 2.0, 0.0, 0.0], [3, 2]);
    assert_close(&scores(Router::Centroid { centroids }), &[0.8, 0.0, 0.0]);
    let [w1, w2] = [[1.0, 0.0, 0.0, 1.0], [-1.0, 1.0, 1.0, 1.0]].map(|m| matrix(&m, [2, 2]));
    let mlp = |kind| Router::Mlp { kind, w1: w1.clone(), w2: w2.clone() };
    // relu(x) = (3, 0).
    assert_close(&scores(mlp(MlpKind::D2dMoe)), &[3.0, 3.0]);
    let (a, b) = (0.6f64.tanh(), (-0.8f64).tanh());
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    assert_close(&scores(mlp(MlpKind::Moefication)), &[sigmoid(b - a), sigmoid(a + b)]);
}

#[test]
fn activations_have_their_textbook_values() {
    let at = |activation: Activation| activation.apply(1.0);
    assert_relative_eq!(at(Activation::Gelu), 0.8413447460685429, epsilon = 1e-12);
    assert_relative_eq!(at(Activation::GeluTanh), 0.8411919906082768, epsilon = 1e-12);
    assert_relative_eq!(at(Activation::Silu), 0.7310585786300049, epsilon = 1e-12);
    assert_eq!(Activation::Relu.apply(-1.0), 0.0);
    assert_eq!(Activation::Identity.apply(-1.0), -1.0);
}
