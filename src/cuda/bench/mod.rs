//! What a layer costs on this GPU, beside the dense layer and beside what the GPU could do at best.
//!
//! Sparse and dense layers are timed by turns, each as a CUDA graph that goes through so many sets
//! of weights that they come from memory and not from the cache. Everything that an engine would
//! pay is inside: router, selection, index, experts.

mod layers;

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, sys};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use self::layers::{Inputs, Layers, draw_masks, random, random_layer, union};

use super::cublaslt::{CublasLt, Epilogue, Operands, Product, ProductShape, WORKSPACE_BYTES};
use super::driver::cannot;
use super::plan::Stage;
use super::{Buffer, Device, Fallback, MoeFfn, Path, PlanOptions};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{self, Activation, ExpertMask};

/// Executed bytes of one rotation, in sizes of the second-level cache.
const ROTATION: usize = 4;
/// No more sets of weights than this.
const MAX_SETS: usize = 64;
/// Pairs of a sparse and a dense time.
const PAIRS: usize = 15;

/// What the machine can do at best, as measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Bytes read and written by a copy from memory to memory.
    pub bytes_per_second: f64,
    /// A large product of the element type.
    pub flops_per_second: f64,
}

/// A layer to measure; its weights are random.
#[derive(Clone, Copy, Debug)]
pub struct LayerSpec {
    /// Width of a token.
    pub d_model: usize,
    /// Neurons, shared ones included.
    pub d_ff: usize,
    /// Whether it is gated.
    pub glu: bool,
    /// φ.
    pub activation: Activation,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Of weights and activations.
    pub dtype: DType,
    /// Hidden units of the D2DMoE router; 0 for the linear router.
    pub router_hidden: usize,
    /// Draws weights, tokens and routing.
    pub seed: u64,
}

/// Which experts the tokens run. It is imposed through the scores that selection reads, after the
/// router has run.
#[derive(Clone, Debug)]
pub enum Routing {
    /// Independent random experts, as many for each token as make the density exact.
    Random {
        /// Executed share of the routed neurons.
        density: f64,
    },
    /// Masks that were recorded.
    Trace {
        /// What to call it.
        name: String,
        /// Consecutive rows are used, from the beginning again at the end.
        masks: ExpertMask,
    },
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct RunSpec {
    /// T.
    pub tokens: usize,
    /// The path, or `None` for what the plan chooses.
    pub path: Option<Path>,
    /// What the plan may fall back to.
    pub fallback: Fallback,
}

/// What one measurement found; times are microseconds for one layer.
#[derive(Clone, Debug, Serialize)]
pub struct FfnRow {
    /// Width of a token.
    pub d_model: usize,
    /// Neurons.
    pub d_ff: usize,
    /// Whether the layer is gated.
    pub glu: bool,
    /// φ.
    pub activation: Activation,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Of weights and activations.
    pub dtype: DType,
    /// "linear", or "d2dmoe-" and the hidden units.
    pub router: String,
    /// T.
    pub tokens: usize,
    /// "random", or "trace:" and its name.
    pub routing: String,
    /// Executed neurons / d_ff.
    pub density: f64,
    /// "exact" or "masked".
    pub fallback: &'static str,
    /// The path that ran.
    pub path: &'static str,
    /// Whether it was forced.
    pub path_forced: bool,
    /// Median time.
    pub us: f64,
    /// Median time of the dense layer, by turns with it.
    pub dense_us: f64,
    /// Median of the ratios of neighbouring pairs, dense to this.
    pub speedup: f64,
    /// Largest less smallest of those ratios, divided by their median.
    pub spread: f64,
    /// The time that executed bytes or operations need at best.
    pub bound_us: f64,
    /// bound_us / us.
    pub share_of_bound: f64,
    /// Weights of the executed experts of all tokens, shared neurons and router.
    pub executed_bytes: usize,
    /// Router and selection.
    pub router_select_us: f64,
    /// Lists from masks.
    pub index_us: f64,
    /// The rest.
    pub experts_us: f64,
}

/// Copies of a layer in memory of their own, and what the machine can do.
pub struct FfnBench {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    spec: LayerSpec,
    limits: Limits,
    layer: ffn::MoeFfn,
    sets: Vec<Arc<MoeFfn>>,
}

impl FfnBench {
    /// Draws a layer.
    ///
    /// # Errors
    /// When the sizes do not fit together or the device has too little memory.
    pub fn new(device: &Arc<Device>, spec: LayerSpec, limits: Limits) -> Result<Self> {
        let layer = random_layer(&spec)?;
        let stream = device.cudarc_context().new_stream().map_err(cannot("create a stream"))?;
        let device = device.clone();
        Ok(Self { device, stream, spec, limits, layer, sets: Vec::new() })
    }

