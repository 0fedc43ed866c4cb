//! What a layer costs on this GPU, beside the dense layer and beside what the GPU could do at best.
//!
//! Sparse and dense layers are timed by turns, each as a CUDA graph that goes through so many sets
//! of weights that they come from memory and not from the cache. Everything that an engine would
//! pay is inside: router, selection, index, experts.

mod baseline;
mod batch;
mod graph;
mod limits;
mod model;
mod row;
mod tune;

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::CudaStream;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub use self::graph::TimedGraph;
pub use self::limits::Limits;
pub use self::model::{ModelBench, ModelRow};
pub use self::row::FfnRow;
pub use super::synthetic::Routing;

use self::batch::{Batch, Layers};
use self::graph::{pairs, spread};
use super::driver::cannot;
use super::plan::Stage;
use super::synthetic::IMPOSED;
use super::turns::median;
use super::{Device, Fallback, LayerShape, MoeFfn, Path, PlanOptions};
use crate::error::{Error, Result};
use crate::ffn::{self, ExpertMask};

/// Executed bytes of one rotation over the sets of weights, in sizes of the second-level cache.
const ROTATION: usize = 4;
/// No more sets of weights than this, nor more than half of the memory.
const MAX_SETS: usize = 512;
/// A graph takes at least about so long: what lies between two graphs hardly counts then.
const MIN_GRAPH_US: f64 = 500.0;
/// What a layer takes at least, whatever its bound.
const MIN_LAYER_US: f64 = 5.0;
/// Launches of a graph that stops after a stage.
const STAGE_LAUNCHES: usize = 5;

/// One measurement of a layer.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// T.
    pub tokens: usize,
    /// Which experts they run.
    pub routing: Routing,
    /// The path, or `None` for what the plan chooses.
    pub path: Option<Path>,
    /// What the plan may fall back to.
    pub fallback: Fallback,
    /// The density that the plan is told; `None`: what the routing has.
    pub calibrated_density: Option<f64>,
}

/// Copies of a layer in memory of their own, and what the machine can do.
pub struct FfnBench {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    shape: LayerShape,
    limits: Limits,
    layer: ffn::MoeFfn,
    sets: Vec<Arc<MoeFfn>>,
    max_sets: usize,
    batch: Option<Batch>,
}

impl FfnBench {
    /// Draws a layer.
    ///
    /// # Errors
    /// When the sizes do not fit together or the device has too little memory.
    pub fn new(device: &Arc<Device>, shape: LayerShape, limits: Limits) -> Result<Self> {
        Self::on(device, shape.draw()?, limits)
    }

