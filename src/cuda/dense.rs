//! The whole FFN on every token: two products of cuBLASLt, or one and a first one under masks ([`super::experts_masked`]).

use std::sync::Arc;

use super::Device;
use super::cublaslt::{
    CublasLt, Epilogue, Operands, Product, ProductShape, Timer, WORKSPACE_BYTES,
};
use super::driver::{Function, RawStream};
use super::kernels::{Modules, PerDType};
use super::workspace::Layout;
use crate::abi::{MOEFY_ACTIVATE_THREADS, moefy_activate_params, moefy_neurons};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::Activation;

/// Threads of a block of the activation kernel, and how many such blocks keep a multiprocessor busy: beyond them, a block
/// takes several tokens.
const THREADS: u32 = MOEFY_ACTIVATE_THREADS;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 16;

/// Bytes that a thread of the kernel that masks writes at once.
const CHUNK_BYTES: u32 = 16;

pub(super) struct Kernels {
    /// A neuron a thread, and eight.
    activate: [PerDType; 2],
    mask: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let one = [
            "moefy_dense_activate_f32_1",
            "moefy_dense_activate_f16_1",
            "moefy_dense_activate_bf16_1",
        ];
        let eight = [
            "moefy_dense_activate_f32_8",
            "moefy_dense_activate_f16_8",
            "moefy_dense_activate_bf16_8",
        ];
        let load = |names| modules.per_dtype("dense", names, 0);
        let mask = modules.function("dense", "moefy_dense_mask", 0)?;
        Ok(Self { activate: [load(one)?, load(eight)?], mask })
    }
}

/// What comes between the products of all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Masked {
    /// Masks.
    Plain,
    /// Masks and gates.
    Gated,
}

/// A dense function: the original FFN, or that of all experts under masks.
#[derive(Clone, Copy, Debug)]
pub(super) struct DenseLayer {
    pub(super) neurons: moefy_neurons,
    pub(super) dtype: DType,
    pub(super) activation: Activation,
    /// b1 and b2 of the weights' element type, or null.
    pub(super) bias_in: u64,
    pub(super) bias_out: u64,
    /// Of the function of all experts.
    pub(super) masked: Option<Masked>,
}

impl DenseLayer {
    fn inputs(&self) -> usize {
        let n = &self.neurons;
        (1 + n.glu as usize) * n.d_ff as usize + n.rank as usize
    }

    fn hidden(&self) -> usize {
        self.neurons.d_ff as usize + self.neurons.rank as usize
    }

    /// Whether zeros can be written over h afterwards, in whole chunks.
    fn can_be_masked_later(&self) -> bool {
        let chunks =
            |neurons: u32| (neurons * self.dtype.bytes() as u32).is_multiple_of(CHUNK_BYTES);
        self.masked == Some(Masked::Plain)
            && chunks(self.neurons.expert_width)
            && chunks(self.neurons.d_ff)
    }

    /// What the first product can do at once, if that is everything but plain masks.
    pub(super) fn fused_activation(&self) -> Option<Epilogue> {
        let n = &self.neurons;
        let is_more = self.masked.is_some() && !self.can_be_masked_later();
        if is_more || n.glu == 1 || n.mean != 0 || n.rank != 0 {
            return None;
        }
        // cuBLASLt approximates tanh: an error of 3e-6 in f32, three times what a product of this type leaves.
        if self.activation == Activation::GeluTanh && self.dtype == DType::F32 {
            return None;
        }
        Some(match (self.activation, self.bias_in != 0) {
            (Activation::Relu, false) => Epilogue::Relu,
            (Activation::Relu, true) => Epilogue::ReluBias,
            (Activation::GeluTanh, false) => Epilogue::GeluTanh,
            (Activation::GeluTanh, true) => Epilogue::GeluTanhBias,
            (Activation::Identity, false) => Epilogue::Nothing,
            (Activation::Identity, true) => Epilogue::Bias,
            (Activation::Gelu | Activation::Silu, _) => return None,
        })
    }

    fn products(&self) -> [ProductShape; 2] {
        let (dtype, d_model) = (self.dtype, self.neurons.d_model as usize);
        let first = self.fused_activation().unwrap_or(Epilogue::Nothing);
        let second = if self.bias_out == 0 { Epilogue::Nothing } else { Epilogue::Bias };
        let shape = |rows, depth, depth_major, epilogue| ProductShape {
            dtype,
            rows,
            out_stride: rows,
            depth,
            depth_major,
            epilogue,
            multiprocessors: 0,
        };
        [shape(self.inputs(), d_model, false, first), shape(d_model, self.hidden(), true, second)]
    }
}

/// Places in the workspace.
#[derive(Clone, Copy, Debug)]
struct Places {
    library: u64,
    pre: u64,
    hidden: u64,
    bytes: usize,
}

