//! The operations on cudarc's own streams and slices: lengths and devices are checked by type, and
//! cudarc learns of every read and write, after the launch, so that its other streams wait.

use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut};
use std::sync::Arc;

use super::view::{Format, View, Workspace};
use super::{Device, RawStream, SelectOutputs};
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

/// [`select`](super::select) on slices: scores \[num_tokens, num_experts\] without gaps.
///
/// # Errors
/// As there.
pub fn select(
    device: &Device,
    stream: &CudaStream,
    mask: &mut impl DevicePtrMut<u32>,
    counts: Option<&mut impl DevicePtrMut<u32>>,
    scores: &impl DevicePtr<f32>,
    num_experts: usize,
    selection: &Selection,
) -> Result<()> {
    let num_tokens = scores.len() / num_experts.max(1);
    let row_words = num_experts.div_ceil(32);
    let mask_rows = mask.len() / row_words.max(1);
    // The guards live to the end: they record the use after the launch.
    let (mask, _mask) = mask.device_ptr_mut(stream);
    let (scores, _scores) = scores.device_ptr(stream);
    let counts = counts.map(|counts| (counts.len(), counts.device_ptr_mut(stream)));
    let outputs = SelectOutputs {
        mask: View::matrix(mask, Format::Word, [mask_rows, row_words]),
        counts: counts.as_ref().map(|(len, (address, _))| View::words(*address, *len)),
        status: None,
    };
    let scores = View::matrix(scores, Format::F32, [num_tokens, num_experts]);
    // SAFETY: the slices hold what their lengths say, and the guards order their other uses.
    unsafe {
        super::select(device, stream.into(), &outputs, scores, None, selection, Workspace::NONE)
    }
}