    /// Measures one number of tokens under one routing.
    ///
    /// # Errors
    /// When the device has too little memory, or cuBLASLt is missing.
    pub fn run(&mut self, run: RunSpec, routing: &Routing) -> Result<FfnRow> {
        let spec = self.spec;
        let rng = &mut ChaCha8Rng::seed_from_u64(spec.seed ^ run.tokens as u64);
        let width = self.layer.expert_width();
        let neuron_bytes = (2 + usize::from(spec.glu)) * spec.d_model * spec.dtype.bytes();
        let router_bytes = self.layer.router().macs_per_token() as usize * spec.dtype.bytes();
        let first = draw_masks(rng, routing, run.tokens, spec.num_experts, 0);
        let executed = (union(&first) * width + spec.shared) * neuron_bytes + router_bytes;
        let rotation = ROTATION * self.device.properties().l2_bytes;
        let num_sets = rotation.div_ceil(executed.max(1)).clamp(2, MAX_SETS);
        while self.sets.len() < num_sets {
            self.sets.push(Arc::new(MoeFfn::new(&self.device, &self.layer)?));
        }

        let options =
            PlanOptions { path: run.path, fallback: run.fallback, ..PlanOptions::default() };
        let exact = PlanOptions { path: Some(Path::DenseExact), ..options };
        let sparse = Layers::new(self, num_sets, run.tokens, options)?;
        let dense = Layers::new(self, num_sets, run.tokens, exact)?;
        let mut inputs = Vec::with_capacity(num_sets);
        let mut pairs = 0;
        for set in 0..num_sets {
            let masks = draw_masks(rng, routing, run.tokens, spec.num_experts, set * run.tokens);
            pairs += masks.num_pairs();
            inputs.push(Inputs::new(&self.device, rng, &spec, &masks)?);
        }

        let whole = sparse.capture(&self.stream, &inputs, Stage::Experts)?;
        let baseline = dense.capture(&self.stream, &inputs, Stage::Experts)?;
        let mut times = Vec::with_capacity(PAIRS);
        for pair in 0..PAIRS + 2 {
            let time = [self.time(&whole, num_sets)?, self.time(&baseline, num_sets)?];
            // The first ones warm up.
            if pair >= 2 {
                times.push(time);
            }
        }
        let path = sparse.plans[0].path(run.tokens);
        let mut stages = [0.0; 2];
        if matches!(path, Path::FewFused | Path::Few | Path::ExpertMajor) {
            for (time, stage) in stages.iter_mut().zip([Stage::Route, Stage::Index]) {
                let graph = sparse.capture(&self.stream, &inputs, stage)?;
                let repeated: Result<Vec<f64>> =
                    (0..5).map(|_| self.time(&graph, num_sets)).collect();
                *time = median(repeated?);
            }
        }

        let ratios: Vec<f64> = times.iter().map(|[sparse, dense]| dense / sparse).collect();
        let us = median(times.iter().map(|pair| pair[0]).collect());
        let speedup = median(ratios.clone());
        let extreme = |pick: fn(f64, f64) -> f64| ratios.iter().copied().reduce(pick);
        let range = extreme(f64::max).zip(extreme(f64::min)).map_or(0.0, |(max, min)| max - min);
        let mean_k = pairs as f64 / (num_sets * run.tokens.max(1)) as f64;
        let flops = 2.0 * self.layer.macs_per_token(mean_k) * run.tokens as f64;
        let bound_us = 1e6
            * (executed as f64 / self.limits.bytes_per_second)
                .max(flops / self.limits.flops_per_second);
        Ok(FfnRow {
            d_model: spec.d_model,
            d_ff: spec.d_ff,
            glu: spec.glu,
            activation: spec.activation,
            num_experts: spec.num_experts,
            shared: spec.shared,
            dtype: spec.dtype,
            router: match spec.router_hidden {
                0 => "linear".into(),
                hidden => format!("d2dmoe-{hidden}"),
            },
            tokens: run.tokens,
            routing: match routing {
                Routing::Random { .. } => "random".into(),
                Routing::Trace { name, .. } => format!("trace:{name}"),
            },
            density: self.layer.density(mean_k),
            fallback: match run.fallback {
                Fallback::Exact => "exact",
                Fallback::Masked => "masked",
            },
            path: path.name(),
            path_forced: run.path.is_some(),
            us,
            dense_us: median(times.iter().map(|pair| pair[1]).collect()),
            speedup,
            spread: range / speedup,
            bound_us,
            share_of_bound: bound_us / us,
            executed_bytes: executed,
            router_select_us: stages[0],
            index_us: (stages[1] - stages[0]).max(0.0),
            experts_us: us - stages[1],
        })
    }