impl Places {
    fn new(layer: &DenseLayer, max_tokens: usize) -> Option<Self> {
        let mut layout = Layout::default();
        let library = layout.place(WORKSPACE_BYTES, 1)?;
        let matrix = |layout: &mut Layout, width: usize| {
            layout.place(max_tokens.checked_mul(width)?, layer.dtype.bytes())
        };
        let hidden = matrix(&mut layout, layer.hidden())?;
        let pre = match layer.fused_activation() {
            Some(_) => hidden,
            None => matrix(&mut layout, layer.inputs())?,
        };
        Some(Self { library, pre, hidden, bytes: layout.bytes() })
    }
}

/// Bytes of workspace for at most that many tokens; `None` where the sizes overflow.
pub(super) fn dense_workspace_bytes(layer: &DenseLayer, max_tokens: usize) -> Option<usize> {
    Places::new(layer, max_tokens).map(|places| places.bytes)
}

/// Addresses of one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct DenseRun {
    pub(super) x: u64,
    pub(super) y: u64,
    /// Of a masked function.
    pub(super) mask: u64,
    /// Of a masked function, or null.
    pub(super) gates: u64,
    pub(super) num_tokens: usize,
    pub(super) workspace: u64,
}

/// A dense function with algorithms for some numbers of tokens.
pub(super) struct Dense {
    library: Arc<CublasLt>,
    layer: DenseLayer,
    places: Places,
    /// Ascending.
    sizes: Vec<(usize, [Product; 2])>,
}

impl Dense {
    /// Times algorithms for each of `sizes`, ascending, the last of them the most tokens of a run.
    /// Waits for the device.
    ///
    /// # Safety
    /// `run` must lead to memory for the largest size; y is overwritten. The context is bound.
    pub(super) unsafe fn new(
        device: &Device,
        layer: DenseLayer,
        sizes: &[usize],
        run: &DenseRun,
    ) -> Result<Self> {
        let max_tokens = sizes.last().copied().unwrap_or(0);
        let places = Places::new(&layer, max_tokens).expect("the workspace exists");
        let library = Arc::new(CublasLt::open()?);
        let mut dense = Self { library, layer, places, sizes: Vec::new() };
        let timer = Timer::new(device)?;
        for &num_tokens in sizes {
            let [first, second] = layer.products();
            let run = DenseRun { num_tokens, ..*run };
            let [input, output] = dense.operands(&run);
            let default_stream = RawStream(std::ptr::null_mut());
            // SAFETY: the caller's promise.
            let products = unsafe {
                let first = Product::tune(&dense.library, &timer, &first, layer.bias_in, &input)?;
                // The second product is timed on what it will read, but for masks.
                dense.activate(device, default_stream, &run)?;
                device.context.synchronize()?;
                [first, Product::tune(&dense.library, &timer, &second, layer.bias_out, &output)?]
            };
            dense.sizes.push((num_tokens, products));
        }
        Ok(dense)
    }

    /// The numbers of tokens that there are algorithms for, ascending.
    pub(super) fn sizes(&self) -> Vec<usize> {
        self.sizes.iter().map(|(size, _)| *size).collect()
    }

    /// What cuBLASLt proposes for the first product of a size, where it has these multiprocessors (0: all): at least one, but
    /// perhaps none for some of these numbers.
    pub(super) fn first_candidates(
        &self,
        num_tokens: usize,
        multiprocessors: &[u32],
    ) -> Result<Vec<Product>> {
        let (mut all, mut failure) = (Vec::new(), None);
        for &multiprocessors in multiprocessors {
            let shape = ProductShape { multiprocessors, ..self.layer.products()[0] };
            let bias = self.layer.bias_in;
            match Product::candidates(&self.library, &shape, bias, num_tokens) {
                Ok(candidates) => all.extend(candidates),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) if all.is_empty() => Err(error),
            _ => Ok(all),
        }
    }

    /// Takes this one for the first product of a size that there are algorithms for.
    pub(super) fn set_first(&mut self, num_tokens: usize, product: Product) {
        let of_size = self.sizes.iter_mut().find(|(size, _)| *size == num_tokens);
        of_size.expect("one of the sizes").1[0] = product;
    }

    /// The same algorithms for another layer of the same sizes.
    pub(super) fn with_layer(&self, layer: DenseLayer) -> Result<Self> {
        let rebind = |(size, [first, second]): &(usize, [Product; 2])| {
            Ok((*size, [first.with_bias(layer.bias_in)?, second.with_bias(layer.bias_out)?]))
        };
        Ok(Self {
            library: self.library.clone(),
            layer,
            places: self.places,
            sizes: self.sizes.iter().map(rebind).collect::<Result<_>>()?,
        })
    }

    fn operands(&self, run: &DenseRun) -> [Operands; 2] {
        let [pre, hidden, workspace] =
            [self.places.pre, self.places.hidden, self.places.library].map(|p| run.workspace + p);
        let (neurons, tokens) = (&self.layer.neurons, run.num_tokens);
        [
            Operands { tokens, weights: neurons.w_in, input: run.x, out: pre, workspace },
            Operands { tokens, weights: neurons.w_out, input: hidden, out: run.y, workspace },
        ]
    }

