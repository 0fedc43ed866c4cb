//! A GPU as a backend for whole models.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::cublaslt::{
    CublasLt, Epilogue, Operands, Product, ProductShape, Timer, WORKSPACE_BYTES,
};
use super::driver::Stream;
use super::{
    AttentionInputs, Buffer, Device, EmbeddingTables, Fallback, FfnInputs, FfnPlan, Format, MoeFfn,
    NormInputs, Path, PlanOptions, RawStream, RoutingCounts, View, Workspace, attention,
    embed_tokens, norm, pool,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{self, ExpertMask, Partition, Router, Selection};
use crate::model::{
    Backend, Batch, DeviceBatch, Embeddings, Encoder, Ffn, FfnRun, LayerNorm, Linear,
};
use crate::tensor::{Tensor, TensorRef};

/// Runs models on a GPU, with weights and activations of one element type, everything queued on one
/// stream. The first pass with a number of tokens chooses algorithms; later ones only launch, so that they
/// can be captured into a graph. Copies share the stream and what was chosen.
#[derive(Clone)]
pub struct Gpu {
    device: Arc<Device>,
    stream: Arc<Stream>,
    dtype: DType,
    options: GpuOptions,
    library: Arc<CublasLt>,
    library_memory: Arc<Buffer>,
    products: Arc<Mutex<HashMap<ProductKey, Arc<Product>>>>,
    plans: Arc<Mutex<Plans>>,
}

/// How a backend runs FFNs.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuOptions {
    /// What runs where the dense products are faster. With [`Fallback::Masked`] a model is one function at
    /// every number of tokens, as on a CPU.
    pub fallback: Fallback,
    /// Whether to count what selection does, to be read by [`Encoder::statistics`].
    pub statistics: bool,
}

/// Outputs, inputs, tokens up to which an algorithm was chosen; and where the bias is.
type ProductKey = ([usize; 3], u64);
/// The most tokens, and whether every neuron runs.
type PlanKey = (usize, bool);
type Plans = Vec<(PlanKey, Arc<FfnPlan>)>;

/// A matrix on the GPU.
pub struct GpuTensor {
    buffer: Buffer,
    shape: [usize; 2],
}

/// A batch on the GPU.
pub struct GpuBatch {
    token_ids: Buffer,
    position_ids: Buffer,
    sequence_offsets: Buffer,
    num_tokens: usize,
    num_sequences: usize,
    max_length: usize,
    /// Whether it may hold less than it has room for.
    is_bucket: bool,
}

/// An FFN on the GPU.
pub struct GpuFfn {
    ffn: Arc<MoeFfn>,
    is_moe: bool,
    b_out: Vec<f32>,
}

/// Scratch memory of FFNs.
pub struct GpuFfnWorkspace {
    max_tokens: usize,
    memory: Option<Buffer>,
    mask: Option<Buffer>,
    /// Of the last run: tokens and experts.
    selected: Option<[usize; 2]>,
}

impl Gpu {
    /// A backend on a stream of its own.
    ///
    /// # Errors
    /// When cuBLASLt is missing or the device has too little memory.
    pub fn new(device: &Arc<Device>, dtype: DType, options: GpuOptions) -> Result<Self> {
        Self::on(device, dtype, options, Stream::new(&device.context)?)
    }

    pub(super) fn on(
        device: &Arc<Device>,
        dtype: DType,
        options: GpuOptions,
        stream: Stream,
    ) -> Result<Self> {
        device.context.bind()?;
        Ok(Self {
            device: device.clone(),
            stream: Arc::new(stream),
            dtype,
            options,
            library: Arc::new(CublasLt::open()?),
            library_memory: Arc::new(Buffer::new(device, WORKSPACE_BYTES)?),
            products: Arc::default(),
            plans: Arc::default(),
        })
    }

    /// Where everything is queued; valid as long as this or a copy of it.
    pub fn raw_stream(&self) -> RawStream {
        self.stream.raw()
    }

