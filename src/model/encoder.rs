//! The BERT family of encoders, written once over a [`Backend`].
//!
//! A whole pass is [`Encoder::forward`]. The same in pieces, for conversion and evaluation, which
//! look at every layer:
//!
//! ```text
//! let mut workspace = encoder.workspace(max_tokens)?;
//! let mut x = encoder.activations(max_tokens)?;
//! let batch = encoder.batch(&batch)?;
//! encoder.embed_tokens(&mut x, &batch)?;
//! for layer in 0..encoder.num_layers() {
//!     encoder.attention_block(layer, &mut x, &batch, &mut workspace)?;    // x: the FFN's input
//!     encoder.ffn_block(layer, FfnRun::Stored, &mut x, &batch, &mut workspace)?;
//!     let mask = encoder.mask(&workspace)?;                               // the experts that ran
//! }
//! let hidden = encoder.to_host(&x, &batch)?;                              // [T, d_model]
//! ```
//!
//! Layers are post-norm: `x ← norm(x + attention(x))`, then `x ← norm(x + FFN(x))`.

use super::backend::{Backend, Embeddings, FfnRun, LayerNorm, Linear};
use super::{Architecture, Batch, EncoderShape, Ffn, Folder, WeightBias};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::ExpertMask;
use crate::tensor::{Tensor, TensorRef};

/// An encoder on a device.
pub struct Encoder<B: Backend> {
    backend: B,
    d_model: usize,
    num_heads: usize,
    vocab_size: usize,
    max_length: usize,
    /// RoBERTa counts positions from here on, over the tokens that are not padding; padding has
    /// this position itself. BERT counts all tokens from 0.
    padding: Option<u32>,
    embeddings: Embeddings<B::Tensor>,
    embedding_norm: LayerNorm<B::Tensor>,
    layers: Vec<Layer<B>>,
}

pub(super) struct Layer<B: Backend> {
    /// Query, key and value in one product.
    pub(super) qkv: Linear<B::Tensor>,
    pub(super) attention_output: Linear<B::Tensor>,
    pub(super) attention_norm: LayerNorm<B::Tensor>,
    pub(super) ffn: B::Ffn,
    pub(super) ffn_norm: LayerNorm<B::Tensor>,
}

/// Everything of a layer but its FFN.
pub(crate) struct Surroundings<'a, B: Backend> {
    pub(crate) qkv: &'a Linear<B::Tensor>,
    pub(crate) attention_output: &'a Linear<B::Tensor>,
    pub(crate) attention_norm: &'a LayerNorm<B::Tensor>,
    pub(crate) ffn_norm: &'a LayerNorm<B::Tensor>,
}

/// A batch on the device, checked against the model.
pub struct DeviceBatch<B: Backend> {
    batch: B::Batch,
    num_tokens: usize,
    num_sequences: usize,
    max_length: usize,
    /// Whether it may be refilled with less.
    is_bucket: bool,
}

impl<B: Backend> DeviceBatch<B> {
    /// Room for `num_sequences` sequences of up to `length` tokens.
    pub(crate) fn bucket(batch: B::Batch, [num_sequences, length]: [usize; 2]) -> Self {
        let num_tokens = num_sequences * length;
        Self { batch, num_tokens, num_sequences, max_length: length, is_bucket: true }
    }

    /// T, padding included.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

/// Memory for what is between the layers' inputs and outputs. It serves one pass at a time.
pub struct Workspace<B: Backend> {
    max_tokens: usize,
    qkv: B::Tensor,
    context: B::Tensor,
    branch: B::Tensor,
    ffn: B::FfnWorkspace,
}

/// Is given every layer's number and S(t), as the layers run.
pub type MaskObserver<'a> = dyn FnMut(usize, &ExpertMask) + 'a;

impl<B: Backend> Encoder<B> {
    /// Loads a model folder onto a device.
    ///
    /// # Errors
    /// When a tensor is not what the folder's config promises, or the device refuses.
    pub fn load(backend: B, folder: &Folder) -> Result<Self> {
        backend.check_room(folder.num_weights())?;
        let (config, names) = (folder.config(), folder.names());
        let loader = Loader { backend: &backend, folder, d_model: config.hidden_size };
        let layers = (0..config.num_hidden_layers).map(|layer| {
            Ok(Layer {
                qkv: loader.linear(&[names.query(layer), names.key(layer), names.value(layer)])?,
                attention_output: loader.linear(&[names.attention_output(layer)])?,
                attention_norm: loader.layer_norm(&names.attention_norm(layer))?,
                ffn: backend.ffn(&folder.ffn(layer)?)?,
                ffn_norm: loader.layer_norm(&names.ffn_norm(layer))?,
            })
        });
        Ok(Self {
            d_model: config.hidden_size,
            num_heads: config.num_attention_heads,
            vocab_size: config.vocab_size,
            max_length: config.num_positions(),
            padding: match config.architecture {
                Architecture::Bert => None,
                Architecture::Roberta => Some(config.pad_token_id as u32),
            },
            embeddings: loader.embeddings()?,
            embedding_norm: loader.layer_norm(&names.embedding_norm())?,
            layers: layers.collect::<Result<_>>()?,
            backend,
        })
    }