    /// Runs a product with the algorithm of the next larger size, or of another one that can.
    ///
    /// # Safety
    /// As for [`Self::run`].
    unsafe fn product(&self, which: usize, stream: RawStream, operands: &Operands) -> Result<()> {
        let next = self.sizes.partition_point(|(size, _)| *size < operands.tokens);
        let (smaller, larger) = self.sizes.split_at(next);
        let mut result = Ok(());
        for (_, products) in larger.iter().chain(smaller.iter().rev()) {
            // SAFETY: the caller's promise; a failure has launched nothing.
            result = unsafe { products[which].run(&self.library, stream, operands) };
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Whatever of φ, gates and masks the first product does not do.
    ///
    /// # Safety
    /// As for [`Self::run`].
    unsafe fn activate(&self, device: &Device, stream: RawStream, run: &DenseRun) -> Result<()> {
        let is_fused = self.layer.fused_activation().is_some();
        if is_fused && run.mask == 0 {
            return Ok(());
        }
        let [input, output] = self.operands(run);
        let params = moefy_activate_params {
            neurons: self.layer.neurons,
            pre: input.out,
            hidden: output.input,
            mask: run.mask,
            gates: run.gates,
            num_tokens: run.num_tokens as u32,
            element_bytes: self.layer.dtype.bytes() as u32,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if is_fused {
                launch_mask(device, stream, &params)
            } else {
                launch_activate(device, stream, self.layer.dtype, &params)
            }
        }
    }

    /// # Safety
    /// The addresses must be what the layer says, for `num_tokens` of at least 1 and at most the
    /// largest size, and the context must be bound.
    pub(super) unsafe fn run(
        &self,
        device: &Device,
        stream: RawStream,
        run: &DenseRun,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            self.begin(stream, run)?;
            self.finish(device, stream, run)
        }
    }

    /// What needs no masks.
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub(super) unsafe fn begin(&self, stream: RawStream, run: &DenseRun) -> Result<()> {
        let [input, _] = self.operands(run);
        // SAFETY: the caller's promise.
        unsafe { self.product(0, stream, &input) }
    }

    /// Address and bytes of what the first product multiplies with.
    pub(super) fn first_weights(&self) -> (u64, usize) {
        let shape = &self.layer.products()[0];
        (self.layer.neurons.w_in, shape.rows * shape.depth * shape.dtype.bytes())
    }

    /// The same by another product and other weights.
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub(super) unsafe fn begin_by(
        &self,
        product: &Product,
        weights: u64,
        stream: RawStream,
        run: &DenseRun,
    ) -> Result<()> {
        let [input, _] = self.operands(run);
        // SAFETY: the caller's promise.
        unsafe { product.run(&self.library, stream, &Operands { weights, ..input }) }
    }

    /// Where h is.
    pub(super) fn hidden(&self, run: &DenseRun) -> u64 {
        run.workspace + self.places.hidden
    }

    /// The second product, of h.
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub(super) unsafe fn second(&self, stream: RawStream, run: &DenseRun) -> Result<()> {
        let [_, output] = self.operands(run);
        // SAFETY: the caller's promise.
        unsafe { self.product(1, stream, &output) }
    }

    /// The rest of a run.
    ///
    /// # Safety
    /// As for [`Self::run`], after [`Self::begin`].
    pub(super) unsafe fn finish(
        &self,
        device: &Device,
        stream: RawStream,
        run: &DenseRun,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            self.activate(device, stream, run)?;
            self.second(stream, run)
        }
    }
}

/// Pre-activations → h.
///
/// # Safety
/// The addresses must be what the kernel expects, for at least one token, and the context must be bound.
pub(super) unsafe fn launch_activate(
    device: &Device,
    stream: RawStream,
    dtype: DType,
    params: &moefy_activate_params,
) -> Result<()> {
    let [d_ff, rank] = [params.neurons.d_ff, params.neurons.rank];
    let by_eight = d_ff % 8 == 0 && rank % 8 == 0;
    let across = (d_ff + rank).div_ceil(if by_eight { THREADS * 8 } else { THREADS });
    let kernel = device.dense.activate[usize::from(by_eight)].get(dtype);
    // SAFETY: the caller's promise.
    unsafe { kernel.launch(stream, grid(device, across, params), THREADS, 0, params) }
}

/// h → h with zeros where a token does not run the expert.
///
/// # Safety
/// As for [`launch_activate`]; masks must be there, and an expert of whole chunks.
unsafe fn launch_mask(
    device: &Device,
    stream: RawStream,
    params: &moefy_activate_params,
) -> Result<()> {
    let n = &params.neurons;
    let chunks = n.num_experts * (n.expert_width * params.element_bytes / CHUNK_BYTES);
    let grid = grid(device, chunks.div_ceil(THREADS), params);
    // SAFETY: the caller's promise.
    unsafe { device.dense.mask.launch(stream, grid, THREADS, 0, params) }
}

/// Blocks for all tokens, of which `across` share one.
fn grid(device: &Device, across: u32, params: &moefy_activate_params) -> [u32; 3] {
    let blocks = device.properties().multiprocessors as u32 * BLOCKS_PER_MULTIPROCESSOR;
    [across, params.num_tokens.min(blocks.div_ceil(across)), 1]
}
