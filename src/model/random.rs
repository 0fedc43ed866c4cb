//! Encoders of random weights, for benchmarks.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::encoder::{Encoder, Layer};
use super::{Backend, Embeddings, Ffn, LayerNorm, Linear};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::ffn::{Activation, DenseFfn, MoeFfn, Partition, Router, Selection};
use crate::tensor::Tensor;

/// The sizes of an encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderShape {
    /// Layers.
    pub num_layers: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Heads of an attention.
    pub num_heads: usize,
    /// Neurons of an FFN.
    pub d_ff: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// Tokens of a sequence.
    pub max_length: usize,
}

impl EncoderShape {
    /// A BERT's.
    const fn bert(num_layers: usize, d_model: usize, num_heads: usize) -> Self {
        Self {
            num_layers,
            d_model,
            num_heads,
            d_ff: 4 * d_model,
            vocab_size: 30_522,
            max_length: 512,
        }
    }

    /// Weights of an encoder of these sizes.
    fn num_weights(&self) -> Option<usize> {
        let Self { num_layers, d_model, d_ff, vocab_size, max_length, .. } = *self;
        // Four projections and an FFN, their biases, and two norms.
        let matrices = d_model.checked_mul(4)?.checked_add(d_ff.checked_mul(2)?)?;
        let vectors = d_model.checked_mul(9)?.checked_add(d_ff)?;
        let layer = matrices.checked_mul(d_model)?.checked_add(vectors)?;
        let rows = vocab_size.checked_add(max_length)?.checked_add(3)?;
        num_layers.checked_mul(layer)?.checked_add(rows.checked_mul(d_model)?)
    }

    /// all-MiniLM-L6-v2.
    pub const MINILM: Self = Self::bert(6, 384, 12);
    /// bert-base (arXiv 1810.04805, section 3).
    pub const BERT_BASE: Self = Self::bert(12, 768, 12);
    /// bert-large.
    pub const BERT_LARGE: Self = Self::bert(24, 1024, 16);
}

/// Draws tensors for a device.
struct Draw<'a, B> {
    backend: &'a B,
    rng: ChaCha8Rng,
}

impl<B: Backend> Draw<'_, B> {
    /// Such that products with inputs of unit size have it too.
    fn matrix(&mut self, shape: [usize; 2]) -> Result<Tensor> {
        let scale = (3.0 / shape[1] as f32).sqrt();
        let values = (0..shape[0] * shape[1]).map(|_| self.rng.random_range(-scale..scale));
        Tensor::matrix(values.collect::<Vec<f32>>(), shape)
    }

    fn on_device(&mut self, shape: [usize; 2]) -> Result<B::Tensor> {
        let matrix = self.matrix(shape)?;
        self.backend.tensor(matrix.view())
    }

    fn linear(&mut self, d_in: usize, d_out: usize) -> Result<Linear<B::Tensor>> {
        let (weight, bias) = (self.on_device([d_out, d_in])?, self.on_device([1, d_out])?);
        Ok(Linear { weight, bias, d_in, d_out })
    }

    fn layer_norm(&mut self, d_model: usize) -> Result<LayerNorm<B::Tensor>> {
        let weight = self.backend.tensor(Tensor::vector(vec![1.0f32; d_model]).view())?;
        Ok(LayerNorm { weight, bias: self.on_device([1, d_model])?, epsilon: 1e-12, d_model })
    }

    fn ffn(&mut self, shape: &EncoderShape) -> Result<Ffn> {
        let EncoderShape { d_model, d_ff, .. } = *shape;
        let w_in = self.matrix([d_ff, d_model])?;
        let w_out = self.matrix([d_model, d_ff])?.transposed();
        let (b_in, b_out) = (self.matrix([1, d_ff])?, self.matrix([1, d_model])?);
        let gelu = Activation::Gelu;
        DenseFfn::from_neuron_major(gelu, false, w_in, Some(b_in), w_out, Some(b_out))
            .map(Ffn::Dense)
    }
}

impl<B: Backend> Encoder<B> {
    /// Draws a BERT of these sizes.
    ///
    /// # Errors
    /// When the heads do not divide the width, or the device has no room or refuses.
    pub fn random(backend: B, shape: &EncoderShape, seed: u64) -> Result<Self> {
        let EncoderShape { num_layers, d_model, num_heads, vocab_size, max_length, .. } = *shape;
        if num_heads == 0 || !d_model.is_multiple_of(num_heads) {
            let expected = format!("a divisor of d_model = {d_model}");
            return Err(Error::argument("encoder", "num_heads", expected, num_heads));
        }
        backend.check_room(shape.num_weights().unwrap_or(usize::MAX))?;
        let mut draw = Draw { backend: &backend, rng: ChaCha8Rng::seed_from_u64(seed) };
        let embeddings = Embeddings {
            words: draw.on_device([vocab_size, d_model])?,
            positions: draw.on_device([max_length, d_model])?,
            token_type: draw.on_device([1, d_model])?,
            d_model,
        };
        let embedding_norm = draw.layer_norm(d_model)?;
        let mut layers = Vec::with_capacity(num_layers);
        for _ in 0..num_layers {
            let ffn = draw.ffn(shape)?;
            layers.push(Layer {
                qkv: draw.linear(d_model, 3 * d_model)?,
                attention_output: draw.linear(d_model, d_model)?,
                attention_norm: draw.layer_norm(d_model)?,
                ffn: backend.ffn(&ffn)?,
                ffn_norm: draw.layer_norm(d_model)?,
            });
        }
        Ok(Self::of_parts(backend, shape, embeddings, embedding_norm, layers))
    }

    /// Splits every FFN into experts of equal width, of which a linear router picks `k`: random routing.
    ///
    /// # Errors
    /// When the experts cannot share the neurons equally, or the device refuses.
    pub fn moefy_at_random(
        &mut self,
        shape: &EncoderShape,
        num_experts: usize,
        k: usize,
        seed: u64,
    ) -> Result<()> {
        let width = Partition::width_of_experts(shape.d_ff, num_experts, 0)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for layer in 0..shape.num_layers {
            let mut draw = Draw { backend: &Cpu, rng: ChaCha8Rng::seed_from_u64(rng.random()) };
            let Ffn::Dense(dense) = draw.ffn(shape)? else { unreachable!("as drawn") };
            let labels = (0..shape.d_ff).map(|neuron| (neuron / width) as u32).collect();
            let w = draw.matrix([num_experts, shape.d_model])?;
            let partition = Partition::new(num_experts, labels)?;
            let router = Router::Linear { w };
            let moe = MoeFfn::from_expert_order(dense, partition, router, Selection::top_k(k))?;
            self.replace_ffn(layer, &Ffn::Moe(moe))?;
        }
        Ok(())
    }
}
