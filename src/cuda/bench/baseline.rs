//! The dense layer as fast as cuBLASLt runs it: what every sparse layer is measured against.
//!
//! It shares no choice with the dense paths of a plan. For one number of tokens it times, over as many
//! sets of weights as keep them out of the cache, every algorithm that cuBLASLt proposes for each
//! product; then the whole layer with φ inside the first product or apart, with gate and up as one
//! product or two, and with the batch as it is or padded to a multiple of 8.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::graph::{TimedGraph, times_by_turns};
use crate::abi::moefy_activate_params;
use crate::cuda::cublaslt::{CublasLt, Epilogue, Operands, Product, ProductShape, WORKSPACE_BYTES};
use crate::cuda::dense::{DenseLayer, launch_activate};
use crate::cuda::turns::fastest_by_turns;
use crate::cuda::{Buffer, Device, MoeFfn, RawStream};
use crate::error::{Error, Result};

/// The dense layer on several sets of weights, captured.
pub(super) struct Baseline {
    pub(super) graph: TimedGraph,
    /// What the graph uses.
    _library: CublasLt,
    _memory: Memory,
}

/// Between the products, and after them.
struct Memory {
    pre: Buffer,
    hidden: Buffer,
    y: Buffer,
    library: Buffer,
}

/// What the first product does.
#[derive(Clone, Copy)]
enum First {
    /// φ too.
    Fused(Epilogue),
    /// Pre-activations.
    Apart,
    /// The gate's pre-activations; once more, the others.
    Halves,
}

/// Rows that every x must have.
pub(super) fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(8)
}

impl Baseline {
    /// Finds the fastest way and captures it `passes` times over all sets, each with its own x.
    ///
    /// # Errors
    /// When cuBLASLt is missing or the device has too little memory.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        sets: &[Arc<MoeFfn>],
        x: &[Buffer],
        tokens: usize,
        passes: usize,
    ) -> Result<Self> {
        let device = sets[0].device();
        device.context.bind()?;
        let layers = sets.iter().map(|set| set.exact()).collect::<Result<Vec<_>>>()?;
        let library = CublasLt::open()?;
        let memory = Memory::new(device, &layers[0], padded(tokens))?;
        let way = |tokens| {
            let (library, layers, memory) = (&library, &layers[..], &memory);
            Batch { device, stream, library, layers, x, memory, tokens }.fastest(passes)
        };
        let mut graphs = vec![way(tokens)?];
        if padded(tokens) > tokens {
            graphs.push(way(padded(tokens))?);
        }
        let graph = graphs.swap_remove(fastest_of(&graphs)?.expect("there is a way"));
        Ok(Self { graph, _library: library, _memory: memory })
    }
}

impl Memory {
    fn new(device: &Device, layer: &DenseLayer, rows: usize) -> Result<Self> {
        let n = &layer.neurons;
        let matrix = |width: usize| Buffer::new(device, rows * width * layer.dtype.bytes());
        Ok(Self {
            pre: matrix(inputs(layer))?,
            hidden: matrix(n.d_ff as usize)?,
            y: matrix(n.d_model as usize)?,
            library: Buffer::new(device, WORKSPACE_BYTES)?,
        })
    }
}

/// Rows of the first weights.
fn inputs(layer: &DenseLayer) -> usize {
    (1 + layer.neurons.glu as usize) * layer.neurons.d_ff as usize
}

/// A number of rows, and what they go through.
struct Batch<'a> {
    device: &'a Device,
    stream: &'a Arc<CudaStream>,
    library: &'a CublasLt,
    layers: &'a [DenseLayer],
    x: &'a [Buffer],
    memory: &'a Memory,
    tokens: usize,
}