    /// A BERT of these parts.
    pub(super) fn of_parts(
        backend: B,
        shape: &EncoderShape,
        embeddings: Embeddings<B::Tensor>,
        embedding_norm: LayerNorm<B::Tensor>,
        layers: Vec<Layer<B>>,
    ) -> Self {
        Self {
            backend,
            d_model: shape.d_model,
            num_heads: shape.num_heads,
            vocab_size: shape.vocab_size,
            max_length: shape.max_length,
            padding: None,
            embeddings,
            embedding_norm,
            layers,
        }
    }

    /// Where it runs.
    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    /// A layer's FFN.
    pub(crate) fn ffn(&self, layer: usize) -> &B::Ffn {
        &self.layers[layer].ffn
    }

    /// Token ids.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What surrounds a layer's FFN.
    pub(crate) fn surroundings(&self, layer: usize) -> Surroundings<'_, B> {
        let Layer { qkv, attention_output, attention_norm, ffn_norm, .. } = &self.layers[layer];
        Surroundings { qkv, attention_output, attention_norm, ffn_norm }
    }

    /// γ of the norm behind a layer's FFN, \[d_model\].
    pub(crate) fn ffn_norm_weight(&self, layer: usize) -> Result<Vec<f32>> {
        self.backend.to_host(&self.layers[layer].ffn_norm.weight, self.d_model)
    }

    /// Heads of an attention.
    pub(crate) fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Replaces a layer's FFN.
    ///
    /// # Errors
    /// When it does not fit the model's width, or the device refuses.
    pub fn replace_ffn(&mut self, layer: usize, ffn: &Ffn) -> Result<()> {
        if ffn.neurons().d_model() != self.d_model {
            let expected = format!("of width d_model = {}", self.d_model);
            return Err(Error::argument("encoder", "ffn", expected, ffn.neurons().d_model()));
        }
        self.layers[layer].ffn = self.backend.ffn(ffn)?;
        Ok(())
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.d_model
    }

