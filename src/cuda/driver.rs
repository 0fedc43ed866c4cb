//! All that is asked of the CUDA driver, through cudarc.

use std::ffi::{CStr, CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError, result, sys};

use super::Properties;
use crate::abi::moefy_tensor_map;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A stream of the driver: a `CUstream`, or a `cudaStream_t`, which is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(pub *mut c_void);

/// For `map_err`: an [`Error::Cuda`].
pub(super) fn cannot(doing: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let doing = doing.into();
    move |error| {
        let name =
            error.error_name().map_or("an error without a name".into(), CStr::to_string_lossy);
        Error::Cuda { doing, code: error.0 as i32, name: name.into_owned() }
    }
}

/// A stream of our own.
pub(super) struct Stream(pub(super) Arc<CudaStream>);

impl Stream {
    pub(super) fn new(context: &Context) -> Result<Self> {
        context.0.new_stream().map(Self).map_err(cannot("create a stream"))
    }

    pub(super) fn raw(&self) -> RawStream {
        RawStream(self.0.cu_stream().cast())
    }

    /// Until everything queued on it is done.
    pub(super) fn wait(&self) -> Result<()> {
        self.0.synchronize().map_err(cannot("wait for a stream"))
    }

    /// What `launch` puts on it, recorded instead of run; `None` when that is nothing.
    pub(super) fn capture(&self, launch: impl FnOnce() -> Result<()>) -> Result<Option<Graph>> {
        let doing = "capture a graph";
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.0.begin_capture(mode).map_err(cannot(doing))?;
        let launched = launch();
        // A capture ends also where a launch failed.
        let graph = self.0.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(cannot(doing));
        launched?;
        Ok(graph?.map(Graph))
    }
}

/// A second stream, for what can run beside what its caller launches meanwhile.
pub(super) struct Branch {
    side: sys::CUstream,
    forked: sys::CUevent,
    joined: sys::CUevent,
    /// One fork at a time: an event means what it was recorded for last.
    used: Mutex<()>,
    context: Context,
}

// SAFETY: handles that the driver lets every thread use.
unsafe impl Send for Branch {}
unsafe impl Sync for Branch {}

impl Branch {
    pub(super) fn new(context: &Context) -> Result<Self> {
        context.bind()?;
        let doing = "create a stream";
        // What it does is short, and something waits for it.
        let (_, greatest) = result::stream::get_priority_range().map_err(cannot(doing))?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self {
            side: result::stream::create_with_priority(
                result::stream::StreamKind::NonBlocking,
                greatest,
            )
            .map_err(cannot(doing))?,
            forked: event().map_err(cannot(doing))?,
            joined: event().map_err(cannot(doing))?,
            used: Mutex::new(()),
            context: context.clone(),
        })
    }

    /// Runs `beside` on the second stream after all that `stream` has, and `meanwhile` on `stream`; what comes on `stream` later
    /// waits for both. One after the other where the second stream is part of another capture.
    pub(super) fn run(
        &self,
        stream: RawStream,
        beside: impl FnOnce(RawStream) -> Result<()>,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _guard = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let main: sys::CUstream = stream.0.cast();
        let of_side = capture_of(self.side)?;
        if of_side != 0 && of_side != capture_of(main)? {
            beside(stream)?;
            return meanwhile();
        }
        // SAFETY: the handles exist as long as `self`.
        let follow = |event, from, to| unsafe {
            result::event::record(event, from)
                .and_then(|()| {
                    result::stream::wait_event(
                        to,
                        event,
                        sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
                    )
                })
                .map_err(cannot("make a stream wait for another"))
        };
        follow(self.forked, main, self.side)?;
        let launched = beside(RawStream(self.side.cast())).and_then(|()| meanwhile());
        // Also where a launch failed: a capture must not end with a stream astray.
        follow(self.joined, self.side, main)?;
        launched
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        // Failures leave nothing to do. What was launched still runs.
        let _ = self.context.bind();
        unsafe {
            let _ = result::stream::destroy(self.side);
            let _ = result::event::destroy(self.forked);
            let _ = result::event::destroy(self.joined);
        }
    }
}

