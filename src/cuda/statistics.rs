//! What selection did, counted on the device while a plan runs.

use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::{Buffer, Device};
use crate::abi::moefy_statistics_params;
use crate::error::Result;

pub(super) struct Kernels {
    statistics: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self { statistics: modules.function("statistics", "moefy_statistics", 0)? })
    }
}

/// What selection did, since the plan was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingCounts {
    /// Entry k: tokens that ran k experts, \[E + 1\].
    pub k_histogram: Vec<u64>,
    /// Tokens that ran each expert, \[E\].
    pub expert_counts: Vec<u64>,
}

impl RoutingCounts {
    /// Takes in what another plan of the same layer counted.
    pub(super) fn add(&mut self, other: &Self) {
        let add = |sums: &mut Vec<u64>, counts: &[u64]| {
            sums.resize(sums.len().max(counts.len()), 0);
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        };
        add(&mut self.k_histogram, &other.k_histogram);
        add(&mut self.expert_counts, &other.expert_counts);
    }
}

/// The counters of one plan.
pub(super) struct Counters {
    num_experts: usize,
    words: Buffer,
}

impl Counters {
    pub(super) fn new(device: &Device, num_experts: usize) -> Result<Self> {
        let words = Buffer::from_slice(device, &vec![0u64; 2 * num_experts + 1])?;
        Ok(Self { num_experts, words })
    }

    /// # Safety
    /// The addresses must lead to masks of `num_tokens` of at least 1, and to one word or be null;
    /// the context must be bound.
    pub(super) unsafe fn add(
        &self,
        device: &Device,
        stream: RawStream,
        mask: u64,
        num_tokens: usize,
        num_valid_tokens: u64,
    ) -> Result<()> {
        let params = moefy_statistics_params {
            mask,
            num_valid_tokens,
            k_histogram: self.words.address(),
            expert_counts: self.words.address() + 8 * (self.num_experts as u64 + 1),
            num_tokens: num_tokens as u32,
            num_experts: self.num_experts as u32,
        };
        let grid = [params.num_tokens.div_ceil(8), 1, 1];
        // SAFETY: the caller's promise.
        unsafe { device.statistics.statistics.launch(stream, grid, 256, 0, &params) }
    }

    /// A reading that no stream waits for; what runs at the same time may be counted in part.
    pub(super) fn read(&self, device: &Device) -> Result<RoutingCounts> {
        let mut words = vec![0u64; 2 * self.num_experts + 1];
        let bytes = bytemuck::cast_slice_mut(&mut words);
        // SAFETY: the buffer has this size.
        unsafe { device.context.copy_to_host_beside(bytes, self.words.address())? };
        let expert_counts = words.split_off(self.num_experts + 1);
        Ok(RoutingCounts { k_histogram: words, expert_counts })
    }
}