    /// Where everything is queued, to be captured from.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    fn wait(&self) -> Result<()> {
        self.stream.wait()
    }

    fn view(&self, tensor: &GpuTensor, shape: [usize; 2]) -> View {
        View::matrix(tensor.buffer.address(), Format::Float(self.dtype), shape)
    }

    /// The product for so many tokens, made now if there is none: by the algorithm of one of the same sizes, or by one that is
    /// chosen.
    fn product(
        &self,
        shape: &ProductShape,
        bias: u64,
        operands: &Operands,
    ) -> Result<Arc<Product>> {
        let sizes = [shape.rows, shape.depth, operands.tokens.next_power_of_two()];
        let mut products = self.products.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(product) = products.get(&(sizes, bias)) {
            return Ok(product.clone());
        }
        let product = match products.iter().find(|((of, _), _)| *of == sizes) {
            Some((_, like)) => like.with_bias(bias)?,
            None => {
                self.wait()?;
                let timer = Timer::new(&self.device)?;
                // SAFETY: the operands are what the caller is about to run.
                unsafe { Product::tune(&self.library, &timer, shape, bias, operands)? }
            }
        };
        let product = Arc::new(product);
        products.insert((sizes, bias), product.clone());
        Ok(product)
    }

    /// A plan for up to so many tokens, from that of a layer like it if there is one.
    fn plan(&self, ffn: &Arc<MoeFfn>, max_tokens: usize, is_dense: bool) -> Result<Arc<FfnPlan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|poison| poison.into_inner());
        let key = (max_tokens, is_dense);
        let alike = |of: &&(PlanKey, Arc<FfnPlan>)| of.0 == key;
        if let Some((_, plan)) = plans.iter().filter(alike).find(|(_, p)| Arc::ptr_eq(p.ffn(), ffn))
        {
            return Ok(plan.clone());
        }
        let like = plans.iter().filter(alike).find_map(|(_, plan)| plan.with_ffn(ffn).ok());
        let plan = match like {
            Some(plan) => plan,
            None => {
                self.wait()?;
                let path = is_dense.then_some(Path::DenseExact);
                let GpuOptions { fallback, statistics } = self.options;
                let statistics = statistics && !is_dense;
                let density = None;
                ffn.plan(max_tokens, PlanOptions { path, fallback, density, statistics })?
            }
        };
        plans.push((key, Arc::new(plan)));
        Ok(plans.last().expect("just pushed").1.clone())
    }
}

/// A dense layer as one of a single expert, whose masks nobody asks for.
fn of_one_expert(dense: &ffn::DenseFfn) -> Result<ffn::MoeFfn> {
    let labels = Partition::new(1, vec![0; dense.d_ff()])?;
    let w = Tensor::matrix(vec![0.0; dense.d_model()], [1, dense.d_model()])?;
    ffn::MoeFfn::from_expert_order(dense.clone(), labels, Router::Linear { w }, Selection::top_k(1))
}

impl Backend for Gpu {
    type Tensor = GpuTensor;
    type Batch = GpuBatch;
    type Ffn = GpuFfn;
    type FfnWorkspace = GpuFfnWorkspace;

    fn check_room(&self, num_weights: usize) -> Result<()> {
        let free = self.device.context.free_bytes()?;
        let needed = num_weights.saturating_mul(self.dtype.bytes());
        if needed <= free {
            return Ok(());
        }
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let expected = format!("of at most the device's {} free MiB in {}", mib(free), self.dtype);
        let missing = mib(needed - free);
        let got = format!(
            "{} MiB: {missing} MiB are missing, so free them or take a smaller type",
            mib(needed)
        );
        Err(Error::argument("encoder", "weights", expected, got))
    }

