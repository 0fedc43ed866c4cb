//! Whole passes as CUDA graphs: one for each size of a batch, captured beforehand.

use super::driver::Graph;
use super::{Gpu, GpuTensor};
use crate::error::{Error, Result};
use crate::model::{Backend, Batch, DeviceBatch, Encoder, FfnRun, Workspace};

/// An encoder whose passes, from token ids to embeddings, were captured for a few sizes of a batch. A batch
/// takes the smallest that holds it; then it is copied there and one graph is launched.
///
/// ```no_run
/// # fn main() -> moefy::Result<()> {
/// # let folder = moefy::model::Folder::open("model".as_ref())?;
/// use moefy::cuda::{Device, EncoderGraphs, Gpu, GpuOptions};
/// use moefy::model::{Batch, Encoder};
///
/// let device = std::sync::Arc::new(Device::open(0)?);
/// let gpu = Gpu::new(&device, moefy::DType::F16, GpuOptions::default())?;
/// let mut graphs = EncoderGraphs::new(Encoder::load(gpu, &folder)?, &[[1, 32], [8, 32], [8, 128]])?;
/// let embeddings = graphs.embed(&Batch::pack([[101, 7592, 102]])?)?; // [sequences, d_model]
/// # Ok(())
/// # }
/// ```
pub struct EncoderGraphs {
    /// By ascending numbers of tokens; before what they were captured with, because they are dropped in order.
    buckets: Vec<Bucket>,
    /// What the buckets share: they run one after another.
    memory: Memory,
    encoder: Encoder<Gpu>,
}

struct Bucket {
    /// Sequences, and tokens of each.
    size: [usize; 2],
    graph: Graph,
    batch: DeviceBatch<Gpu>,
}

struct Memory {
    /// Hidden states \[tokens, d_model\].
    hidden: GpuTensor,
    /// \[sequences, d_model\].
    embeddings: GpuTensor,
    workspace: Workspace<Gpu>,
}

impl Memory {
    /// Queues a pass.
    fn pass(&mut self, encoder: &Encoder<Gpu>, batch: &DeviceBatch<Gpu>) -> Result<()> {
        let Self { hidden, embeddings, workspace } = self;
        encoder.forward(FfnRun::Stored, hidden, batch, workspace, None)?;
        encoder.pool_to(embeddings, hidden, batch)
    }
}

impl EncoderGraphs {
    /// Runs every bucket \[sequences, length\] once, to choose algorithms, and captures it.
    ///
    /// # Errors
    /// When there is no bucket, one of them is refused by [`Encoder::bucket`], or the device has no room.
    pub fn new(encoder: Encoder<Gpu>, buckets: &[[usize; 2]]) -> Result<Self> {
        let batches = buckets.iter().map(|&size| Ok((size, encoder.bucket(size)?)));
        let mut batches = batches.collect::<Result<Vec<_>>>()?;
        batches.sort_by_key(|([_, length], batch)| (batch.num_tokens(), *length));
        let Some((_, largest)) = batches.last() else {
            return Err(Error::argument("encoder_graphs", "buckets", "at least one", "none"));
        };
        let max_sequences = buckets.iter().map(|[sequences, _]| *sequences).max().unwrap_or(0);
        let mut memory = Memory {
            hidden: encoder.activations(largest.num_tokens())?,
            embeddings: encoder.activations(max_sequences)?,
            workspace: encoder.workspace(largest.num_tokens())?,
        };
        // All of them before the first is captured: scratch memory then has its last size and place.
        batches.iter().try_for_each(|(_, batch)| memory.pass(&encoder, batch))?;
        let stream = encoder.backend().stream();
        stream.wait()?;
        let captured = batches.into_iter().map(|(size, batch)| {
            let graph = stream.capture(|| memory.pass(&encoder, &batch))?;
            let nothing = || Error::argument("encoder_graphs", "a pass", "launches", "none");
            Ok(Bucket { size, graph: graph.ok_or_else(nothing)?, batch })
        });
        let buckets = captured.collect::<Result<_>>()?;
        Ok(Self { buckets, memory, encoder })
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder<Gpu> {
        &self.encoder
    }

    /// The bucket \[sequences, length\] that a batch takes: the one of fewest tokens that holds it.
    ///
    /// # Errors
    /// When it is empty, or has more sequences or longer ones than any bucket has room for.
    pub fn bucket_of(&self, batch: &Batch) -> Result<[usize; 2]> {
        self.find(batch).map(|index| self.buckets[index].size)
    }

    fn find(&self, batch: &Batch) -> Result<usize> {
        let wanted = [batch.num_sequences(), batch.max_length()];
        if wanted[0] == 0 {
            let expected = "of at least one sequence";
            return Err(Error::argument("encoder_graphs", "batch", expected, "none"));
        }
        let holds = |[sequences, length]: [usize; 2]| wanted[0] <= sequences && wanted[1] <= length;
        self.buckets.iter().position(|bucket| holds(bucket.size)).ok_or_else(|| {
            let sizes: Vec<_> = self.buckets.iter().map(|bucket| bucket.size).collect();
            let expected = format!("within one of the buckets [sequences, length] {sizes:?}");
            Error::argument("encoder_graphs", "batch", expected, format!("{wanted:?}"))
        })
    }

    /// Embeddings \[sequences, d_model\] of a batch, of unit length, once they are there. Nothing is allocated on
    /// the device.
    ///
    /// # Errors
    /// When the batch is empty or over every bucket, or a token id is not in the vocabulary; nothing was
    /// launched then. When the device failed.
    pub fn embed(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.launch(batch)?;
        let len = batch.num_sequences() * self.encoder.d_model();
        self.encoder.backend().to_host(&self.memory.embeddings, len)
    }

    /// Final hidden states \[tokens, d_model\] of a batch.
    ///
    /// # Errors
    /// As for [`embed`](Self::embed).
    pub fn hidden(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.launch(batch)?;
        let len = batch.num_tokens() * self.encoder.d_model();
        self.encoder.backend().to_host(&self.memory.hidden, len)
    }

    fn launch(&mut self, batch: &Batch) -> Result<()> {
        let index = self.find(batch)?;
        let bucket = &mut self.buckets[index];
        self.encoder.refill(&mut bucket.batch, batch)?;
        bucket.graph.launch()
    }
}
