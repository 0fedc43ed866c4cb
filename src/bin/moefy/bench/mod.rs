//! `moefy bench`

mod ffn;
mod machine;
mod model;
mod npy;
mod plot;
mod sets;
pub mod shapes;
mod table;
mod traces;

use moefy::Result;
use moefy::cuda::Fallback;
use moefy::cuda::LayerShape;
use moefy::cuda::bench::RunSpec;

use crate::Common;

#[derive(clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// One FFN layer on a GPU: MoEfied against the fastest dense one of cuBLASLt
    Ffn(ffn::Ffn),
    /// A whole model on a GPU: tokens/s MoEfied and dense, and how much of the time the FFNs take
    Model(model::Model),
    /// The speed-up of rows that were measured earlier, as a picture
    Plot(plot::Plot),
}

impl Bench {
    pub fn run(self, common: &Common) -> Result<()> {
        match self.what {
            What::Ffn(ffn) => ffn.run(common),
            What::Model(model) => model.run(common),
            What::Plot(plot) => plot.run(),
        }
    }
}

fn fallback(name: &str) -> Result<Fallback, String> {
    let known = [Fallback::Exact, Fallback::Masked];
    known.into_iter().find(|f| f.name() == name).ok_or("expected exact or masked".into())
}

/// One row to measure.
pub struct Case {
    pub layer: LayerShape,
    pub run: RunSpec,
    /// Whether the other rows go on where the path cannot do this one.
    pub may_be_refused: bool,
}
