//! One feed-forward layer as data: dense weights, partition, experts, router, selection, gate,
//! compensation. Nothing here computes; [`reference`](crate::reference) says what the data means
//! and [`cpu`](crate::cpu) runs it.

mod activation;
mod compensation;
mod dense;
mod mask;
mod moe;
mod partition;
mod router;
mod selection;
mod statistics;

pub use activation::Activation;
pub use compensation::Compensation;
pub use dense::{DenseFfn, FfnTensors};
pub use mask::ExpertMask;
pub use moe::MoeFfn;
pub use partition::Partition;
pub use router::{MlpKind, Router};
pub use selection::{Gate, Selection, SelectionRule};
pub use statistics::{RoutingStatistics, UnionShares};