/// Which capture a stream is part of; 0 for none.
fn capture_of(stream: sys::CUstream) -> Result<u64> {
    use sys::CUstreamCaptureStatus as Status;
    let (mut status, mut id) = (Status::CU_STREAM_CAPTURE_STATUS_NONE, 0);
    // SAFETY: both are written, or an error comes back.
    let (graph, nodes, edges, count) =
        (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    unsafe {
        sys::cuStreamGetCaptureInfo_v3(stream, &mut status, &mut id, graph, nodes, edges, count)
    }
    .result()
    .map_err(cannot("ask whether a stream is captured"))?;
    Ok(if status == Status::CU_STREAM_CAPTURE_STATUS_NONE { 0 } else { id })
}

/// Launches that were recorded, to be repeated on the stream that they were recorded from.
pub(super) struct Graph(CudaGraph);

impl Graph {
    pub(super) fn launch(&self) -> Result<()> {
        self.0.launch().map_err(cannot("launch a graph"))
    }
}

/// The primary context of a device, shared with everything else in the process.
#[derive(Clone)]
pub(super) struct Context(pub(super) Arc<CudaContext>);

impl Context {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        // cudarc panics where the library or one of its functions is missing.
        require_library(&["libcuda.so.1", "libcuda.so", "nvcuda.dll"])?;
        result::init().map_err(cannot("start the CUDA driver"))?;
        let count = CudaContext::device_count().map_err(cannot("count the GPUs"))?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            let problem = format!("device {ordinal} was asked for, and the driver shows {count}");
            return Err(Error::NoGpu { problem });
        }
        CudaContext::new(ordinal).map(Self).map_err(cannot(format!("open device {ordinal}")))
    }

    pub(super) fn properties(&self) -> Result<Properties> {
        use sys::CUdevice_attribute as Attribute;
        let ask = |attribute| {
            let value = self.0.attribute(attribute).map_err(cannot("ask what the device is"))?;
            Ok(value as usize)
        };
        let mut driver = 0;
        unsafe { sys::cuDriverGetVersion(&mut driver) }
            .result()
            .map_err(cannot("ask for the driver's version"))?;
        let (major, minor) =
            self.0.compute_capability().map_err(cannot("ask what the device is"))?;
        Ok(Properties {
            ordinal: self.0.ordinal(),
            name: self.0.name().map_err(cannot("ask for the device's name"))?,
            compute_capability: (major as u32, minor as u32),
            driver: (driver as u32 / 1000, driver as u32 % 1000 / 10),
            multiprocessors: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: ask(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            max_shared_bytes: ask(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
        })
    }

    /// Launches and copies act on the context that the thread is bound to.
    pub(super) fn bind(&self) -> Result<()> {
        self.0.bind_to_thread().map_err(cannot("bind the device to the thread"))
    }

    /// Loads a fat binary, for good: a captured graph may outlive whoever loaded it.
    pub(super) fn load_module(
        &self,
        name: &str,
        image: &'static [u8],
        overlaps: bool,
    ) -> Result<Module> {
        self.bind()?;
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let raw = module.map_err(cannot(format!("load the kernels of `{name}`")))?;
        Ok(Module { raw, overlaps })
    }

    /// The device that holds `address`, if any does.
    pub(super) fn device_of(&self, address: u64) -> Result<Option<i32>> {
        self.bind()?;
        let mut ordinal = -1i32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        let out = (&raw mut ordinal).cast();
        let found = unsafe { sys::cuPointerGetAttribute(out, attribute, address) }.result();
        Ok(found.ok().map(|()| ordinal))
    }

    /// Bytes that could be allocated.
    pub(super) fn free_bytes(&self) -> Result<usize> {
        self.bind()?;
        let (free, _) = result::mem_get_info().map_err(cannot("ask for the free memory"))?;
        Ok(free)
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        unsafe { result::malloc_sync(bytes) }
            .map_err(cannot(format!("allocate {bytes} bytes on the device")))
    }

    /// Copies to the host beside whatever other streams do: waits for the copy alone.
    ///
    /// # Safety
    /// `address` must lead to as many readable bytes.
    pub(super) unsafe fn copy_to_host_beside(&self, bytes: &mut [u8], address: u64) -> Result<()> {
        let doing = "copy from the device";
        let stream = self.0.new_stream().map_err(cannot(doing))?;
        unsafe { result::memcpy_dtoh_async(bytes, address, stream.cu_stream()) }
            .map_err(cannot(doing))?;
        stream.synchronize().map_err(cannot(doing))
    }

    /// # Safety
    /// `address` must come from [`Self::allocate`], and nothing may use it any more.
    pub(super) unsafe fn free(&self, address: u64) {
        // A failure leaves nothing to do: the context is gone or poisoned by an earlier error.
        let _ = self.bind().is_ok_and(|()| unsafe { result::free_sync(address) }.is_ok());
    }

    /// Waits until everything has run, on every stream.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        result::ctx::synchronize().map_err(cannot("wait for the device"))
    }

    /// # Safety
    /// `address` must lead to as many writable bytes.
    pub(super) unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.synchronize()?;
        unsafe { result::memset_d8_sync(address, 0, bytes) }
            .map_err(cannot("clear memory of the device"))?;
        // The driver may return before it has happened.
        self.synchronize()
    }

    /// # Safety
    /// `address` must lead to as many writable bytes.
    pub(super) unsafe fn copy_to_device(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.synchronize()?;
        unsafe { result::memcpy_htod_sync(address, bytes) }
            .map_err(cannot("copy to the device"))?;
        // The copy itself waits only until the bytes have left `bytes`.
        self.synchronize()
    }

    /// # Safety
    /// Both addresses must lead to as many bytes, to be read and to be written.
    pub(super) unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.synchronize()?;
        unsafe { result::memcpy_dtod_sync(to, from, bytes) }
            .map_err(cannot("copy on the device"))?;
        // The copy itself does not wait.
        self.synchronize()
    }

    /// # Safety
    /// `address` must lead to as many readable bytes.
    pub(super) unsafe fn copy_to_host(&self, bytes: &mut [u8], address: u64) -> Result<()> {
        self.synchronize()?;
        unsafe { result::memcpy_dtoh_sync(bytes, address) }.map_err(cannot("copy from the device"))
    }
}