    /// The most tokens that a sequence may have.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Memory for the hidden states of `max_tokens` tokens, \[max_tokens, d_model\].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn activations(&self, max_tokens: usize) -> Result<B::Tensor> {
        self.backend.activations(max_tokens, self.d_model)
    }

    /// Memory for passes of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn workspace(&self, max_tokens: usize) -> Result<Workspace<B>> {
        Ok(Workspace {
            max_tokens,
            qkv: self.backend.activations(max_tokens, 3 * self.d_model)?,
            context: self.activations(max_tokens)?,
            branch: self.activations(max_tokens)?,
            ffn: self.backend.ffn_workspace(max_tokens)?,
        })
    }

    /// Checks a batch against the model and copies it to the device.
    ///
    /// # Errors
    /// When a token id is not in the vocabulary, or a sequence is longer than
    /// [`max_length`](Self::max_length).
    pub fn batch(&self, batch: &Batch) -> Result<DeviceBatch<B>> {
        self.check(batch)?;
        Ok(DeviceBatch {
            batch: self.backend.batch(batch, self.position_ids(batch))?,
            num_tokens: batch.num_tokens(),
            num_sequences: batch.num_sequences(),
            max_length: batch.max_length(),
            is_bucket: false,
        })
    }

    /// Overwrites a batch on the device: a pass that was recorded with it then runs on the new one. Of a
    /// bucket, tokens and sequences may be fewer; then what is left over is padding, which costs as much as
    /// tokens do outside the experts.
    ///
    /// # Errors
    /// Those of [`batch`](Self::batch), and when the new batch has another number of tokens or sequences
    /// (for a bucket, more), or a longer one.
    pub fn refill(&self, on_device: &mut DeviceBatch<B>, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        let sizes = |tokens, sequences, longest| {
            format!("{tokens} tokens in {sequences} sequences of at most {longest}")
        };
        let DeviceBatch { num_tokens, num_sequences, max_length, is_bucket, .. } = *on_device;
        let same = (num_tokens, num_sequences) == (batch.num_tokens(), batch.num_sequences());
        let less = batch.num_tokens() <= num_tokens && batch.num_sequences() <= num_sequences;
        if !(same || is_bucket && less) || batch.max_length() > max_length {
            let expected = sizes(num_tokens, num_sequences, max_length);
            let got = sizes(batch.num_tokens(), batch.num_sequences(), batch.max_length());
            return Err(Error::argument("encoder", "batch", expected, got));
        }
        self.backend.refill(&mut on_device.batch, batch, self.position_ids(batch))
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let refuse = |argument, expected: String, got: String| {
            Err(Error::argument("encoder", argument, expected, got))
        };
        for (i, sequence) in batch.sequences().enumerate() {
            if let Some(id) = sequence.iter().find(|&&id| id as usize >= self.vocab_size) {
                let expected = format!("less than vocab_size = {}", self.vocab_size);
                return refuse("token_ids", expected, format!("{id} in sequence {i}"));
            }
            if sequence.len() > self.max_length() {
                let expected = format!("of at most {} tokens", self.max_length());
                return refuse(
                    "sequences",
                    expected,
                    format!("{} in sequence {i}", sequence.len()),
                );
            }
        }
        Ok(())
    }

    fn position_ids(&self, batch: &Batch) -> Vec<u32> {
        let mut ids = Vec::with_capacity(batch.num_tokens());
        for sequence in batch.sequences() {
            match self.padding {
                None => ids.extend(0..sequence.len() as u32),
                Some(padding) => {
                    let mut last = padding;
                    ids.extend(sequence.iter().map(|&token| {
                        last += u32::from(token != padding);
                        if token == padding { padding } else { last }
                    }));
                }
            }
        }
        ids
    }

    /// x \[T, d_model\] = the first layer's input.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn embed_tokens(&self, x: &mut B::Tensor, batch: &DeviceBatch<B>) -> Result<()> {
        self.backend.embed_tokens(x, &batch.batch, &self.embeddings)?;
        self.backend.layer_norm(x, None, &self.embedding_norm, batch.num_tokens)
    }

    /// x \[T, d_model\], a layer's input, becomes the input of its FFN.
    ///
    /// # Errors
    /// When the workspace is too small, or the device refuses.
    pub fn attention_block(
        &self,
        layer: usize,
        x: &mut B::Tensor,
        batch: &DeviceBatch<B>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        workspace.check(batch)?;
        let (backend, layer, tokens) = (&self.backend, &self.layers[layer], batch.num_tokens);
        let Workspace { qkv, context, branch, .. } = workspace;
        backend.linear(qkv, x, &layer.qkv, tokens)?;
        backend.attention(context, qkv, &batch.batch, self.d_model, self.num_heads)?;
        backend.linear(branch, context, &layer.attention_output, tokens)?;
        backend.layer_norm(x, Some(branch), &layer.attention_norm, tokens)
    }

    /// x \[T, d_model\], the input of a layer's FFN, becomes the layer's output.
    ///
    /// # Errors
    /// When the workspace is too small, the selection does not fit the layer, or the device
    /// refuses.
    pub fn ffn_block(
        &self,
        layer: usize,
        run: FfnRun,
        x: &mut B::Tensor,
        batch: &DeviceBatch<B>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        workspace.check(batch)?;
        let layer = &self.layers[layer];
        let Workspace { branch, ffn, .. } = workspace;
        self.backend.run_ffn(branch, x, &layer.ffn, run, &batch.batch, ffn)?;
        self.backend.layer_norm(x, Some(branch), &layer.ffn_norm, batch.num_tokens)
    }

    /// S(t) of the last [`ffn_block`](Self::ffn_block); none when it ran without selection.
    ///
    /// # Errors
    /// When the device, or something queued on it, failed.
    pub fn mask(&self, workspace: &Workspace<B>) -> Result<Option<ExpertMask>> {
        self.backend.mask(&workspace.ffn)
    }

    /// x \[T, d_model\] = the final hidden states. With `observe`, the host waits for the mask of
    /// every layer that selects experts.
    ///
    /// # Errors
    /// Those of the blocks.
    pub fn forward(
        &self,
        run: FfnRun,
        x: &mut B::Tensor,
        batch: &DeviceBatch<B>,
        workspace: &mut Workspace<B>,
        mut observe: Option<&mut MaskObserver<'_>>,
    ) -> Result<()> {
        self.embed_tokens(x, batch)?;
        for layer in 0..self.num_layers() {
            self.attention_block(layer, x, batch, workspace)?;
            self.ffn_block(layer, run, x, batch, workspace)?;
            if let Some(observe) = &mut observe
                && let Some(mask) = self.mask(workspace)?
            {
                observe(layer, &mask);
            }
        }
        Ok(())
    }

    /// Sentence embeddings \[num_sequences, d_model\] from final hidden states: their mean over
    /// each sequence, scaled to unit length.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn pool(&self, x: &B::Tensor, batch: &DeviceBatch<B>) -> Result<Vec<f32>> {
        let mut y = self.activations(batch.num_sequences)?;
        self.pool_to(&mut y, x, batch)?;
        self.backend.to_host(&y, batch.num_sequences * self.d_model)
    }

    /// The same to y \[num_sequences, d_model\] on the device, without waiting for it.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn pool_to(&self, y: &mut B::Tensor, x: &B::Tensor, batch: &DeviceBatch<B>) -> Result<()> {
        self.backend.pool(y, x, &batch.batch, self.d_model)
    }

    /// Hidden states on the host, \[T, d_model\].
    ///
    /// # Errors
    /// When the device, or something queued on it, failed.
    pub fn to_host(&self, x: &B::Tensor, batch: &DeviceBatch<B>) -> Result<Vec<f32>> {
        self.backend.to_host(x, batch.num_tokens * self.d_model)
    }
}