    /// A layer of a model, with routing imposed on it instead of its own.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn of_layer(device: &Arc<Device>, layer: ffn::MoeFfn, limits: Limits) -> Result<Self> {
        Self::on(device, layer.with_selection(IMPOSED)?, limits)
    }

    fn on(device: &Arc<Device>, layer: ffn::MoeFfn, limits: Limits) -> Result<Self> {
        let shape = LayerShape::of(&layer);
        let stream = device.cudarc_context().new_stream().map_err(cannot("create a stream"))?;
        let (free, _) =
            device.cudarc_context().mem_get_info().map_err(cannot("ask for free memory"))?;
        let mut bench = Self {
            device: device.clone(),
            stream,
            shape,
            limits,
            layer,
            sets: Vec::new(),
            max_sets: MAX_SETS,
            batch: None,
        };
        bench.max_sets = (free / 2 / bench.dense_bytes()).clamp(2, MAX_SETS);
        Ok(bench)
    }

    /// What it measures.
    pub fn layer(&self) -> &LayerShape {
        &self.shape
    }

    /// Measures. Runs with the same number of tokens one after another share what is timed for it.
    ///
    /// # Errors
    /// When the path cannot do it, the device has too little memory, or cuBLASLt is missing.
    pub fn run(&mut self, run: &RunSpec) -> Result<FfnRow> {
        let set_up = self.set_up(run)?;
        let SetUp { bench, layers, path, .. } = &set_up;
        let whole = set_up.capture(layers, Stage::Experts)?;
        let times = pairs([&whole, &layers.batch.baseline.graph])?;
        let column = |pick: fn(&[f64; 2]) -> f64| times.iter().map(pick).collect::<Vec<f64>>();
        let us = median(&column(|pair| pair[0]));
        let ratios = column(|pair| pair[1] / pair[0]);
        let [router_select_us, index_us, experts_us] = set_up.stages(us)?;
        let bound_us = bench.bound_us(set_up.executed_bytes, set_up.mean_k, run.tokens);
        let shape = &bench.shape;
        Ok(FfnRow {
            d_model: shape.d_model,
            d_ff: shape.d_ff,
            glu: shape.glu,
            activation: shape.activation,
            num_experts: shape.num_experts,
            shared: shape.shared,
            dtype: shape.dtype,
            router: match shape.router_hidden {
                0 => "linear".into(),
                hidden => format!("d2dmoe-{hidden}"),
            },
            tokens: run.tokens,
            routing: run.routing_name(),
            density: bench.layer.density(set_up.mean_k),
            fallback: run.fallback.name(),
            path: path.name(),
            path_forced: run.path.is_some(),
            us,
            dense_us: median(&column(|pair| pair[1])),
            speedup: median(&ratios),
            spread: spread(&ratios),
            bound_us,
            share_of_bound: bound_us / us,
            executed_bytes: set_up.executed_bytes,
            router_select_us,
            index_us,
            experts_us,
        })
    }

    /// The layers that [`run`](Self::run) measures, for another harness.
    ///
    /// # Errors
    /// As there.
    pub fn capture(&mut self, run: &RunSpec) -> Result<Captured<'_>> {
        let set_up = self.set_up(run)?;
        let graph = set_up.capture(&set_up.layers, Stage::Experts)?;
        Ok(Captured { graph, _layers: set_up.layers })
    }

    /// Sets of weights, inputs and plans.
    fn set_up(&mut self, run: &RunSpec) -> Result<SetUp<'_>> {
        if run.tokens == 0 {
            return Err(Error::argument("bench", "tokens", "at least 1", 0));
        }
        run.routing.selection().check(self.shape.num_experts)?;
        let mut masks = self.draw_masks(run)?;
        let dense_sets = self.rotation().div_ceil(self.dense_bytes()).clamp(2, self.max_sets);
        self.prepare(run.tokens, dense_sets, masks.len())?;
        for set in &mut self.sets {
            let set = Arc::get_mut(set).expect("plans of earlier runs are gone");
            set.set_selection(run.routing.selection())?;
        }
        let batch = self.batch.as_ref().expect("just prepared");

        let density = self.layer.density(mean_k(&masks));
        let options = PlanOptions {
            path: run.path,
            fallback: run.fallback,
            density: Some(run.calibrated_density.unwrap_or(density)),
            statistics: false,
        };
        let path = batch.plan(&self.sets[0], options)?.path(run.tokens);
        if matches!(path, Path::DenseExact | Path::DenseMasked) {
            // It reads everything, so fewer sets are enough.
            masks.truncate(dense_sets);
        }
        let executed_bytes = masks.iter().map(|mask| self.bytes(union(mask))).sum::<usize>();
        let executed_bytes = executed_bytes / masks.len();
        let mean_k = mean_k(&masks);
        let layers = batch.layers(&self.sets[..masks.len()], &masks, options)?;
        Ok(SetUp { bench: self, masks, options, path, layers, executed_bytes, mean_k })
    }

    /// Bytes that a rotation reads at least.
    fn rotation(&self) -> usize {
        ROTATION * self.device.properties().l2_bytes
    }

    /// Weights of so many experts, of the shared neurons and of the router.
    fn bytes(&self, num_experts: usize) -> usize {
        let neurons = num_experts * self.layer.expert_width() + self.shape.shared;
        let neuron = self.dense_bytes() / self.shape.d_ff;
        neurons * neuron + self.layer.router().macs_per_token() as usize * self.shape.dtype.bytes()
    }

    /// Weights of the dense layer.
    fn dense_bytes(&self) -> usize {
        self.layer.neurons().macs_per_token() as usize * self.shape.dtype.bytes()
    }

    fn bound_us(&self, bytes: usize, mean_k: f64, tokens: usize) -> f64 {
        let flops = 2.0 * self.layer.macs_per_token(mean_k) * tokens as f64;
        let reading = bytes as f64 / self.limits.read_bytes_per_second;
        1e6 * reading.max(flops / self.limits.flops_per_second)
    }

    /// Masks of as many layers as a rotation has.
    fn draw_masks(&self, run: &RunSpec) -> Result<Vec<ExpertMask>> {
        let rng = &mut ChaCha8Rng::seed_from_u64(run.tokens as u64);
        let (mut masks, mut bytes) = (Vec::new(), 0);
        while masks.len() < 2 || bytes < self.rotation() && masks.len() < self.max_sets {
            let (first, num_experts) = (masks.len() * run.tokens, self.shape.num_experts);
            let mask = run.routing.draw(rng, first, run.tokens, num_experts)?;
            bytes += self.bytes(union(&mask));
            masks.push(mask);
        }
        Ok(masks)
    }

    /// Sets of weights, tokens for each of them, and the baseline.
    fn prepare(&mut self, tokens: usize, dense_sets: usize, num_sets: usize) -> Result<()> {
        self.prepare_sets(num_sets.max(dense_sets))?;
        if self.batch.as_ref().is_none_or(|batch| batch.tokens != tokens) {
            // Its memory first.
            self.batch = None;
            let all_experts = self.shape.num_experts as f64;
            let bound_us = self.bound_us(self.dense_bytes(), all_experts, tokens);
            let (sets, passes) = (&self.sets[..dense_sets], passes(bound_us, dense_sets));
            self.batch = Some(Batch::new(&self.stream, self.shape, sets, tokens, passes)?);
        }
        let batch = self.batch.as_mut().expect("just made");
        batch.draw_tokens(&self.device, num_sets)
    }

    fn prepare_sets(&mut self, num_sets: usize) -> Result<()> {
        while self.sets.len() < num_sets {
            let set = match self.sets.first() {
                Some(first) => first.copy(self.layer.router())?,
                None => MoeFfn::new(&self.device, &self.layer)?,
            };
            self.sets.push(Arc::new(set));
        }
        Ok(())
    }
}

