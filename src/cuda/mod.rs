//! NVIDIA GPUs, compute capability 8.0 and newer.
//!
//! Every operation takes a stream, device addresses and a workspace that the caller owns. Between
//! entry and return it allocates nothing, waits for nothing, reads nothing back and loads nothing,
//! so that it can be captured in a CUDA graph. Sizes that depend on the data stay on the device.
//!
//! The addresses are plain numbers and the stream is the driver's own handle, so that an engine may
//! hold them by another version of cudarc or by none. [`interop`] offers the same operations on
//! cudarc's types.
//!
//! Everything here exists without the feature `cuda` too; [`Device::open`] then returns an error.

#[cfg(feature = "cuda")]
mod driver;
#[cfg(not(feature = "cuda"))]
#[path = "no_driver.rs"]
mod driver;

mod abi_probe;
mod add_shares;
#[cfg(feature = "cuda")]
pub mod bench;
mod body;
mod buffer;
#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
mod clock;
#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg(not(feature = "cuda"))]
#[path = "no_cublaslt.rs"]
mod cublaslt;
mod dense;
mod device;
mod encoder_graphs;
mod experts;
mod experts_few;
mod experts_many;
mod experts_many_kernels;
mod experts_many_launch;
mod experts_many_ways;
mod experts_masked;
mod experts_one;
mod experts_sums;
mod experts_tiled;
mod ffn_few;
mod ffn_few_cluster;
mod ffn_few_whole;
mod gates;
#[cfg(feature = "cuda")]
pub mod interop;
mod kernels;
mod moe_ffn;
mod neurons;
mod padding;
mod path;
mod places;
mod plan;
mod plan_dense;
mod plan_tuning;
mod product;
#[cfg(feature = "cuda")]
mod read_bandwidth;
mod route_index;
mod router;
mod router_block;
mod router_few;
mod router_many;
mod router_select;
mod select;
mod statistics;
#[cfg(feature = "cuda")]
mod synthetic;
mod token_tiles;
mod transformer;
mod tuning;
#[cfg(feature = "cuda")]
mod turns;
mod view;
mod workspace;

pub use abi_probe::{abi_probe, host_abi};
pub use body::{
    AttentionInputs, EmbeddingTables, NormInputs, attention, embed_tokens, norm, pool, rotary,
};
pub use buffer::Buffer;
pub use device::{Device, Properties};
pub use driver::RawStream;
pub use encoder_graphs::EncoderGraphs;
pub use experts::{ExpertLists, ExpertsInputs, experts, experts_workspace_bytes};
pub use gates::gates;
pub use kernels::{BuildInfo, build_info};
pub use moe_ffn::MoeFfn;
pub use neurons::Neurons;
pub use path::{Fallback, FfnInputs, Path, PlanOptions};
pub use plan::FfnPlan;
pub use route_index::{RouteIndexOutputs, route_index, route_index_workspace_bytes};
pub use router::{DeviceRouter, RouterView};
pub use router_select::{
    RouterSelectOutputs, router_select, router_select_is_one_launch, router_select_workspace_bytes,
};
pub use select::{SelectOutputs, select, select_workspace_bytes};
pub use statistics::RoutingCounts;
pub use token_tiles::{TokenTiles, token_tiles, token_tiles_workspace_bytes};
pub use transformer::{Gpu, GpuBatch, GpuFfn, GpuFfnWorkspace, GpuOptions, GpuTensor};
pub use tuning::{LayerShape, TunedLayer, TunedTime, Tuning};
pub use view::{Format, View, Workspace};