impl Batch<'_> {
    /// The fastest way.
    fn fastest(&self, passes: usize) -> Result<TimedGraph> {
        let layer = &self.layers[0];
        let mut ways = vec![First::Apart];
        ways.extend(layer.fused_activation().map(First::Fused));
        ways.extend((layer.neurons.glu == 1).then_some(First::Halves));
        let mut second = None;
        let mut graphs = Vec::new();
        for way in ways {
            let first = self.fastest_product(&self.first_shape(way), |stream, set, product| {
                self.run_first(stream, set, way, product)
            })?;
            if second.is_none() {
                // It is timed on what it will read.
                self.run_first(self.stream.as_ref().into(), 0, way, &first)?;
                second =
                    Some(self.fastest_product(&self.second_shape(), |stream, set, product| {
                        self.run_second(stream, set, product)
                    })?);
            }
            let second = second.as_ref().expect("just found");
            let parts = passes * self.layers.len();
            graphs.push(TimedGraph::capture(self.stream, parts, |stream, part| {
                let set = part % self.layers.len();
                self.run_first(stream, set, way, &first)?;
                self.run_second(stream, set, second)
            })?);
        }
        Ok(graphs.swap_remove(fastest_of(&graphs)?.expect("there is a way")))
    }

    /// The algorithm that takes least time over all sets.
    fn fastest_product(
        &self,
        shape: &ProductShape,
        run: impl Fn(RawStream, usize, &Product) -> Result<()>,
    ) -> Result<Product> {
        let any_bias = self.memory.y.address();
        let (mut products, mut graphs) = (Vec::new(), Vec::new());
        for product in Product::candidates(self.library, shape, any_bias, self.tokens)? {
            // The first run loads the kernel, which a capture must not do.
            if run(self.stream.as_ref().into(), 0, &product).is_err() {
                continue;
            }
            let sets = self.layers.len();
            let launch = |stream, set| run(stream, set, &product);
            graphs.push(TimedGraph::capture(self.stream, sets, launch)?);
            products.push(product);
        }
        let index = fastest_of(&graphs)?.ok_or_else(|| {
            let got = format!("none for {} x {} x {}", self.tokens, shape.rows, shape.depth);
            Error::argument("bench", "cuBLASLt", "an algorithm that runs", got)
        })?;
        Ok(products.swap_remove(index))
    }

    fn first_shape(&self, way: First) -> ProductShape {
        let layer = &self.layers[0];
        ProductShape {
            dtype: layer.dtype,
            rows: match way {
                First::Halves => layer.neurons.d_ff as usize,
                _ => inputs(layer),
            },
            out_stride: inputs(layer),
            depth: layer.neurons.d_model as usize,
            depth_major: false,
            epilogue: match way {
                First::Fused(epilogue) => epilogue,
                _ => Epilogue::Nothing,
            },
            multiprocessors: 0,
        }
    }

    fn second_shape(&self) -> ProductShape {
        let layer = &self.layers[0];
        let d_model = layer.neurons.d_model as usize;
        ProductShape {
            dtype: layer.dtype,
            rows: d_model,
            out_stride: d_model,
            depth: layer.neurons.d_ff as usize,
            depth_major: true,
            epilogue: if layer.bias_out == 0 { Epilogue::Nothing } else { Epilogue::Bias },
            multiprocessors: 0,
        }
    }

    /// Up to h.
    fn run_first(
        &self,
        stream: RawStream,
        set: usize,
        way: First,
        product: &Product,
    ) -> Result<()> {
        let layer = &self.layers[set];
        let n = &layer.neurons;
        let [pre, hidden] = [&self.memory.pre, &self.memory.hidden].map(Buffer::address);
        let operands = Operands {
            tokens: self.tokens,
            weights: n.w_in,
            input: self.x[set].address(),
            out: if matches!(way, First::Fused(_)) { hidden } else { pre },
            workspace: self.memory.library.address(),
        };
        let product = product.with_bias(layer.bias_in)?;
        // SAFETY: the buffers have the sizes of the batch and live until the device has run everything.
        unsafe {
            product.run(self.library, stream, &operands)?;
            if let First::Fused(_) = way {
                return Ok(());
            }
            if let First::Halves = way {
                let half = u64::from(n.d_ff) * layer.dtype.bytes() as u64;
                let (weights, out) = (n.w_in + half * n.d_model, pre + half);
                product.run(self.library, stream, &Operands { weights, out, ..operands })?;
            }
            let params = moefy_activate_params {
                neurons: *n,
                pre,
                hidden,
                mask: 0,
                gates: 0,
                num_tokens: self.tokens as u32,
                element_bytes: layer.dtype.bytes() as u32,
            };
            launch_activate(self.device, stream, layer.dtype, &params)
        }
    }

    /// From h to y.
    fn run_second(&self, stream: RawStream, set: usize, product: &Product) -> Result<()> {
        let layer = &self.layers[set];
        let operands = Operands {
            tokens: self.tokens,
            weights: layer.neurons.w_out,
            input: self.memory.hidden.address(),
            out: self.memory.y.address(),
            workspace: self.memory.library.address(),
        };
        let product = product.with_bias(layer.bias_out)?;
        // SAFETY: as above.
        unsafe { product.run(self.library, stream, &operands) }
    }
}

fn fastest_of(graphs: &[TimedGraph]) -> Result<Option<usize>> {
    fastest_by_turns(graphs.len(), |order| {
        let turns: Vec<_> = order.iter().map(|&index| &graphs[index]).collect();
        times_by_turns(&turns).map(Some)
    })
}
