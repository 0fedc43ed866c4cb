//! Selection on the CPU gives the bits of the reference.

use moefy::ffn::{ExpertMask, Selection, SelectionRule};
use moefy::{cpu, reference};
use proptest::prelude::*;

/// Scores with many ties, zeros of both signs, and everything that is not a number.
fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (0u8..6).prop_map(|v| f32::from(v) * 0.25),
        4 => 0.0f32..1.0,
        1 => Just(-0.0f32),
        1 => -1.0f32..0.0,
        1 => prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
        1 => prop_oneof![Just(1e-45f32), Just(f32::MAX), Just(f32::MIN)],
    ]
}

fn rule(num_experts: usize) -> impl Strategy<Value = SelectionRule> {
    let unit = || prop_oneof![Just(0.0f32), Just(1.0f32), Just(0.25f32), 0.0f32..1.0];
    prop_oneof![
        (1..=num_experts).prop_map(|k| SelectionRule::TopK { k }),
        unit().prop_map(|rel_threshold| SelectionRule::DynamicK { rel_threshold }),
        unit().prop_map(|share| SelectionRule::CumulativeShare { share }),
    ]
}

fn case() -> impl Strategy<Value = (Selection, usize, Vec<f32>)> {
    (1usize..100, 0usize..20).prop_flat_map(|(num_experts, num_tokens)| {
        let selection = (rule(num_experts), proptest::option::of(1usize..num_experts + 3))
            .prop_map(|(rule, max_experts)| Selection { rule, max_experts });
        let row = prop_oneof![
            12 => proptest::collection::vec(score(), num_experts),
            1 => Just(vec![0.0; num_experts]),
            1 => Just(vec![f32::NAN; num_experts]),
            1 => Just(vec![f32::INFINITY; num_experts]),
        ];
        let rows = proptest::collection::vec(row, num_tokens);
        (selection, Just(num_experts), rows.prop_map(|rows| rows.concat()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn bits_are_those_of_the_reference((selection, num_experts, scores) in case()) {
        let num_tokens = scores.len() / num_experts;
        let expected = reference::select(&selection, &scores, num_experts);
        // Old bits must go.
        let mut mask = ExpertMask::all(num_tokens, num_experts);
        let rows_without_score = cpu::select(&selection, &scores, &mut mask);
        prop_assert_eq!(&mask, &expected.mask);
        prop_assert_eq!(rows_without_score, expected.rows_without_score);
    }
}

#[test]
fn many_experts_and_equal_scores() {
    for num_experts in [32, 64, 65, 513] {
        let scores = vec![0.5f32; 3 * num_experts];
        for selection in
            [Selection::top_k(7), Selection::dynamic_k(0.5), Selection::cumulative_share(0.3)]
        {
            let mut mask = ExpertMask::none(3, num_experts);
            cpu::select(&selection, &scores, &mut mask);
            assert_eq!(mask, reference::select(&selection, &scores, num_experts).mask);
        }
    }
}
