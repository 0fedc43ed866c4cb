//! A MoEfied FFN inside an engine's own CUDA graph: its memory, its stream, its launches around ours.

use std::sync::Arc;

use moefy::convert::{ConvertOptions, convert_ffn};
use moefy::cuda::interop::cudarc::driver::{DevicePtr, DevicePtrMut, sys};
use moefy::cuda::{Device, FfnInputs, Format, MoeFfn, PlanOptions, RawStream, View, Workspace};
use moefy::ffn::{Activation, DenseFfn, FfnTensors};
use moefy::{DType, TensorRef};
use rand::{RngExt, SeedableRng};

const D_MODEL: usize = 256;
const D_FF: usize = 1024;
const TOKENS: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The engine's weights, and inputs that this FFN saw on a calibration text.
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut random = |len| (0..len).map(|_| rng.random_range(-0.2f32..0.2)).collect::<Vec<_>>();
    let (w1, w2, seen) = (random(D_FF * D_MODEL), random(D_MODEL * D_FF), random(4096 * D_MODEL));
    let w1 = TensorRef::matrix(&w1, [D_FF, D_MODEL])?;
    let w2 = TensorRef::matrix(&w2, [D_MODEL, D_FF])?;
    let dense = DenseFfn::new(Activation::Gelu, FfnTensors::plain(w1, w2))?;
    let options = ConvertOptions { num_experts: 32, density: 0.2, ..ConvertOptions::default() };
    let (moe, _) = convert_ffn(&dense, &seen, &options)?;

    let device = Arc::new(Device::open(0)?);
    let plan = Arc::new(MoeFfn::new(&device, &moe)?).plan(TOKENS, PlanOptions::default())?;

    // The engine's memory and stream, here from cudarc; any address and `cudaStream_t` will do.
    let stream = device.cudarc_context().new_stream()?;
    let x = stream.clone_htod(&seen[..TOKENS * D_MODEL])?;
    let mut y = stream.alloc_zeros::<f32>(TOKENS * D_MODEL)?;
    let mut scratch = stream.alloc_zeros::<u8>(plan.workspace_bytes())?;

    let graph = {
        // Addresses are asked for before the recording and given back after it: cudarc may wait for events then, which
        // a recording must not hold.
        let (x, _read) = x.device_ptr(&stream);
        let (y, _written) = y.device_ptr_mut(&stream);
        let (address, _used) = scratch.device_ptr_mut(&stream);
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let matrix = |at| View::matrix(at, Format::Float(DType::F32), [TOKENS, D_MODEL]);
        let workspace = Workspace { address, bytes: plan.workspace_bytes() };
        // SAFETY: the memory has these sizes and lives until the graph is done.
        unsafe {
            let raw = RawStream(stream.cu_stream().cast());
            plan.run(raw, matrix(y), &FfnInputs::new(matrix(x)), workspace)?;
        }
        stream.end_capture(sys::CUgraphInstantiate_flags(0))?.ok_or("nothing to launch")?
    };
    graph.launch()?;
    let y = stream.clone_dtoh(&y)?;
    println!("{} on {TOKENS} tokens: y[0] = {:.4}", plan.path(TOKENS).name(), y[0]);
    Ok(())
}