/// Whether one of these is on the loader's path; the first is what the error names.
pub(super) fn require_library(names: &[&str]) -> Result<()> {
    if names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok()) {
        return Ok(());
    }
    let problem = format!(
        "{} cannot be loaded: install the NVIDIA driver and CUDA libraries, or add their folder to \
         LD_LIBRARY_PATH",
        names[0]
    );
    Err(Error::NoGpu { problem })
}

pub(super) struct Module {
    raw: sys::CUmodule,
    /// Whether its machine code knows programmatic dependent launch.
    overlaps: bool,
}

impl Module {
    /// Resolves an entry point and loads its code, which the driver otherwise does at the first
    /// launch. `shared_bytes` is the most dynamic shared memory that it is launched with.
    pub(super) fn function(&self, name: &'static str, shared_bytes: usize) -> Result<Function> {
        use sys::CUfunction_attribute as Attribute;
        let symbol = CString::new(name).expect("names of kernels hold no zero byte");
        let raw =
            unsafe { result::module::get_function(self.raw, symbol) }.map_err(preparing(name))?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let shared = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
        unsafe { result::function::set_function_attribute(raw, attribute, shared) }
            .map_err(preparing(name))?;
        Ok(Function { raw, name, overlaps: self.overlaps })
    }

    /// The same of an entry point for clusters of so many blocks, more than eight; `None` where the device has no room for one,
    /// as a part of a Hopper may have none.
    pub(super) fn function_of_large_clusters(
        &self,
        name: &'static str,
        shared_bytes: usize,
        cluster: u32,
        block: u32,
    ) -> Result<Option<Function>> {
        use sys::CUfunction_attribute as Attribute;
        let function = self.function(name, shared_bytes)?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        unsafe { result::function::set_function_attribute(function.raw, attribute, 1) }
            .map_err(preparing(name))?;
        let mut attributes = [cluster_attribute(cluster)];
        let config = sys::CUlaunchConfig {
            gridDimX: cluster,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: u32::try_from(shared_bytes).unwrap_or(u32::MAX),
            hStream: std::ptr::null_mut(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: 1,
        };
        let mut resident = 0;
        let asked =
            unsafe { sys::cuOccupancyMaxActiveClusters(&mut resident, function.raw, &config) };
        if asked == sys::CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE {
            return Ok(None);
        }
        asked.result().map_err(preparing(name))?;
        Ok((resident > 0).then_some(function))
    }

    /// The same with as much dynamic shared memory as the entry point leaves of what a block can have,
    /// and how much that is.
    pub(super) fn function_with_all_shared(
        &self,
        name: &'static str,
        max_shared_bytes: usize,
    ) -> Result<(Function, usize)> {
        use sys::CUfunction_attribute as Attribute;
        let function = self.function(name, 0)?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        let own = unsafe { result::function::get_function_attribute(function.raw, attribute) }
            .map_err(preparing(name))?;
        let left = max_shared_bytes.saturating_sub(usize::try_from(own).unwrap_or(0));
        Ok((self.function(name, left)?, left))
    }
}

fn preparing(name: &str) -> impl FnOnce(DriverError) -> Error {
    cannot(format!("prepare the kernel {name}"))
}

/// An entry point that is ready to launch.
#[derive(Clone, Copy)]
pub(super) struct Function {
    raw: sys::CUfunction,
    name: &'static str,
    overlaps: bool,
}

// SAFETY: a handle that the driver lets every thread use; what it names is never unloaded.
unsafe impl Send for Function {}
unsafe impl Sync for Function {}

impl Function {
    /// Where the machine code knows programmatic dependent launch, the kernel may begin before the one
    /// ahead of it in the stream has ended: each waits by itself.
    ///
    /// # Safety
    /// `params` must be the struct that the kernel takes, its addresses must lead to what the
    /// kernel expects until it has run, and the context must be bound to the thread.
    pub(super) unsafe fn launch<P: Pod>(
        &self,
        stream: RawStream,
        grid: [u32; 3],
        block: u32,
        shared_bytes: usize,
        params: &P,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(stream, grid, 1, block, shared_bytes, params) }
    }

