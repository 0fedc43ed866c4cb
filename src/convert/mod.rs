//! From dense FFNs to mixtures of experts: a partition of the neurons, a router that predicts which
//! experts matter, a selection calibrated to a density, and a compensation for what is skipped.
//!
//! [`convert_ffn`] needs nothing but the tensors of one FFN and inputs that it has seen;
//! [`convert_model`] converts every FFN of a model folder.

mod adam;
pub mod calibrate;
mod compensation;
mod error_budget;
mod expert_norms;
mod hidden;
mod model;
mod options;
pub mod partition;
mod refine;
mod router_network;
mod router_training;
mod routers;
mod shared;
mod statistics;
mod stream;
mod thresholds;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub use compensation::CompensationMethod;
pub use error_budget::{ErrorBudget, NEEDS_REFERENCE, density_for_error};
pub use model::{CalibrationText, Progress, convert_model};
pub use options::{ConvertOptions, RouterMethod, SelectionMethod, SharedBy, ThresholdScope};
pub use partition::PartitionMethod;
pub use refine::refine_model;
pub use router_training::MIN_TOKENS;
pub use statistics::{rarest_first, routing_statistics};
pub use thresholds::{ThresholdTarget, retune_model};

use crate::cpu;
use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, ExpertMask, MoeFfn, RoutingStatistics, Selection};
use crate::model::format::RouterTraining;
use compensation::{Sample, compensated};

/// Tokens that [`RoutingStatistics`] are taken over, where there are as many: unions of sorted
/// tokens depend on how many there are to sort.
pub const STATISTICS_TOKENS: usize = 8192;

/// What the conversion of one FFN found.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReport {
    /// How the router's training went, where there was one.
    pub router_training: Option<RouterTraining>,
    /// What routing does to the first [`STATISTICS_TOKENS`] calibration tokens.
    pub statistics: RoutingStatistics,
}

/// Converts one FFN. `inputs` \[T, d_model\] are inputs of this FFN that represent what it will run
/// on, in the order of the text, T ≥ [`MIN_TOKENS`]; tens of thousands make a good router. The
/// selection is calibrated on all of them.
///
/// # Errors
/// When the options do not fit the FFN, or the inputs are too few, not whole tokens or not finite.
pub fn convert_ffn(
    ffn: &DenseFfn,
    inputs: &[f32],
    options: &ConvertOptions,
) -> Result<(MoeFfn, LayerReport)> {
    let method = options.compensations(1)?[0];
    let (moe, router_training) = make_experts(ffn, inputs, options, 0, &mut |_, _| Ok(()))?;
    let moe = match method {
        CompensationMethod::None => moe,
        method => {
            let d_model = ffn.d_model();
            let mut targets = vec![0.0; inputs.len()];
            cpu::DenseFfn::new(ffn).run(inputs, &mut targets, &mut cpu::Workspace::default())?;
            // What is behind the FFN isn't known: every error costs the same.
            let weights = vec![1.0; inputs.len() / d_model];
            let metric: Vec<f64> = (0..d_model * d_model)
                .map(|i| f64::from(u8::from(i % (d_model + 1) == 0)))
                .collect();
            let sample = Sample { inputs, targets: &targets, weights: &weights, metric: &metric };
            compensated(moe, method, &sample)?
        }
    };

    let num_tokens = STATISTICS_TOKENS.min(inputs.len() / ffn.d_model());
    let first = &inputs[..num_tokens * ffn.d_model()];
    let scores = cpu::router_scores(moe.router(), first, ffn.d_model())?;
    let mut mask = ExpertMask::none(num_tokens, moe.num_experts());
    cpu::select(&moe.selection(), &scores, &mut mask);
    let statistics = routing_statistics(moe.partition(), &mask);
    let moe = moe.with_calibrated_density(statistics.density);
    Ok((moe, LayerReport { router_training, statistics }))
}

/// Partition, router and selection, which has the density of the options on `inputs`. The randomness
/// is that of `layer`. `each_epoch` hears how many epochs are done, of how many, and may stop the
/// training with an error.
fn make_experts(
    ffn: &DenseFfn,
    inputs: &[f32],
    options: &ConvertOptions,
    layer: usize,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(MoeFfn, Option<RouterTraining>)> {
    options.check(ffn)?;
    check_inputs(inputs, ffn.d_model())?;
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(layer as u64);

    let num_experts = options.num_experts;
    let shared = shared::neurons(ffn, inputs, options.shared, options.shared_by);
    let partition =
        partition::partition(ffn, options.partition, num_experts, &shared, inputs, &mut rng)?;
    let neurons = ffn.reordered(&partition.order());
    let mean_k = partition.mean_k(options.density);
    let (router, training) =
        routers::make_router(&neurons, &partition, inputs, options, &mut rng, each_epoch)?;
    let scores = cpu::router_scores(&router, inputs, ffn.d_model())?;
    let rule = options.selection.rule(&scores, num_experts, mean_k);
    let selection = Selection { rule, max_experts: None };
    Ok((MoeFfn::from_expert_order(neurons, partition, router, selection)?, training))
}

fn check_inputs(inputs: &[f32], d_model: usize) -> Result<()> {
    let refuse = |expected: String, got: String| {
        Err(Error::argument("convert", "calibration inputs", expected, got))
    };
    let num_tokens = inputs.len() / d_model;
    if !inputs.len().is_multiple_of(d_model) {
        let expected = format!("whole tokens of {d_model} values");
        return refuse(expected, format!("{} values", inputs.len()));
    }
    if num_tokens < MIN_TOKENS {
        return refuse(format!("at least {MIN_TOKENS} tokens"), num_tokens.to_string());
    }
    if let Some(at) = inputs.iter().position(|x| !x.is_finite()) {
        let got = format!("{} in token {}", inputs[at], at / d_model);
        return refuse("finite everywhere".into(), got);
    }
    Ok(())
}