    fn tensor(&self, host: TensorRef<'_>) -> Result<GpuTensor> {
        let shape = host.shape();
        let host = host.to_owned().to_dtype(self.dtype);
        Ok(GpuTensor { buffer: Buffer::from_slice(&self.device, host.as_bytes())?, shape })
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<GpuTensor> {
        // Attention leaves the rows of padding as they are, and products read them.
        let buffer = Buffer::zeroed(&self.device, rows * cols * self.dtype.bytes())?;
        Ok(GpuTensor { buffer, shape: [rows, cols] })
    }

    fn to_host(&self, tensor: &GpuTensor, len: usize) -> Result<Vec<f32>> {
        self.wait()?;
        let mut bytes = vec![0; (len * self.dtype.bytes()).min(tensor.buffer.bytes())];
        // SAFETY: the buffer is at least as large.
        unsafe { self.device.context.copy_to_host(&mut bytes, tensor.buffer.address())? };
        let values = TensorRef::from_bytes(self.dtype, &bytes, [1, len])?.to_owned();
        Ok(values.to_f32().into_owned())
    }

    fn batch(&self, batch: &Batch, position_ids: Vec<u32>) -> Result<GpuBatch> {
        Ok(GpuBatch {
            token_ids: Buffer::from_slice(&self.device, batch.token_ids())?,
            position_ids: Buffer::from_slice(&self.device, &position_ids)?,
            sequence_offsets: Buffer::from_slice(&self.device, batch.sequence_offsets())?,
            num_tokens: batch.num_tokens(),
            num_sequences: batch.num_sequences(),
            max_length: batch.max_length(),
            is_bucket: false,
        })
    }

    fn refill(
        &self,
        on_device: &mut GpuBatch,
        batch: &Batch,
        position_ids: Vec<u32>,
    ) -> Result<()> {
        self.wait()?;
        // What a smaller batch leaves over is token 0 at position 0, and sequences without tokens.
        let padded = |values: &[u32], len: usize, padding: u32| {
            let padding = std::iter::repeat(padding);
            values.iter().copied().chain(padding).take(len).collect::<Vec<u32>>()
        };
        let GpuBatch { num_tokens, num_sequences, .. } = *on_device;
        on_device.token_ids.write(&padded(batch.token_ids(), num_tokens, 0))?;
        on_device.position_ids.write(&padded(&position_ids, num_tokens, 0))?;
        let end = batch.num_tokens() as u32;
        let offsets = padded(batch.sequence_offsets(), num_sequences + 1, end);
        on_device.sequence_offsets.write(&offsets)
    }

    fn ffn(&self, ffn: &Ffn) -> Result<GpuFfn> {
        let neurons = ffn.neurons();
        let zeros = || vec![0.0; neurons.d_model()];
        let b_out = neurons.b_out().map_or_else(zeros, |b_out| b_out.to_f32().into_owned());
        let (moe, is_moe) = match ffn {
            Ffn::Moe(moe) => (moe.to_dtype(self.dtype)?, true),
            Ffn::Dense(dense) => (of_one_expert(&dense.to_dtype(self.dtype)?)?, false),
        };
        Ok(GpuFfn { ffn: Arc::new(MoeFfn::new(&self.device, &moe)?), is_moe, b_out })
    }

    fn ffn_workspace(&self, max_tokens: usize) -> Result<GpuFfnWorkspace> {
        Ok(GpuFfnWorkspace { max_tokens, memory: None, mask: None, selected: None })
    }

    fn embed_tokens(
        &self,
        y: &mut GpuTensor,
        batch: &GpuBatch,
        embeddings: &Embeddings<GpuTensor>,
    ) -> Result<()> {
        let words = |buffer: &Buffer| View::words(buffer.address(), batch.num_tokens);
        let table = |tensor: &GpuTensor| self.view(tensor, tensor.shape);
        let tables = EmbeddingTables {
            words: table(&embeddings.words),
            positions: Some(table(&embeddings.positions)),
            token_type: Some(self.view(&embeddings.token_type, [1, embeddings.d_model])),
        };
        let y = self.view(y, [batch.num_tokens, embeddings.d_model]);
        let (tokens, positions) = (words(&batch.token_ids), words(&batch.position_ids));
        // SAFETY: the encoder has checked the ids, and everything lives until the stream is done.
        unsafe {
            embed_tokens(&self.device, self.raw_stream(), y, tokens, Some(positions), &tables)
        }
    }

    fn layer_norm(
        &self,
        x: &mut GpuTensor,
        branch: Option<&GpuTensor>,
        layer_norm: &LayerNorm<GpuTensor>,
        num_tokens: usize,
    ) -> Result<()> {
        let shape = [num_tokens, layer_norm.d_model];
        let vector = |tensor| self.view(tensor, [1, layer_norm.d_model]);
        let inputs = NormInputs {
            branch: branch.map(|branch| self.view(branch, shape)),
            weight: vector(&layer_norm.weight),
            bias: Some(vector(&layer_norm.bias)),
            epsilon: layer_norm.epsilon as f32,
            is_rms: false,
        };
        // SAFETY: everything lives until the stream is done.
        unsafe { norm(&self.device, self.raw_stream(), self.view(x, shape), None, &inputs) }
    }

    fn linear(
        &self,
        y: &mut GpuTensor,
        x: &GpuTensor,
        linear: &Linear<GpuTensor>,
        num_tokens: usize,
    ) -> Result<()> {
        if num_tokens == 0 {
            return Ok(());
        }
        let shape = ProductShape {
            dtype: self.dtype,
            rows: linear.d_out,
            out_stride: linear.d_out,
            depth: linear.d_in,
            depth_major: false,
            epilogue: Epilogue::Bias,
            multiprocessors: 0,
        };
        let operands = Operands {
            tokens: num_tokens,
            weights: linear.weight.buffer.address(),
            input: x.buffer.address(),
            out: y.buffer.address(),
            workspace: self.library_memory.address(),
        };
        self.device.context.bind()?;
        let bias = linear.bias.buffer.address();
        let product = self.product(&shape, bias, &operands)?;
        // SAFETY: the tensors have these sizes and live until the stream is done.
        unsafe { product.run(&self.library, self.raw_stream(), &operands) }
    }

    fn attention(
        &self,
        y: &mut GpuTensor,
        qkv: &GpuTensor,
        batch: &GpuBatch,
        d_model: usize,
        num_heads: usize,
    ) -> Result<()> {
        let shape = [batch.num_tokens, d_model];
        let part = |part: usize| View {
            address: qkv.buffer.address() + (part * d_model * self.dtype.bytes()) as u64,
            row_stride: 3 * d_model,
            ..self.view(qkv, shape)
        };
        let inputs = AttentionInputs {
            q: part(0),
            k: part(1),
            v: part(2),
            sequence_offsets: View::words(
                batch.sequence_offsets.address(),
                batch.num_sequences + 1,
            ),
            max_length: batch.max_length,
            num_heads,
            num_kv_heads: num_heads,
            is_causal: false,
        };
        // SAFETY: a batch has such offsets, and everything lives until the stream is done.
        unsafe { attention(&self.device, self.raw_stream(), self.view(y, shape), &inputs) }
    }

    fn run_ffn(
        &self,
        y: &mut GpuTensor,
        x: &GpuTensor,
        GpuFfn { ffn, is_moe, b_out }: &GpuFfn,
        run: FfnRun,
        batch: &GpuBatch,
        workspace: &mut GpuFfnWorkspace,
    ) -> Result<()> {
        workspace.selected = None;
        let num_tokens = batch.num_tokens;
        let shape = [num_tokens, b_out.len()];
        if run == FfnRun::Zero {
            return self.fill_rows(y, b_out, num_tokens);
        }
        let selection = match run {
            FfnRun::Selection(selection) => Some(selection),
            FfnRun::Raised(exponent) => Some(ffn.selection().raised(exponent)),
            _ => None,
        };
        let is_dense = !is_moe || run == FfnRun::Dense;
        let plan = self.plan(ffn, workspace.max_tokens, is_dense)?;
        let memory = grown(&self.device, &mut workspace.memory, plan.workspace_bytes())?;
        let memory = Workspace { address: memory.address(), bytes: memory.bytes() };
        let mut inputs = FfnInputs::new(self.view(x, shape));
        inputs.selection = selection.filter(|_| !is_dense);
        inputs.num_valid_tokens = batch.num_valid_tokens();
        if plan.path(num_tokens) != Path::DenseExact {
            let num_experts = ffn.neurons().num_experts;
            let words = num_experts.div_ceil(32);
            // Room for every batch, so that it stays where it is for those that were captured.
            let bytes = 4 * workspace.max_tokens.max(num_tokens) * words;
            let mask = grown(&self.device, &mut workspace.mask, bytes)?;
            inputs.mask = Some(View::matrix(mask.address(), Format::Word, [num_tokens, words]));
            workspace.selected = Some([num_tokens, num_experts]);
        }
        // SAFETY: everything lives until the stream is done.
        unsafe { plan.run(self.raw_stream(), self.view(y, shape), &inputs, memory) }
    }

    fn mask(&self, workspace: &GpuFfnWorkspace) -> Result<Option<ExpertMask>> {
        let (Some([num_tokens, num_experts]), Some(mask)) = (workspace.selected, &workspace.mask)
        else {
            return Ok(None);
        };
        self.wait()?;
        let mut words = mask.read::<u32>()?;
        words.truncate(num_tokens * num_experts.div_ceil(32));
        ExpertMask::from_words(num_tokens, num_experts, words).map(Some)
    }

    fn pool(
        &self,
        y: &mut GpuTensor,
        x: &GpuTensor,
        batch: &GpuBatch,
        d_model: usize,
    ) -> Result<()> {
        let x = self.view(x, [batch.num_tokens, d_model]);
        let y = self.view(y, [batch.num_sequences, d_model]);
        let offsets = View::words(batch.sequence_offsets.address(), batch.num_sequences + 1);
        // SAFETY: a batch has such offsets, and everything lives until the stream is done.
        unsafe { pool(&self.device, self.raw_stream(), y, x, offsets) }
    }
}

impl GpuBatch {
    /// The end of the last sequence, where there may be padding behind it.
    fn num_valid_tokens(&self) -> Option<View> {
        let end = self.sequence_offsets.address() + 4 * self.num_sequences as u64;
        self.is_bucket.then(|| View::words(end, 1))
    }
}

impl Encoder<Gpu> {
    /// A batch with room for `num_sequences` sequences of up to `length` tokens, to be
    /// [refilled](Encoder::refill) with any that fits; full of token 0 until then. What a
    /// batch leaves over is padding, which sparse experts and attention skip, and dense products and norms compute.
    ///
    /// # Errors
    /// When one of the sizes is 0, a sequence would be longer than the model's positions, or the device has
    /// no room.
    pub fn bucket(&self, [num_sequences, length]: [usize; 2]) -> Result<DeviceBatch<Gpu>> {
        let refuse = |expected: String| {
            let got = format!("[{num_sequences}, {length}]");
            Err(Error::argument("encoder", "bucket", expected, got))
        };
        if num_sequences == 0 || length == 0 || length > self.max_length() {
            let longest = self.max_length();
            return refuse(format!(
                "[sequences, length], at least 1 each, length at most {longest}"
            ));
        }
        let tokens =
            num_sequences.checked_mul(length).and_then(|tokens| u32::try_from(tokens).ok());
        let Some(tokens) = tokens else { return refuse("of fewer than 2^32 tokens".into()) };
        let device = &self.backend().device;
        let offsets: Vec<u32> = (0..=tokens).step_by(length).collect();
        let zeros = || Buffer::zeroed(device, 4 * tokens as usize);
        let batch = GpuBatch {
            token_ids: zeros()?,
            position_ids: zeros()?,
            sequence_offsets: Buffer::from_slice(device, &offsets)?,
            num_tokens: tokens as usize,
            num_sequences,
            max_length: length,
            is_bucket: true,
        };
        Ok(DeviceBatch::bucket(batch, [num_sequences, length]))
    }

