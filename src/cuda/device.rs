//! One GPU, its kernels loaded.

use super::driver::Context;
use super::kernels::{Modules, build_info};
#[cfg(feature = "cuda")]
use super::read_bandwidth;
use super::{
    Tuning, abi_probe, add_shares, body, dense, experts, ffn_few, ffn_few_cluster, ffn_few_whole,
    gates, padding, route_index, router_block, router_few, router_many, router_select, select,
    statistics, token_tiles,
};
use crate::error::{Error, Result};

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
    pub(super) ffn_few_cluster: Option<ffn_few_cluster::Kernels>,
    pub(super) ffn_few_whole: Option<ffn_few_whole::Kernels>,
    pub(super) add_shares: add_shares::Kernels,
    pub(super) gates: gates::Kernels,
    pub(super) padding: padding::Kernels,
    #[cfg(feature = "cuda")]
    pub(super) read_bandwidth: read_bandwidth::Kernels,
    pub(super) route_index: route_index::Kernels,
    pub(super) router_few: Option<router_few::Kernels>,
    pub(super) router_block: Option<router_block::Kernels>,
    pub(super) router_many: Option<router_many::Kernels>,
    pub(super) router_select: router_select::Kernels,
    pub(super) select: select::Kernels,
    pub(super) statistics: statistics::Kernels,
    pub(super) token_tiles: token_tiles::Kernels,
    properties: Properties,
    tuning: Option<Tuning>,
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
            ffn_few_cluster: ffn_few_cluster::Kernels::load(&modules, properties.max_shared_bytes)?,
            ffn_few_whole: ffn_few_whole::Kernels::load(&modules, properties.max_shared_bytes)?,
            add_shares: add_shares::Kernels::load(&modules)?,
            gates: gates::Kernels::load(&modules)?,
            padding: padding::Kernels::load(&modules)?,
            #[cfg(feature = "cuda")]
            read_bandwidth: read_bandwidth::Kernels::load(&modules)?,
            route_index: route_index::Kernels::load(&modules)?,
            router_few: router_few::Kernels::load(&modules)?,
            router_block: router_block::Kernels::load(&modules, &properties)?,
            router_many: router_many::Kernels::load(&modules, &properties)?,
            router_select: router_select::Kernels::load(&modules, properties.max_shared_bytes)?,
            select: select::Kernels::load(&modules)?,
            statistics: statistics::Kernels::load(&modules)?,
            token_tiles: token_tiles::Kernels::load(&modules)?,
            context,
            properties,
            tuning: None,
        })
    }

    /// What the device says of itself.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Makes plans choose their paths by what was measured, where enough was. It comes before the device is
    /// shared, so that all plans choose alike.
    ///
    /// # Errors
    /// When the times are of another device or of other kernels, or no measurement gives them.
    pub fn set_tuning(&mut self, tuning: Tuning) -> Result<()> {
        let refused =
            |expected: String, got: String| Error::argument("device", "tuning", expected, got);
        let name = &self.properties.name;
        if tuning.device != *name {
            let got = format!("one of `{}`: run `moefy tune` on this one", tuning.device);
            return Err(refused(format!("of this device, `{name}`"), got));
        }
        if tuning.kernels != build_info()?.source_digest {
            let got = "one of other kernels: run `moefy tune` again".into();
            return Err(refused("of the kernels of this build".into(), got));
        }
        tuning.check().map_err(|problem| refused("of measured times".into(), problem))?;
        self.tuning = Some(tuning);
        Ok(())
    }

    /// What plans choose by, if anything was measured.
    pub fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_ref()
    }
}