/// A run that waits to be timed.
struct SetUp<'a> {
    bench: &'a FfnBench,
    masks: Vec<ExpertMask>,
    options: PlanOptions,
    path: Path,
    layers: Layers<'a>,
    executed_bytes: usize,
    mean_k: f64,
}

impl SetUp<'_> {
    /// Enough layers, each up to a stage.
    fn capture(&self, layers: &Layers<'_>, last: Stage) -> Result<TimedGraph> {
        let num_sets = self.masks.len();
        let tokens = layers.batch.tokens;
        let bound_us = self.bench.bound_us(self.executed_bytes, self.mean_k, tokens);
        layers.capture(&self.bench.stream, num_sets * passes(bound_us, num_sets), last)
    }

    /// Microseconds of router and selection, lists, and experts, of `us` in all.
    fn stages(&self, us: f64) -> Result<[f64; 3]> {
        let up_to = |layers, stage| -> Result<f64> {
            Ok(median(&self.capture(layers, stage)?.times(STAGE_LAUNCHES)?))
        };
        let ends = self.path.stages().iter().map(|&stage| up_to(&self.layers, stage));
        Ok(match ends.collect::<Result<Vec<_>>>()?[..] {
            [route] => [route, 0.0, us - route],
            [route, index] => [route, index - route, us - index],
            _ if self.path == Path::DenseExact => [0.0, 0.0, us],
            _ => {
                let sets = &self.bench.sets[..self.masks.len()];
                let in_stages = PlanOptions { path: Some(Path::ExpertMajor), ..self.options };
                let layers = self.layers.batch.layers(sets, &self.masks, in_stages)?;
                [up_to(&layers, Stage::Route)?, 0.0, us]
            }
        })
    }
}

/// Layers one after another, each on weights of its own.
pub struct Captured<'a> {
    graph: TimedGraph,
    /// What the graph uses.
    _layers: Layers<'a>,
}

impl Captured<'_> {
    /// The device's time for so many layers.
    ///
    /// # Errors
    /// When the device fails.
    pub fn time(&self, layers: u64) -> Result<Duration> {
        self.graph.time(layers)
    }
}

impl RunSpec {
    fn routing_name(&self) -> String {
        let name = match &self.routing {
            Routing::Random { .. } => "random".into(),
            Routing::TopK { .. } => "random, top-k".into(),
            Routing::Trace { name, .. } => format!("trace:{name}"),
        };
        match self.calibrated_density {
            Some(density) => format!("{name}, calibrated for {density}"),
            None => name,
        }
    }
}

/// Rotations that make a graph long enough, of layers with this bound.
fn passes(bound_us: f64, num_sets: usize) -> usize {
    (MIN_GRAPH_US / (bound_us.max(MIN_LAYER_US) * num_sets as f64)).ceil() as usize
}

/// Experts that any token runs.
fn union(mask: &ExpertMask) -> usize {
    let mut all = vec![0; mask.num_experts().div_ceil(32)];
    for token in 0..mask.num_tokens() {
        all.iter_mut().zip(mask.row(token)).for_each(|(all, word)| *all |= word);
    }
    all.into_iter().map(|word: u32| word.count_ones() as usize).sum()
}

fn mean_k(masks: &[ExpertMask]) -> f64 {
    let pairs: usize = masks.iter().map(ExpertMask::num_pairs).sum();
    let tokens: usize = masks.iter().map(ExpertMask::num_tokens).sum();
    pairs as f64 / tokens as f64
}
