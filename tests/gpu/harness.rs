//! What every test of a kernel needs: outputs that show what was not written and what was written
//! beside them, launches that are repeated in a graph, and random inputs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytemuck::Pod;
use moefy::cuda::interop::cudarc::driver::{CudaGraph, CudaStream, result, sys};
use moefy::cuda::{Buffer, Device, RawStream, View};
use moefy::ffn::ExpertMask;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// Bytes of a NaN, in every format.
const POISON: u8 = 0xff;

pub struct Gpu {
    pub device: Arc<Device>,
    pub stream: Arc<CudaStream>,
    seed: u64,
}

impl Gpu {
    pub fn open() -> moefy::Result<Self> {
        let device = Arc::new(Device::open(0)?);
        let stream = device.cudarc_context().new_stream().expect("a stream");
        let now = std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
        let seed =
            std::env::var("MOEFY_TEST_SEED").map_or(now, |seed| seed.parse().expect("a seed"));
        Ok(Self { device, stream, seed })
    }

    pub fn raw_stream(&self) -> RawStream {
        self.stream.as_ref().into()
    }

    pub fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.seed)
    }

    pub fn input<T: Pod>(&self, data: &[T]) -> Buffer {
        Buffer::from_slice(&self.device, data).expect("memory")
    }

    /// Runs `launch` eagerly and then from a captured graph, on poisoned outputs, and checks that
    /// both wrote the same bits. Eagerly alone where shapes should stay small: a sanitizer looks at one kernel at a time,
    /// and a graph has the same ones.
    pub fn run(
        &self,
        outputs: &mut [&mut Output],
        launch: impl Fn(RawStream) -> moefy::Result<()>,
    ) {
        outputs.iter_mut().for_each(|output| output.poison());
        launch(self.raw_stream()).expect("arguments that fit");
        if is_small() {
            return;
        }
        let eager: Vec<Vec<u8>> = outputs.iter().map(|output| output.read()).collect();
        outputs.iter_mut().for_each(|output| output.poison());
        self.capture(launch).expect("a kernel").launch().expect("a launch");
        for (index, (output, eager)) in outputs.iter().zip(eager).enumerate() {
            assert!(output.read::<u8>() == eager, "output {index} differs from a graph");
        }
    }

    /// Prepares cases on all cores, and takes each to the GPU when it is its turn: what takes long is the
    /// reference.
    pub fn check_all<C: Sync, P>(
        &self,
        cases: &[C],
        prepare: impl Fn(&C, &mut ChaCha8Rng) -> P + Sync,
        check: impl Fn(&Self, P) + Sync,
    ) {
        let (next, turn) = (AtomicUsize::new(0), Mutex::new(()));
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(case) = cases.get(index) else { return };
                let mut rng = self.rng();
                rng.set_stream(index as u64 + 1);
                let prepared = prepare(case, &mut rng);
                // Nobody goes on after a failure.
                let Ok(_turn) = turn.lock() else { return };
                check(self, prepared);
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
            for thread in threads {
                thread.join().unwrap_or_else(|failure| std::panic::resume_unwind(failure));
            }
        });
    }

    /// What `launch` puts on the stream.
    pub fn capture(&self, launch: impl Fn(RawStream) -> moefy::Result<()>) -> Option<CudaGraph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).expect("capture");
        launch(self.raw_stream()).expect("arguments that fit");
        let flags = sys::CUgraphInstantiate_flags(0);
        self.stream.end_capture(flags).expect("a graph")
    }
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let device = self.device.properties();
        let build = moefy::cuda::build_info().expect("an open device has kernels");
        let line = serde_json::json!({
            "type": "gpu",
            "device": device.name,
            "cuda_of_driver": format!("{}.{}", device.driver.0, device.driver.1),
            "toolkit": build.toolkit,
            "digest": build.source_digest,
            "seed": self.seed,
        });
        write!(f, "{line}")
    }
}

/// Memory for an output between two guard bands.
pub struct Output {
    buffer: Buffer,
    bytes: usize,
}

