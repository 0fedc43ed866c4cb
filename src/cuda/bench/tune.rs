//! What every path takes that a plan may choose: the times of a tuning.

use super::graph::pairs;
use super::{FfnBench, Routing, RunSpec};
use crate::cuda::plan::Stage;
use crate::cuda::turns::median;
use crate::cuda::{Fallback, Path, PlanOptions, TunedLayer, TunedTime, Tuning};
use crate::error::Result;

const FALLBACKS: [Fallback; 2] = [Fallback::Exact, Fallback::Masked];

impl FfnBench {
    /// Measures these numbers of tokens, each at all `densities` of the routed neurons; a density below that of
    /// a single expert counts as that. `progress` hears how many of how many times are known.
    ///
    /// # Errors
    /// When the device has too little memory, or cuBLASLt is missing.
    pub fn tune(
        &mut self,
        tokens: &[usize],
        densities: &[f64],
        progress: &dyn Fn(usize, usize),
    ) -> Result<TunedLayer> {
        self.prepare_sets(1)?;
        let runs = self.runs(tokens, densities);
        let mut times = Vec::with_capacity(runs.len());
        for (done, (run, density)) in runs.iter().enumerate() {
            progress(done, runs.len());
            let path = run.path.expect("runs are of one path each");
            let us = self.us(run)?;
            times.push(TunedTime { path, tokens: run.tokens, density: *density, us });
        }
        Ok(TunedLayer { shape: *self.sets[0].shape(), times })
    }

    /// Where plans choose another path by a tuning than without: fallback, and the two paths.
    pub fn changes(
        &self,
        tuning: &Tuning,
        tokens: usize,
        density: f64,
    ) -> Vec<(Fallback, [Path; 2])> {
        let Some(set) = self.sets.first() else { return Vec::new() };
        let choice = |fallback| {
            let density = Some(density);
            let options = PlanOptions { fallback, density, ..PlanOptions::default() };
            let by = |tuning| set.choose(tuning, tokens, &options, true);
            (fallback, [by(None), by(Some(tuning))])
        };
        FALLBACKS.map(choice).into_iter().filter(|(_, [old, new])| old != new).collect()
    }

    /// Every path that may be chosen, at every density if it matters: what to run, and the executed share of
    /// all neurons.
    fn runs(&self, tokens: &[usize], densities: &[f64]) -> Vec<(RunSpec, Option<f64>)> {
        let num_experts = self.shape.num_experts as f64;
        let mut routed: Vec<f64> = densities.iter().map(|d| d.max(1.0 / num_experts)).collect();
        routed.sort_unstable_by(f64::total_cmp);
        routed.dedup();
        let mut tokens = tokens.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        let options = PlanOptions::default();
        let mut runs = Vec::new();
        for tokens in tokens {
            let run = |path, density| RunSpec {
                tokens,
                routing: Routing::Random { density },
                path: Some(path),
                fallback: Fallback::default(),
                calibrated_density: None,
            };
            let sparse = self.sets[0].sparse_paths(tokens, &options, true);
            let at = |path, density| {
                (run(path, density), Some(self.layer.density(density * num_experts)))
            };
            runs.extend(
                sparse.flat_map(|path| routed.iter().map(move |&density| at(path, density))),
            );
            let dense = FALLBACKS.map(Fallback::path);
            runs.extend(dense.map(|path| (run(path, 1.0), None)));
        }
        runs
    }

    /// Median time.
    fn us(&mut self, run: &RunSpec) -> Result<f64> {
        let set_up = self.set_up(run)?;
        let whole = set_up.capture(&set_up.layers, Stage::Experts)?;
        let times = pairs([&whole, &set_up.layers.batch.baseline.graph])?;
        Ok(median(&times.iter().map(|pair| pair[0]).collect::<Vec<_>>()))
    }
}
