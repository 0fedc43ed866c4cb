//! How a plan chooses algorithms for its dense products: it times what cuBLASLt proposes on tokens of its own, each product
//! alone, and the first one again beside a router where one will run beside it.

use super::cublaslt::Timer;
use super::dense::{Dense, DenseLayer, DenseRun};
use super::view::{Format, View};
use super::{Buffer, FfnInputs, FfnPlan};
use crate::Tensor;
use crate::dtype::DType;
use crate::error::Result;

impl FfnPlan {
    /// Times dense products for so many tokens, ascending.
    pub(super) fn tune(&self, layer: DenseLayer, sizes: &[usize]) -> Result<Dense> {
        let mut dense = self.tune_alone(layer, sizes)?;
        self.tune_beside(&mut dense)?;
        Ok(dense)
    }

    /// Times dense products for full batches alone.
    #[cfg(feature = "cuda")]
    pub(super) fn tune_full(&self, layer: DenseLayer) -> Result<Dense> {
        let chunk = self.places.chunk;
        let sizes = [self.max_tokens % chunk, chunk];
        self.tune(layer, if sizes[0] == 0 { &sizes[1..] } else { &sizes })
    }

    /// The same as if nothing ran beside them.
    fn tune_alone(&self, layer: DenseLayer, sizes: &[usize]) -> Result<Dense> {
        let device = self.ffn().device();
        let chunk = self.places.chunk;
        let d_model = self.ffn().neurons().d_model();
        let x = tokens_as_they_might_be(chunk * d_model, self.ffn().dtype());
        let x = Buffer::from_slice(device, x.as_bytes())?;
        let y = Buffer::new(device, x.bytes())?;
        let op_bytes = self.places.bytes - self.places.op as usize;
        let workspace = Buffer::zeroed(device, op_bytes)?;
        let run = DenseRun {
            x: x.address(),
            y: y.address(),
            mask: 0,
            gates: 0,
            num_tokens: chunk,
            workspace: workspace.address(),
        };
        device.context.bind()?;
        // SAFETY: the buffers have the sizes of a chunk, and live until everything has run.
        let dense = unsafe { Dense::new(device, layer, sizes, &run) };
        device.context.synchronize()?;
        dense
    }

    /// Where a router runs beside the first product, that product is the fastest by an algorithm that leaves it multiprocessors:
    /// times whole runs, several in a row on copies of the weights, as layers follow each other.
    fn tune_beside(&self, dense: &mut Dense) -> Result<()> {
        /// With fewer tokens the first product leaves enough anyway; tokens of a block of the router.
        const MIN_TOKENS: usize = 65;
        const ROUTER_TOKENS: usize = 16;
        /// In a row; one where there is no room for so many copies.
        const RUNS: usize = 8;
        /// Two thousand runs of some tens of microseconds take about 50 ms in all; under a sanitizer, or where others use the device,
        /// many times as long: then what is known by that time has to do.
        const PATIENCE_US: f64 = 150e3;
        if self.branch.is_none() {
            return Ok(());
        }
        let ffn = self.ffn();
        // A size is for all numbers of tokens from the next smaller one on.
        let all_sizes = dense.sizes();
        let smaller = [0].into_iter().chain(all_sizes.iter().copied());
        let sizes: Vec<_> = smaller
            .zip(&all_sizes)
            .filter(|&(smaller, &size)| {
                let by_library =
                    [smaller + 1, size].map(|tokens| ffn.under_masks(tokens).is_none());
                size >= MIN_TOKENS && ffn.routes_beside(size) && by_library.contains(&true)
            })
            .map(|(_, &size)| size)
            .collect();
        let Some(&most) = sizes.last() else { return Ok(()) };
        let (device, dtype) = (self.ffn().device(), self.ffn().dtype());
        let d_model = self.ffn().neurons().d_model();
        let x =
            Buffer::from_slice(device, tokens_as_they_might_be(most * d_model, dtype).as_bytes())?;
        let y = Buffer::new(device, x.bytes())?;
        let workspace = Buffer::zeroed(device, self.places.bytes)?;
        device.context.bind()?;
        let timer = Timer::new(device)?;
        let all = device.properties().multiprocessors as u32;
        let (weights, bytes) = dense.first_weights();
        let mut copies = timer.copies(weights, bytes)?;
        copies.truncate(RUNS);
        if copies.is_empty() {
            copies.push(weights);
        }
        for size in sizes {
            let of_router = (size.div_ceil(ROUTER_TOKENS) as u32).min(all / 2);
            let mut candidates = dense.first_candidates(size, &[0, all - of_router])?;
            let view = |buffer: &Buffer| {
                View::matrix(buffer.address(), Format::Float(dtype), [size, d_model])
            };
            let inputs = FfnInputs::new(view(&x));
            let best = timer.fastest(candidates.len(), PATIENCE_US, |index, stream| {
                copies.iter().try_for_each(|&weights| {
                    let begin = |run: &DenseRun| {
                        // SAFETY: the buffers have room for the most of these tokens, and live until everything has run.
                        unsafe { dense.begin_by(&candidates[index], weights, stream, run) }
                    };
                    let (y, base) = (view(&y), workspace.address());
                    // SAFETY: as above.
                    unsafe { self.run_masked_by(dense, begin, stream, y, &inputs, base) }
                })
            })?;
            if let Some(best) = best {
                dense.set_first(size, candidates.swap_remove(best));
            }
        }
        device.context.synchronize()
    }
}

/// Products of zeros run faster.
fn tokens_as_they_might_be(len: usize, dtype: DType) -> Tensor {
    let values: Vec<f32> = (0..len)
        .map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect();
    Tensor::vector(values).to_dtype(dtype)
}
