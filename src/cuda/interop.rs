//! The operations on cudarc's own streams and slices: lengths and devices are checked by type, and
//! cudarc learns of every read and write, after the launch, so that its other streams wait. The waits that
//! cudarc adds for this do not belong into a recording: to record a graph, ask slices for their addresses
//! before it begins (`examples/engine.rs`).

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::driver::Stream;
use super::{
    Device, DeviceRouter, Format, Gpu, GpuOptions, RawStream, RouteIndexOutputs,
    RouterSelectOutputs, SelectOutputs, View, Workspace,
};
use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::ffn::Selection;

pub use cudarc;

impl From<&CudaStream> for RawStream {
    fn from(stream: &CudaStream) -> Self {
        Self(stream.cu_stream().cast())
    }
}

impl Device {
    /// The primary context, for streams, graphs and memory.
    pub fn cudarc_context(&self) -> &Arc<CudaContext> {
        &self.context.0
    }
}

impl Gpu {
    /// A backend on a stream of the caller's, to be captured there.
    ///
    /// # Errors
    /// When cuBLASLt is missing or the device has too little memory.
    pub fn on_stream(
        device: &Arc<Device>,
        dtype: DType,
        options: GpuOptions,
        stream: Arc<CudaStream>,
    ) -> Result<Self> {
        Self::on(device, dtype, options, Stream(stream))
    }
}

/// The addresses of slices, and the guards that tell cudarc of their use: they live until after the
/// launch.
struct Use<'a> {
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Use<'a> {
    fn on(stream: &'a CudaStream) -> Self {
        Self { stream, guards: Vec::new() }
    }

    fn read<T>(&mut self, slice: &'a impl DevicePtr<T>) -> u64 {
        let (address, guard) = slice.device_ptr(self.stream);
        self.guards.push(guard);
        address
    }

    fn write<T>(&mut self, slice: &'a mut impl DevicePtrMut<T>) -> u64 {
        let (address, guard) = slice.device_ptr_mut(self.stream);
        self.guards.push(guard);
        address
    }

    fn write_words(&mut self, slice: &'a mut CudaSlice<u32>) -> View {
        let len = slice.len();
        View::words(self.write(slice), len)
    }

    /// Rows without gaps; a remainder is left out.
    fn write_rows<T>(&mut self, slice: &'a mut CudaSlice<T>, format: Format, width: usize) -> View {
        let rows = slice.len() / width.max(1);
        View::matrix(self.write(slice), format, [rows, width])
    }

    fn write_workspace(&mut self, slice: &'a mut CudaSlice<u8>) -> Workspace {
        let bytes = slice.len();
        Workspace { address: self.write(slice), bytes }
    }
}

/// [`select`](super::select) on slices: mask \[T, ⌈E/32⌉\], counts \[T\], scores \[T, E\].
///
/// # Errors
/// As there.
pub fn select(
    device: &Device,
    stream: &CudaStream,
    mask: &mut CudaSlice<u32>,
    counts: Option<&mut CudaSlice<u32>>,
    scores: &CudaSlice<f32>,
    num_experts: usize,
    selection: &Selection,
) -> Result<()> {
    let num_tokens = scores.len() / num_experts.max(1);
    let mut slices = Use::on(stream);
    let outputs = SelectOutputs {
        mask: slices.write_rows(mask, Format::Word, num_experts.div_ceil(32)),
        counts: counts.map(|counts| slices.write_words(counts)),
        status: None,
    };
    let scores = View::matrix(slices.read(scores), Format::F32, [num_tokens, num_experts]);
    let none = Workspace::NONE;
    // SAFETY: the slices hold what their lengths say, and the guards order their other uses.
    unsafe { super::select(device, stream.into(), &outputs, scores, None, selection, none) }
}

/// [`router_select`](super::router_select) on slices: mask \[T, ⌈E/32⌉\], scores \[T, E\],
/// x \[T, d_model\].
///
/// # Errors
/// As there.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, parameters, workspace")]
pub fn router_select<T: Element>(
    device: &Device,
    stream: &CudaStream,
    mask: &mut CudaSlice<u32>,
    scores: Option<&mut CudaSlice<f32>>,
    x: &CudaSlice<T>,
    router: &DeviceRouter,
    selection: &Selection,
    workspace: &mut CudaSlice<u8>,
) -> Result<()> {
    let router = router.view();
    let (num_experts, d_model) = (router.num_experts(), router.d_model());
    let num_tokens = x.len() / d_model.max(1);
    let mut slices = Use::on(stream);
    let selected = SelectOutputs {
        mask: slices.write_rows(mask, Format::Word, num_experts.div_ceil(32)),
        counts: None,
        status: None,
    };
    let scores = scores.map(|scores| slices.write_rows(scores, Format::F32, num_experts));
    let outputs = RouterSelectOutputs { selected, scores };
    let x = View::matrix(slices.read(x), Format::Float(T::DTYPE), [num_tokens, d_model]);
    let workspace = slices.write_workspace(workspace);
    let stream = stream.into();
    // SAFETY: the slices hold what their lengths say, and the guards order their other uses.
    unsafe {
        super::router_select(device, stream, &outputs, x, None, &router, selection, workspace)
    }
}

/// What [`route_index`] writes; see [`RouteIndexOutputs`].
#[expect(missing_docs, reason = "the fields are those of RouteIndexOutputs")]
pub struct RouteIndexSlices<'a> {
    pub counts: &'a mut CudaSlice<u32>,
    pub offsets: &'a mut CudaSlice<u32>,
    pub token_ids: &'a mut CudaSlice<u32>,
    pub expert_masks: &'a mut CudaSlice<u32>,
    pub word_offsets: &'a mut CudaSlice<u32>,
    pub union_ids: &'a mut CudaSlice<u32>,
    pub num_union: &'a mut CudaSlice<u32>,
}

/// [`route_index`](super::route_index) on slices: mask \[T, ⌈E/32⌉\].
///
/// # Errors
/// As there.
pub fn route_index(
    device: &Device,
    stream: &CudaStream,
    outputs: RouteIndexSlices<'_>,
    mask: &CudaSlice<u32>,
    num_experts: usize,
    workspace: &mut CudaSlice<u8>,
) -> Result<()> {
    let row_words = num_experts.div_ceil(32);
    let num_tokens = mask.len() / row_words.max(1);
    let mut slices = Use::on(stream);
    let outputs = RouteIndexOutputs {
        counts: slices.write_words(outputs.counts),
        offsets: slices.write_words(outputs.offsets),
        token_ids: slices.write_words(outputs.token_ids),
        expert_masks: slices.write_rows(
            outputs.expert_masks,
            Format::Word,
            num_tokens.div_ceil(32),
        ),
        word_offsets: slices.write_rows(
            outputs.word_offsets,
            Format::Word,
            num_tokens.div_ceil(32),
        ),
        union_ids: slices.write_words(outputs.union_ids),
        num_union: slices.write_words(outputs.num_union),
        status: None,
    };
    let mask = View::matrix(slices.read(mask), Format::Word, [num_tokens, row_words]);
    let workspace = slices.write_workspace(workspace);
    // SAFETY: the slices hold what their lengths say, and the guards order their other uses.
    unsafe {
        super::route_index(device, stream.into(), &outputs, mask, num_experts, None, workspace)
    }
}