impl<B: Backend> Workspace<B> {
    fn check(&self, batch: &DeviceBatch<B>) -> Result<()> {
        if batch.num_tokens <= self.max_tokens {
            return Ok(());
        }
        let expected = format!("of at most {} tokens, as the workspace", self.max_tokens);
        Err(Error::argument("encoder", "batch", expected, batch.num_tokens))
    }
}

/// Takes the tensors of a folder to a device.
struct Loader<'a, B> {
    backend: &'a B,
    folder: &'a Folder,
    d_model: usize,
}

impl<B: Backend> Loader<'_, B> {
    /// One layer from several with the same input, their outputs one after another.
    fn linear(&self, parts: &[WeightBias]) -> Result<Linear<B::Tensor>> {
        let (d_in, d_out) = (self.d_model, parts.len() * self.d_model);
        let weights = parts.iter().map(|part| self.folder.matrix(&part.weight, [d_in, d_in]));
        let biases = parts.iter().map(|part| self.folder.vector(&part.bias, d_in));
        let weight = stacked(weights.collect::<Result<_>>()?, [d_out, d_in])?;
        let bias = stacked(biases.collect::<Result<_>>()?, [1, d_out])?;
        Ok(Linear {
            weight: self.backend.tensor(weight.view())?,
            bias: self.backend.tensor(bias.view())?,
            d_in,
            d_out,
        })
    }

    fn layer_norm(&self, names: &WeightBias) -> Result<LayerNorm<B::Tensor>> {
        Ok(LayerNorm {
            weight: self.backend.tensor(self.folder.vector(&names.weight, self.d_model)?)?,
            bias: self.backend.tensor(self.folder.vector(&names.bias, self.d_model)?)?,
            epsilon: self.folder.config().layer_norm_eps,
            d_model: self.d_model,
        })
    }

    fn embeddings(&self) -> Result<Embeddings<B::Tensor>> {
        let (config, names) = (self.folder.config(), self.folder.names());
        let table = |name: &str, rows| self.folder.matrix(name, [rows, self.d_model]);
        let words = table(&names.word_embeddings(), config.vocab_size)?;
        let positions = table(&names.position_embeddings(), config.max_position_embeddings)?;
        let token_types = table(&names.token_type_embeddings(), config.type_vocab_size)?;
        Ok(Embeddings {
            words: self.backend.tensor(words)?,
            positions: self.backend.tensor(positions)?,
            token_type: self.backend.tensor(token_types.to_owned().gather_rows(&[0]).view())?,
            d_model: self.d_model,
        })
    }
}

/// The matrices above one another, in their common format, or f32 where it differs.
fn stacked(parts: Vec<TensorRef<'_>>, shape: [usize; 2]) -> Result<Tensor> {
    let dtype = parts[0].dtype();
    let dtype = if parts.iter().all(|part| part.dtype() == dtype) { dtype } else { DType::F32 };
    let parts: Vec<Tensor> = parts.iter().map(|part| part.to_owned().to_dtype(dtype)).collect();
    let bytes: Vec<&[u8]> = parts.iter().map(Tensor::as_bytes).collect();
    Ok(TensorRef::from_bytes(dtype, &bytes.concat(), shape)?.to_owned())
}
