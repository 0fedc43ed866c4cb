//! All that is asked of cuBLASLt, through cudarc: products of weights with tokens, by an algorithm
//! that was timed.

use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;

use super::clock::Clock;
use super::driver::{Graph, RawStream, Stream, cannot};
pub(super) use super::product::{Epilogue, Operands, ProductShape};
use super::turns::{self, fastest_by_turns};
use super::{Buffer, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What cuBLASLt may use while a product runs.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are timed.
const CANDIDATES: usize = 24;
/// Runs of one timing, a graph: of a short product many, each on a copy of the weights that is not near, because an event's half
/// microsecond is much of one.
const SHORT_TOKENS: usize = 1024;
const SHORT_RUNS: usize = 16;
/// Of others fewer, and where weights are too large to be copied so many, from so many tokens on: what a run reads again is in the
/// second-level cache then, as in a layer.
const OTHER_RUNS: usize = 8;
const MANY_TOKENS: usize = 256;
const MANY_RUNS: usize = 4;

fn fails(doing: &'static str) -> impl FnOnce(result::CublasError) -> Error {
    move |error| Error::Cuda {
        doing: doing.into(),
        code: error.0 as i32,
        name: format!("{:?}", error.0),
    }
}

impl ProductShape {
    /// Microseconds: several times what all timings take. Under a sanitizer each run takes a hundred times as long: then what is
    /// known by that time has to do.
    fn patience_us(&self, tokens: usize, runs: usize) -> f64 {
        let weights = (self.rows * self.depth) as f64;
        let of_run =
            10.0 + weights * self.dtype.bytes() as f64 / 1e6 + 2.0 * weights * tokens as f64 / 1e8;
        3.0 * of_run * (runs * turns::launches(CANDIDATES)) as f64
    }
}

/// The library, ready.
pub(super) struct CublasLt(sys::cublasLtHandle_t);

// SAFETY: every thread may use a handle of cuBLASLt.
unsafe impl Send for CublasLt {}
unsafe impl Sync for CublasLt {}

impl CublasLt {
    pub(super) fn open() -> Result<Self> {
        // cudarc panics where the library is missing.
        if !unsafe { sys::is_culib_present() } {
            let problem = "libcublasLt cannot be loaded: install CUDA's cuBLAS, or add its folder \
                           to LD_LIBRARY_PATH, or choose a path other than dense";
            return Err(Error::NoGpu { problem: problem.into() });
        }
        result::create_handle().map(Self).map_err(fails("start cuBLASLt"))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; a failure leaves nothing to do.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// A matrix as cuBLASLt sees it.
struct MatrixLayout(sys::cublasLtMatrixLayout_t);

impl MatrixLayout {
    /// `across` columns of `down` elements, `stride` apart.
    fn new(
        dtype: DType,
        down: usize,
        across: usize,
        stride: usize,
    ) -> Result<Self, result::CublasError> {
        let dtype = match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        result::create_matrix_layout(dtype, down as u64, across as u64, stride as i64).map(Self)
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: it is ours; a failure leaves nothing to do.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What stays the same for all numbers of tokens.
struct Description {
    product: sys::cublasLtMatmulDesc_t,
    weights: MatrixLayout,
    shape: ProductShape,
}

impl Description {
    /// `bias` is an address of `rows` elements where the epilogue adds one.
    fn new(shape: &ProductShape, bias: u64) -> Result<Self, result::CublasError> {
        use sys::cublasLtEpilogue_t as Code;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        // cuBLASLt is column-major: what it sees is outᵀ = weights · inputᵀ.
        let (down, across) = match shape.depth_major {
            true => (shape.rows, shape.depth),
            false => (shape.depth, shape.rows),
        };
        let weights = MatrixLayout::new(shape.dtype, down, across, down)?;
        let product = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        let description = Self { product, weights, shape: *shape };
        let (code, has_bias) = match shape.epilogue {
            Epilogue::Nothing => (Code::CUBLASLT_EPILOGUE_DEFAULT, false),
            Epilogue::Bias => (Code::CUBLASLT_EPILOGUE_BIAS, true),
            Epilogue::Relu => (Code::CUBLASLT_EPILOGUE_RELU, false),
            Epilogue::ReluBias => (Code::CUBLASLT_EPILOGUE_RELU_BIAS, true),
            Epilogue::GeluTanh => (Code::CUBLASLT_EPILOGUE_GELU, false),
            Epilogue::GeluTanhBias => (Code::CUBLASLT_EPILOGUE_GELU_BIAS, true),
        };
        description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &code)?;
        if has_bias {
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        if shape.multiprocessors > 0 {
            let count = shape.multiprocessors as i32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, &count)?;
        }
        if !shape.depth_major {
            // CUBLAS_OP_T
            let transposed = 1i32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        }
        Ok(description)
    }

    /// Input and output of so many tokens.
    fn layouts(&self, tokens: usize) -> Result<[MatrixLayout; 2], result::CublasError> {
        let ProductShape { dtype, rows, out_stride, depth, .. } = self.shape;
        Ok([
            MatrixLayout::new(dtype, depth, tokens, depth)?,
            MatrixLayout::new(dtype, rows, tokens, out_stride)?,
        ])
    }

    fn set<V>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &V,
    ) -> Result<(), result::CublasError> {
        let value = ptr::from_ref(value);
        // SAFETY: the attribute is of the value's type.
        unsafe {
            result::set_matmul_desc_attribute(self.product, attribute, value.cast(), size_of::<V>())
        }
    }

    fn candidates(
        &self,
        library: &CublasLt,
        tokens: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, result::CublasError> {
        let [input, out] = self.layouts(tokens)?;
        let preference = result::create_matmul_pref()?;
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: all-zero is a value of this C struct, and the library writes `found` of them.
        unsafe {
            let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
                std::mem::zeroed();
            let mut found = 0;
            let status = result::set_matmul_pref_attribute(
                preference,
                attribute,
                ptr::from_ref(&bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    library.0,
                    self.product,
                    self.weights.0,
                    input.0,
                    out.0,
                    out.0,
                    preference,
                    CANDIDATES as i32,
                    results.as_mut_ptr(),
                    &mut found,
                )
                .result()
            });
            let _ = result::destroy_matmul_pref(preference);
            status?;
            let usable = results[..found as usize].iter().filter(|r| r.state.result().is_ok());
            Ok(usable.map(|r| r.algo).collect())
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it is ours; a failure leaves nothing to do.
        let _ = unsafe { result::destroy_matmul_desc(self.product) };
    }
}

/// A product with its algorithm.
pub(super) struct Product {
    description: Description,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: description and algorithm are only read after construction.
unsafe impl Send for Product {}
unsafe impl Sync for Product {}

impl Product {
    /// Times what cuBLASLt proposes and keeps the fastest. That also loads its kernels, which a stream
    /// that is captured must not do. Waits for the device.
    ///
    /// # Safety
    /// The operands and the bias must be memory of the shape's sizes; `out` is overwritten.
    pub(super) unsafe fn tune(
        library: &CublasLt,
        timer: &Timer,
        shape: &ProductShape,
        bias: u64,
        operands: &Operands,
    ) -> Result<Self> {
        let mut candidates = Self::candidates(library, shape, bias, operands.tokens)?;
        let weights_bytes = shape.rows * shape.depth * shape.dtype.bytes();
        let copies = timer.copies(operands.weights, weights_bytes)?;
        let runs = match (copies.is_empty(), operands.tokens) {
            (false, ..SHORT_TOKENS) => copies.len(),
            (false, _) => copies.len().min(OTHER_RUNS),
            (true, ..MANY_TOKENS) => 1,
            (true, _) => MANY_RUNS,
        };
        let mut weights = copies.iter().copied().cycle();
        let patience_us = shape.patience_us(operands.tokens, runs);
        let best = timer.fastest(candidates.len(), patience_us, |index, stream| {
            (0..runs).try_for_each(|_| {
                let weights = weights.next().unwrap_or(operands.weights);
                // SAFETY: the caller's promise.
                unsafe {
                    candidates[index].run(library, stream, &Operands { weights, ..*operands })
                }
            })
        })?;
        let best = best.unwrap_or(0);
        Ok(candidates.swap_remove(best))
    }

    /// What cuBLASLt proposes, at least one: the likely fastest first.
    pub(super) fn candidates(
        library: &CublasLt,
        shape: &ProductShape,
        bias: u64,
        tokens: usize,
    ) -> Result<Vec<Self>> {
        let doing = "choose an algorithm for a dense product";
        let describe = || Description::new(shape, bias).map_err(fails(doing));
        let algorithms = describe()?.candidates(library, tokens).map_err(fails(doing))?;
        if algorithms.is_empty() {
            let error = result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
            return Err(fails(doing)(error));
        }
        let product = |algorithm| Ok(Self { description: describe()?, algorithm });
        algorithms.into_iter().map(product).collect()
    }

    /// The same algorithm with another bias.
    pub(super) fn with_bias(&self, bias: u64) -> Result<Self> {
        let description = Description::new(&self.description.shape, bias)
            .map_err(fails("describe a dense product"))?;
        Ok(Self { description, algorithm: self.algorithm })
    }

    /// Fails without a launch where the algorithm cannot do this number of tokens.
    ///
    /// # Safety
    /// As for [`Self::tune`].
    pub(super) unsafe fn run(
        &self,
        library: &CublasLt,
        stream: RawStream,
        operands: &Operands,
    ) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let d = &self.description;
        let doing = "run a dense product";
        let [input, out] = d.layouts(operands.tokens).map_err(fails(doing))?;
        let address = |at: u64| at as *const c_void;
        unsafe {
            result::matmul(
                library.0,
                d.product,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                address(operands.weights),
                d.weights.0,
                address(operands.input),
                input.0,
                address(operands.out),
                out.0,
                address(operands.out).cast_mut(),
                out.0,
                &self.algorithm,
                address(operands.workspace).cast_mut(),
                WORKSPACE_BYTES,
                stream.0.cast(),
            )
        }
        .map_err(fails(doing))
    }
}

/// Times graphs on a stream of its own, with weights from memory: what was in the second-level cache has been overwritten. That
/// also keeps the device busy while the host launches, so that the way there is not counted.
pub(super) struct Timer {
    stream: Stream,
    overwritten: Buffer,
    copies: Buffer,
}

impl Timer {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let bytes = 2 * device.properties().l2_bytes;
        Ok(Self {
            stream: Stream::new(&device.context)?,
            overwritten: Buffer::new(device, bytes)?,
            copies: Buffer::new(device, bytes)?,
        })
    }

    /// Copies of weights for the runs of a timing; none where there is no room for many.
    pub(super) fn copies(&self, weights: u64, bytes: usize) -> Result<Vec<u64>> {
        let room = bytes.next_multiple_of(256).max(256);
        let count = (self.copies.bytes() / room).min(SHORT_RUNS);
        if count < SHORT_RUNS / 2 {
            return Ok(Vec::new());
        }
        let copies = (0..count).map(|i| self.copies.address() + (i * room) as u64);
        let copy = |to| {
            // SAFETY: the caller's weights, and a place of our buffer.
            unsafe { driver::memcpy_dtod_async(to, weights, bytes, self.stream.0.cu_stream()) }
                .map_err(cannot("copy weights"))?;
            Ok(to)
        };
        copies.map(copy).collect()
    }

    /// Which of so many launches takes least time; those that fail are left out, and so are those that patience does not reach,
    /// but for the first that works. Each runs once before it is timed, which loads its kernels: a capture must not do that.
    /// Waits for the device.
    pub(super) fn fastest(
        &self,
        count: usize,
        mut patience_us: f64,
        mut launch: impl FnMut(usize, RawStream) -> Result<()>,
    ) -> Result<Option<usize>> {
        let mut captured = Vec::new();
        for index in 0..count {
            if patience_us < 0.0 && !captured.is_empty() {
                break;
            }
            if launch(index, self.stream.raw()).is_ok()
                && let Ok(Some(graph)) = self.stream.capture(|| launch(index, self.stream.raw()))
            {
                patience_us -= self.time_round(&[&graph])?[0];
                captured.push((index, graph));
            }
        }
        let fastest = fastest_by_turns(captured.len(), |order| {
            if patience_us < 0.0 {
                return Ok(None);
            }
            let graphs: Vec<_> = order.iter().map(|&i| &captured[i].1).collect();
            let times = self.time_round(&graphs)?;
            patience_us -= times.iter().sum::<f64>();
            Ok(Some(times))
        })?;
        // What could not be captured may still run.
        self.stream.wait()?;
        Ok(fastest.map(|i| captured[i].0))
    }

    /// Microseconds of each.
    fn time_round(&self, graphs: &[&Graph]) -> Result<Vec<f64>> {
        let (stream, overwritten) = (&self.stream.0, &self.overwritten);
        let clock = Clock::new(stream, 2 * graphs.len())?;
        for (i, graph) in graphs.iter().enumerate() {
            let (at, bytes) = (overwritten.address(), overwritten.bytes());
            // SAFETY: stream and buffer are ours.
            unsafe { driver::memset_d8_async(at, 0, bytes, stream.cu_stream()) }
                .map_err(cannot("empty the cache"))?;
            clock.stamp(2 * i)?;
            graph.launch()?;
            clock.stamp(2 * i + 1)?;
        }
        (0..graphs.len()).map(|i| clock.between(2 * i, 2 * i + 1)).collect()
    }
}