impl Output {
    pub fn new(gpu: &Gpu, bytes: usize) -> Self {
        let buffer = Buffer::new(&gpu.device, bytes + 2 * GUARD).expect("memory");
        let mut output = Self { buffer, bytes };
        output.poison();
        output
    }

    /// For words or f32.
    pub fn words(gpu: &Gpu, len: usize) -> Self {
        Self::new(gpu, len * 4)
    }

    pub fn address(&self) -> u64 {
        self.buffer.address() + GUARD as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole as a vector of words.
    pub fn view(&self) -> View {
        View::words(self.address(), self.bytes / 4)
    }

    pub fn poison(&mut self) {
        self.write(&vec![POISON; self.bytes]);
    }

    pub fn write<T: Pod>(&mut self, data: &[T]) {
        let guard = [GUARD_BYTE; GUARD];
        let all = [&guard, bytemuck::cast_slice(data), &guard].concat();
        self.buffer.write(&all).expect("a copy");
    }

    /// # Panics
    /// When a guard band was written to.
    pub fn read<T: Pod>(&self) -> Vec<T> {
        let all: Vec<u8> = self.buffer.read().expect("a copy");
        let (front, rest) = all.split_at(GUARD);
        let (data, back) = rest.split_at(self.bytes);
        let intact = front.iter().chain(back).all(|&byte| byte == GUARD_BYTE);
        assert!(intact, "something was written beside an output");
        let mut elements = vec![T::zeroed(); self.bytes / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(data);
        elements
    }

    /// For a workspace, whose content means nothing.
    ///
    /// # Panics
    /// When a guard band was written to.
    pub fn check_guards(&self) {
        result::ctx::synchronize().expect("no failure");
        for offset in [0, GUARD + self.bytes] {
            let mut band = [0; GUARD];
            let address = self.buffer.address() + offset as u64;
            // SAFETY: the buffer has a band at either end.
            unsafe { result::memcpy_dtoh_sync(&mut band, address) }.expect("a copy");
            assert!(band == [GUARD_BYTE; GUARD], "something was written beside a workspace");
        }
    }
}

/// Whether shapes should stay small.
pub fn is_small() -> bool {
    std::env::var_os("MOEFY_TEST_SMALL").is_some_and(|value| value == "1")
}

/// The values up to `limit` when shapes should stay small, else all.
pub fn sizes(all: &[usize], limit: usize) -> Vec<usize> {
    all.iter().copied().filter(|&size| !is_small() || size <= limit).collect()
}

/// One case in so many when shapes should stay small, else all. Where that is coprime to the turns of the loops that made
/// them, every value of each is still among them.
pub fn thin<C>(cases: Vec<C>, one_in: usize) -> Vec<C> {
    cases.into_iter().step_by(if is_small() { one_in } else { 1 }).collect()
}

pub fn uniform(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Random masks of which only so many tokens are valid.
pub fn check_padding(gpu: &Gpu, check: impl Fn(&Gpu, &ExpertMask, usize)) {
    let rng = &mut gpu.rng();
    for [num_tokens, num_experts] in [[40, 12], [989, 448]] {
        let mask = random_mask(rng, num_tokens, num_experts, 0.3);
        for valid in [0, 1, 32, 33, num_tokens - 1] {
            check(gpu, &mask, valid);
        }
    }
}

/// Every bit set with this probability.
pub fn random_mask(
    rng: &mut ChaCha8Rng,
    tokens: usize,
    experts: usize,
    density: f64,
) -> ExpertMask {
    let mut mask = ExpertMask::none(tokens, experts);
    for token in 0..tokens {
        for expert in 0..experts {
            if rng.random_bool(density) {
                mask.insert(token, expert);
            }
        }
    }
    mask
}

/// ‖actual − expected‖ / ‖expected‖; infinite where one of them is not finite.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let square = |v: f64| v * v;
    let difference: f64 = actual.iter().zip(expected).map(|(a, e)| square(f64::from(*a) - e)).sum();
    let size: f64 = expected.iter().copied().map(square).sum();
    let error = (difference / size.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_finite() { error } else { f64::INFINITY }
}
