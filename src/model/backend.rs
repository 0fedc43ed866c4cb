//! What a device does to run a Transformer body.
//!
//! A forward pass is a list of these operations on tensors made beforehand. None of them returns a
//! value that the next one needs on the host, so that a device can queue a whole pass, or record it
//! once and replay it. Sizes are the caller's to keep: tensors may have more rows than an
//! operation uses, never fewer.

use crate::error::Result;
use crate::ffn::{ExpertMask, Selection};
use crate::tensor::TensorRef;

use super::{Batch, Ffn};

/// y = W x + b.
#[derive(Debug)]
pub struct Linear<T> {
    /// W \[d_out, d_in\].
    pub weight: T,
    /// b \[d_out\].
    pub bias: T,
    /// Width of x.
    pub d_in: usize,
    /// Width of y.
    pub d_out: usize,
}

/// Normalisation of every token to mean 0 and variance 1, then ⊙ weight + bias.
#[derive(Debug)]
pub struct LayerNorm<T> {
    /// \[d_model\].
    pub weight: T,
    /// \[d_model\].
    pub bias: T,
    /// Added to the variance.
    pub epsilon: f64,
    /// Width of a token.
    pub d_model: usize,
}

/// The tables that turn ids into vectors.
#[derive(Debug)]
pub struct Embeddings<T> {
    /// \[vocab, d_model\].
    pub words: T,
    /// \[max_positions, d_model\].
    pub positions: T,
    /// The row of token type 0, \[d_model\]: sentence pairs are not supported.
    pub token_type: T,
    /// Width of a token.
    pub d_model: usize,
}

/// How a layer's FFN runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum FfnRun {
    /// As it is stored: a MoEfied layer with its own selection.
    #[default]
    Stored,
    /// Every neuron; for a MoEfied layer, the dense FFN on the same copy.
    Dense,
    /// A MoEfied layer with this selection instead of its own; a dense layer as it is.
    Selection(Selection),
    /// A MoEfied layer with its own selection [raised](Selection::raised) to this exponent; a dense
    /// layer as it is.
    Raised(f32),
    /// y = b2, as if no neuron ran: the baseline that shows what the FFNs contribute at all.
    Zero,
}

/// A device that runs Transformer bodies.
///
/// T is the number of tokens of the batch at hand; all matrices are row-major.
pub trait Backend: Send + Sync {
    /// A matrix or a vector on the device: weights or activations.
    type Tensor: Send + Sync;
    /// A batch on the device.
    type Batch: Send + Sync;
    /// An FFN on the device, dense or MoEfied.
    type Ffn: Send + Sync;
    /// Scratch memory of FFNs; it remembers the mask of the last one.
    type FfnWorkspace: Send;

    /// Whether a model of so many weights has room on the device. Asked before the first is copied.
    ///
    /// # Errors
    /// When it has not; the error says how much is missing.
    fn check_room(&self, _num_weights: usize) -> Result<()> {
        Ok(())
    }

    /// Copies a tensor to the device.
    ///
    /// # Errors
    /// When the device refuses.
    fn tensor(&self, host: TensorRef<'_>) -> Result<Self::Tensor>;

    /// Memory for activations \[rows, cols\]; what it holds is undefined.
    ///
    /// # Errors
    /// When the device has no room.
    fn activations(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// The first `len` elements, in f32, once everything queued so far is done.
    ///
    /// # Errors
    /// When the device or something queued failed.
    fn to_host(&self, tensor: &Self::Tensor, len: usize) -> Result<Vec<f32>>;

    /// Copies a batch to the device, with one position id per token.
    ///
    /// # Errors
    /// When the device refuses.
    fn batch(&self, batch: &Batch, position_ids: Vec<u32>) -> Result<Self::Batch>;

    /// Overwrites a batch on the device by one with as many tokens and sequences, none of them longer than
    /// the longest was: whatever was recorded with it then runs on that. Where the backend has batches with
    /// room to spare, the new one may be smaller, and what it leaves over is padding.
    ///
    /// # Errors
    /// When the device refuses.
    fn refill(
        &self,
        on_device: &mut Self::Batch,
        batch: &Batch,
        position_ids: Vec<u32>,
    ) -> Result<()>;

    /// Copies an FFN to the device.
    ///
    /// # Errors
    /// When the device refuses.
    fn ffn(&self, ffn: &Ffn) -> Result<Self::Ffn>;

    /// Scratch memory for one FFN at a time, of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// When the device has no room.
    fn ffn_workspace(&self, max_tokens: usize) -> Result<Self::FfnWorkspace>;

    /// y \[T, d_model\] = the sum of each token's word, position and token-type embedding.
    ///
    /// # Errors
    /// When the device refuses.
    fn embed_tokens(
        &self,
        y: &mut Self::Tensor,
        batch: &Self::Batch,
        embeddings: &Embeddings<Self::Tensor>,
    ) -> Result<()>;

    /// x \[T, d_model\] = layer norm of x + branch, or of x alone.
    ///
    /// # Errors
    /// When the device refuses.
    fn layer_norm(
        &self,
        x: &mut Self::Tensor,
        branch: Option<&Self::Tensor>,
        norm: &LayerNorm<Self::Tensor>,
        num_tokens: usize,
    ) -> Result<()>;

    /// y \[T, d_out\] = W x + b of x \[T, d_in\].
    ///
    /// # Errors
    /// When the device refuses.
    fn linear(
        &self,
        y: &mut Self::Tensor,
        x: &Self::Tensor,
        linear: &Linear<Self::Tensor>,
        num_tokens: usize,
    ) -> Result<()>;

    /// y \[T, d_model\] = softmax(Q Kᵀ / √d_head) V for every head, within each sequence;
    /// `qkv` \[T, 3·d_model\] holds each token's query, key and value, one after another.
    ///
    /// # Errors
    /// When the device refuses.
    fn attention(
        &self,
        y: &mut Self::Tensor,
        qkv: &Self::Tensor,
        batch: &Self::Batch,
        d_model: usize,
        num_heads: usize,
    ) -> Result<()>;

    /// y \[T, d_model\] = the FFN of x \[T, d_model\], the tokens of `batch`.
    ///
    /// # Errors
    /// When the selection does not fit the layer, or the device refuses.
    fn run_ffn(
        &self,
        y: &mut Self::Tensor,
        x: &Self::Tensor,
        ffn: &Self::Ffn,
        run: FfnRun,
        batch: &Self::Batch,
        workspace: &mut Self::FfnWorkspace,
    ) -> Result<()>;

    /// S(t) of the last [`run_ffn`](Self::run_ffn) with this workspace, once it is done; none
    /// when no experts were selected from.
    ///
    /// # Errors
    /// When the device or something queued failed.
    fn mask(&self, workspace: &Self::FfnWorkspace) -> Result<Option<ExpertMask>>;

    /// y \[num_sequences, d_model\] = the mean of each sequence's rows of x, scaled to unit length.
    ///
    /// # Errors
    /// When the device refuses.
    fn pool(
        &self,
        y: &mut Self::Tensor,
        x: &Self::Tensor,
        batch: &Self::Batch,
        d_model: usize,
    ) -> Result<()>;
}