    /// What selection did so far in each layer, read while the stream runs on: what is queued or under way is
    /// not counted, or in part. A layer has none when its FFN is dense, nothing ran, or
    /// [`GpuOptions::statistics`] was not asked for; passes that fell back to the exact dense FFN selected
    /// nothing.
    ///
    /// # Errors
    /// When an earlier kernel failed.
    pub fn statistics(&self) -> Result<Vec<Option<RoutingCounts>>> {
        let plans = &self.backend().plans;
        let plans = plans.lock().unwrap_or_else(|poison| poison.into_inner());
        let of_layer = |layer| {
            let mut sum: Option<RoutingCounts> = None;
            for (_, plan) in
                plans.iter().filter(|(_, plan)| Arc::ptr_eq(plan.ffn(), &self.ffn(layer).ffn))
            {
                if let Some(counts) = plan.statistics()? {
                    sum.get_or_insert_default().add(&counts);
                }
            }
            Ok(sum)
        };
        (0..self.num_layers()).map(of_layer).collect()
    }
}

impl Gpu {
    /// The same row for every token, copied from the host.
    fn fill_rows(&self, y: &mut GpuTensor, row: &[f32], num_tokens: usize) -> Result<()> {
        self.wait()?;
        let rows = Tensor::vector(row.repeat(num_tokens)).to_dtype(self.dtype);
        // SAFETY: a tensor has at least the rows of the tokens.
        unsafe { self.device.context.copy_to_device(y.buffer.address(), rows.as_bytes()) }
    }
}

/// Memory of at least this size, kept for the next time.
fn grown<'a>(device: &Device, memory: &'a mut Option<Buffer>, bytes: usize) -> Result<&'a Buffer> {
    if memory.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
        // The old one first; freeing it waits for the device.
        *memory = None;
        *memory = Some(Buffer::new(device, bytes)?);
    }
    memory.as_ref().ok_or_else(|| Error::argument("transformer", "memory", "some", "none"))
}
