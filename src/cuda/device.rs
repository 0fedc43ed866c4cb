//! One GPU, its kernels loaded.

use super::driver::Context;
use super::kernels::{Modules, build_info};
#[cfg(feature = "cuda")]
use super::read_bandwidth;
use super::{
    abi_probe, add_shares, body, dense, experts, ffn_few, gates, padding, route_index, router_many,
    router_select, select, statistics,
};
use crate::error::Result;

/// What a device says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// Its number, from 0.
    pub ordinal: usize,
    /// "NVIDIA H100 80GB HBM3"
    pub name: String,
    /// (9, 0) for Hopper.
    pub compute_capability: (u32, u32),
    /// Newest version of CUDA that the driver supports, as (major, minor).
    pub driver: (u32, u32),
    /// Number of streaming multiprocessors.
    pub multiprocessors: usize,
    /// Size of the second-level cache.
    pub l2_bytes: usize,
    /// The most shared memory that a block can have.
    pub max_shared_bytes: usize,
}

/// One GPU with every kernel loaded and ready, so that no launch loads anything. It works in the
/// device's primary context. Loaded code stays loaded until the process ends, because a captured
/// graph may still use it; so open a device once and share it.
pub struct Device {
    pub(super) context: Context,
    pub(super) abi_probe: abi_probe::Kernels,
    pub(super) body: body::Kernels,
    pub(super) dense: dense::Kernels,
    pub(super) experts: experts::Kernels,
    pub(super) ffn_few: Option<ffn_few::Kernels>,
    pub(super) add_shares: add_shares::Kernels,
    pub(super) gates: gates::Kernels,
    pub(super) padding: padding::Kernels,
    #[cfg(feature = "cuda")]
    pub(super) read_bandwidth: read_bandwidth::Kernels,
    pub(super) route_index: route_index::Kernels,
    pub(super) router_many: Option<router_many::Kernels>,
    pub(super) router_select: router_select::Kernels,
    pub(super) select: select::Kernels,
    pub(super) statistics: statistics::Kernels,
    properties: Properties,
}

impl Device {
    /// Opens the GPU with this number.
    ///
    /// # Errors
    /// [`Error::NoGpu`](crate::Error::NoGpu) when there is no driver, no such device, one older than
    /// compute capability 8.0, a driver older than the kernels, or no kernels in this build.
    pub fn open(ordinal: usize) -> Result<Self> {
        build_info()?;
        let context = Context::open(ordinal)?;
        let properties = context.properties()?;
        let modules = Modules::load(&context, &properties)?;
        Ok(Self {
            abi_probe: abi_probe::Kernels::load(&modules)?,
            body: body::Kernels::load(&modules)?,
            dense: dense::Kernels::load(&modules)?,
            experts: experts::Kernels::load(&modules, properties.max_shared_bytes)?,
            ffn_few: ffn_few::Kernels::load(&modules, properties.max_shared_bytes)?,
            add_shares: add_shares::Kernels::load(&modules)?,
            gates: gates::Kernels::load(&modules)?,
            padding: padding::Kernels::load(&modules)?,
            #[cfg(feature = "cuda")]
            read_bandwidth: read_bandwidth::Kernels::load(&modules)?,
            route_index: route_index::Kernels::load(&modules)?,
            router_many: router_many::Kernels::load(&modules, &properties)?,
            router_select: router_select::Kernels::load(&modules, properties.max_shared_bytes)?,
            select: select::Kernels::load(&modules)?,
            statistics: statistics::Kernels::load(&modules)?,
            context,
            properties,
        })
    }

    /// What the device says of itself.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }
}