    /// The same in clusters of so many blocks, side by side in x.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(super) unsafe fn launch_clusters<P: Pod>(
        &self,
        stream: RawStream,
        grid: [u32; 3],
        cluster: u32,
        block: u32,
        shared_bytes: usize,
        params: &P,
    ) -> Result<()> {
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let overlaps = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: self.overlaps.into(),
            },
        };
        let mut attributes = [overlaps, cluster_attribute(cluster)];
        // Kernels that know the size of their clusters are launched without it, and old devices know neither.
        let count = if cluster > 1 { 2 } else { u32::from(self.overlaps) };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: u32::try_from(shared_bytes).expect("checked by the wrapper"),
            hStream: stream.0.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count,
        };
        let extra = std::ptr::null_mut();
        // SAFETY: the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, self.raw, arguments.as_mut_ptr(), extra) }
            .result()
            .map_err(cannot(format!("launch {}", self.name)))
    }
}

fn cluster_attribute(blocks: u32) -> sys::CUlaunchAttribute {
    let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: size },
    }
}

/// What the copy engine takes of a matrix of 16 bits, whose rows are `stride` elements apart. A box is 64 columns of so many
/// rows.
pub(super) fn matrix_map(
    dtype: DType,
    address: u64,
    [rows, columns]: [u32; 2],
    stride: u64,
    box_rows: u32,
) -> Result<moefy_tensor_map> {
    let stride = stride * dtype.bytes() as u64;
    tensor_map(dtype, address, [columns.into(), rows.into()], &[stride], [64, box_rows])
}

/// What the copy engine takes of an array of 16 bits, the innermost dimension first: sizes, the bytes between elements of all
/// dimensions but the innermost, and the sizes of a box, whose rows are 128 bytes.
pub(super) fn tensor_map<const N: usize>(
    dtype: DType,
    address: u64,
    sizes: [u64; N],
    strides: &[u64],
    of_box: [u32; N],
) -> Result<moefy_tensor_map> {
    use sys::CUtensorMapDataType as Type;
    assert_eq!(strides.len() + 1, N);
    let element = match dtype {
        DType::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the sizes are those of the arrays; the address is only noted.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            N as u32,
            address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            of_box.as_ptr(),
            [1; N].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(cannot("describe a matrix to the copy engine"))?;
    Ok(moefy_tensor_map { opaque: map.opaque })
}