    /// Microseconds per layer of one launch.
    fn time(&self, graph: &CudaGraph, layers: usize) -> Result<f64> {
        elapsed_ms(&self.stream, || graph.launch().map_err(cannot("launch a graph")))
            .map(|ms| ms * 1e3 / layers as f64)
    }
}

/// What the machine can do, for products of `dtype`.
///
/// # Errors
/// When cuBLASLt is missing or the device has too little memory.
pub fn measure_limits(device: &Arc<Device>, dtype: DType) -> Result<Limits> {
    const COPY_BYTES: usize = 1 << 30;
    const SIDE: usize = 8192;
    let stream = device.cudarc_context().new_stream().map_err(cannot("create a stream"))?;
    let best = |run: &dyn Fn() -> Result<()>| -> Result<f64> {
        let times: Result<Vec<f64>> = (0..6).map(|_| elapsed_ms(&stream, run)).collect();
        Ok(times?.into_iter().fold(f64::INFINITY, f64::min) / 1e3)
    };
    let [from, to] = [Buffer::new(device, COPY_BYTES)?, Buffer::new(device, COPY_BYTES)?];
    let copy = || {
        // SAFETY: both buffers have this size.
        unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), COPY_BYTES, stream.cu_stream())
        }
        .result()
        .map_err(cannot("copy on the device"))
    };
    let copy_seconds = best(&copy)?;

    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let matrix = random(rng, [SIDE, SIDE], 1.0, dtype);
    let matrix = Buffer::from_slice(device, matrix.as_bytes())?;
    let out = Buffer::new(device, matrix.bytes())?;
    let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
    let library = CublasLt::open()?;
    let shape = ProductShape {
        dtype,
        rows: SIDE,
        depth: SIDE,
        depth_major: false,
        epilogue: Epilogue::Nothing,
    };
    let operands = Operands {
        tokens: SIDE,
        weights: matrix.address(),
        input: matrix.address(),
        out: out.address(),
        workspace: workspace.address(),
    };
    // SAFETY: the buffers have the shape's sizes.
    let product = unsafe { Product::tune(&library, &shape, 0, &operands)? };
    let product_seconds =
        best(&|| unsafe { product.run(&library, stream.as_ref().into(), &operands) })?;
    Ok(Limits {
        bytes_per_second: 2.0 * COPY_BYTES as f64 / copy_seconds,
        flops_per_second: 2.0 * (SIDE as f64).powi(3) / product_seconds,
    })
}

/// Milliseconds on the stream.
fn elapsed_ms(stream: &Arc<CudaStream>, run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let doing = "time a layer";
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags).map_err(cannot(doing))?;
    run()?;
    let end = stream.record_event(flags).map_err(cannot(doing))?;
    start.elapsed_ms(&end).map(f64::from).map_err(cannot(doing))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
