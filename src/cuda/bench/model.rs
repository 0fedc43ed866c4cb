//! Whole models: tokens per second, and how much of the time their FFNs take.

use std::cell::RefCell;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::graph::{TimedGraph, pairs};
use crate::cuda::driver::cannot;
use crate::cuda::turns::median;
use crate::cuda::{Device, Fallback, Gpu, GpuOptions};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Batch, Encoder, FfnRun};

/// Launches of a graph of parts of a pass.
const LAUNCHES: usize = 9;

/// What one measurement of a model found. A pass is one CUDA graph, from token ids to hidden states.
#[derive(Clone, Debug, Serialize)]
pub struct ModelRow {
    /// A folder, or the name of a shape.
    pub model: String,
    /// Of weights and activations.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Executed neurons / d_ff where experts run; where an exact fallback is faster, all of them do.
    pub density: f64,
    /// What may run where the dense products are faster: "exact" or "masked".
    pub fallback: &'static str,
    /// With experts.
    pub tokens_per_s: f64,
    /// With dense FFNs, by turns with it.
    pub dense_tokens_per_s: f64,
    /// What another harness measured, if anything.
    pub torch_tokens_per_s: Option<f64>,
    /// Time of a pass with experts, microseconds.
    pub us: f64,
    /// Time of a pass with dense FFNs, microseconds.
    pub dense_us: f64,
    /// FFNs, with their norms, of the time with experts.
    pub share_ffn: f64,
    /// The same with dense FFNs.
    pub dense_share_ffn: f64,
}

/// A model on a stream that passes are captured from.
pub struct ModelBench {
    name: String,
    dtype: DType,
    fallback: Fallback,
    stream: Arc<CudaStream>,
    gpu: Gpu,
}

impl ModelBench {
    /// For models of one element type.
    ///
    /// # Errors
    /// When cuBLASLt is missing or the device has too little memory.
    pub fn new(
        device: &Arc<Device>,
        name: String,
        dtype: DType,
        fallback: Fallback,
    ) -> Result<Self> {
        let stream = device.cudarc_context().new_stream().map_err(cannot("create a stream"))?;
        let options = GpuOptions { fallback, ..GpuOptions::default() };
        let gpu = Gpu::on_stream(device, dtype, options, stream.clone())?;
        Ok(Self { name, dtype, fallback, stream, gpu })
    }

    /// The backend to load the model onto.
    pub fn backend(&self) -> Gpu {
        self.gpu.clone()
    }

    /// Measures `batch` sequences of `length` random tokens.
    ///
    /// # Errors
    /// When a length is beyond the model's positions, or the device refuses.
    pub fn run(
        &self,
        encoder: &Encoder<Gpu>,
        [batch, length]: [usize; 2],
        density: f64,
    ) -> Result<ModelRow> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut sequence =
            |_| (0..length).map(|_| rng.random_range(0..encoder.vocab_size() as u32)).collect();
        let sequences: Vec<Vec<u32>> = (0..batch).map(&mut sequence).collect();
        let batch_of_tokens = Batch::pack(&sequences)?;
        let num_tokens = batch_of_tokens.num_tokens();
        let on_device = encoder.batch(&batch_of_tokens)?;
        let memory = || -> Result<_> {
            Ok(RefCell::new((encoder.activations(num_tokens)?, encoder.workspace(num_tokens)?)))
        };
        let (sparse, dense) = (memory()?, memory()?);
        let pass = |run, memory: &RefCell<_>| {
            let (x, workspace) = &mut *memory.borrow_mut();
            encoder.forward(run, x, &on_device, workspace, None)
        };
        let with_experts = || pass(FfnRun::Stored, &sparse);
        let without_experts = || pass(FfnRun::Dense, &dense);
        let without_ffn = || {
            let (x, workspace) = &mut *dense.borrow_mut();
            encoder.embed_tokens(x, &on_device)?;
            (0..encoder.num_layers())
                .try_for_each(|layer| encoder.attention_block(layer, x, &on_device, workspace))
        };
        // A first pass chooses algorithms. A graph that was captured before others were chosen is up to 4 % slower
        // (kernels/NOTES.md).
        with_experts()?;
        without_experts()?;
        self.stream.synchronize().map_err(cannot("wait for a stream"))?;
        let capture =
            |pass: &dyn Fn() -> Result<()>| TimedGraph::capture(&self.stream, 1, |_, _| pass());
        let graphs = [capture(&with_experts)?, capture(&without_experts)?];
        let times = pairs([&graphs[0], &graphs[1]])?;
        let of = |which: usize| median(&times.iter().map(|pair| pair[which]).collect::<Vec<_>>());
        let (us, dense_us) = (of(0), of(1));
        let rest_us = median(&capture(&without_ffn)?.times(LAUNCHES)?);
        let per_s = |us: f64| 1e6 * num_tokens as f64 / us;
        Ok(ModelRow {
            model: self.name.clone(),
            dtype: self.dtype,
            batch,
            length,
            density,
            fallback: self.fallback.name(),
            tokens_per_s: per_s(us),
            dense_tokens_per_s: per_s(dense_us),
            torch_tokens_per_s: None,
            us,
            dense_us,
            share_ffn: 1.0 - rest_us / us,
            dense_share_ffn: 1.0 - rest_us / dense_us,
        })
    }
}
