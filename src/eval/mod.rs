//! How a MoEfied model differs from the dense one, and what it costs, over a sample of texts.

mod cost;
mod spearman;

use std::time::{Duration, Instant};

use serde::Serialize;

use cost::{Cost, Executed};
pub use cost::{FfnCost, FlopsSaved};
pub use spearman::spearman;

use crate::error::{Error, Result};
use crate::model::{BATCH_TOKENS, Backend, Batch, Encoder, FfnRun, batches};

/// A model, the way its FFNs run, and what they cost.
pub struct Variant<'a, B: Backend> {
    /// The model.
    pub encoder: &'a Encoder<B>,
    /// How its FFNs run.
    pub run: FfnRun,
    /// One cost per layer.
    pub costs: &'a [FfnCost],
}

/// What one variant did over the texts.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// mean over tokens of ‖h − h₀‖/‖h₀‖, with h the variant's final hidden states and h₀ the
    /// dense model's.
    pub hidden_error: f64,
    /// Mean cosine between the variant's embeddings of the texts and the dense model's.
    pub embedding_cosine: f64,
    /// Executed neurons / d_ff, over all tokens and layers.
    pub density: f64,
    /// Multiply-adds that did not run.
    pub flops_saved: FlopsSaved,
    /// Speed.
    pub tokens_per_s: TokensPerSecond,
    /// Layer by layer.
    pub layers: Vec<LayerOutcome>,
    /// \[num_texts, d_model\], of unit length.
    pub embeddings: Vec<f32>,
}

/// Tokens per second, by wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokensPerSecond {
    /// Of the whole model.
    pub model: f64,
    /// Of its FFNs, each with its router and the norm behind it.
    pub ffn: f64,
}

/// What one layer did over the texts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerOutcome {
    /// Index of the layer.
    pub layer: usize,
    /// Executed neurons / d_ff.
    pub density: f64,
    /// mean over tokens of ‖h − h₀‖/‖h₀‖ of the layer's output.
    pub hidden_error: f64,
    /// Mean number of experts of a token; none for a dense layer.
    pub mean_k: Option<f64>,
    /// Largest number of experts of a token; none for a dense layer.
    pub max_k: Option<usize>,
}

/// Runs the dense model and every variant over the sequences, batch by batch in turns, so that their
/// times are taken under the same conditions. `step` hears of every finished token.
///
/// Returns the dense model's own outcome, then one per variant.
///
/// # Errors
/// When there is no sequence, a token id or a length does not fit a model, or the models differ in
/// shape.
pub fn evaluate<B: Backend>(
    dense: &Variant<'_, B>,
    variants: &[Variant<'_, B>],
    sequences: &[Vec<u32>],
    mut step: impl FnMut(usize),
) -> Result<Vec<Outcome>> {
    let shape = |encoder: &Encoder<B>| (encoder.num_layers(), encoder.d_model());
    let expected = shape(dense.encoder);
    if let Some(other) = variants.iter().map(|v| shape(v.encoder)).find(|&s| s != expected) {
        let [expected, got] =
            [expected, other].map(|(layers, d)| format!("{layers} layers of width {d}"));
        return Err(Error::argument("eval", "the reference model", got, expected));
    }
    if sequences.is_empty() {
        return Err(Error::argument("eval", "sequences", "at least one", "none"));
    }
    let batches = batches(sequences, BATCH_TOKENS)
        .into_iter()
        .map(|texts| Ok((Batch::pack(texts.iter().map(|&text| &sequences[text]))?, texts)))
        .collect::<Result<Vec<_>>>()?;
    let max_tokens = batches.iter().map(|(batch, _)| batch.num_tokens()).max().unwrap_or(0);
    let mut runs = std::iter::once(dense)
        .chain(variants)
        .map(|variant| Run::new(variant, max_tokens, sequences.len()))
        .collect::<Result<Vec<_>>>()?;
    for (batch, texts) in &batches {
        let (dense, variants) = runs.split_first_mut().expect("the dense run");
        let reference = dense.batch(batch, texts, None)?;
        for variant in variants {
            variant.batch(batch, texts, Some(&reference))?;
        }
        step(batch.num_tokens());
    }
    let dense_embeddings = runs[0].embeddings.clone();
    Ok(runs.into_iter().map(|run| run.finish(&dense_embeddings)).collect())
}

/// A variant under way.
struct Run<'a, B: Backend> {
    variant: &'a Variant<'a, B>,
    workspace: crate::model::Workspace<B>,
    x: B::Tensor,
    num_tokens: usize,
    model_time: Duration,
    ffn_time: Duration,
    cost: Cost,
    layers: Vec<LayerSums>,
    embeddings: Vec<f32>,
}

/// Sums over the tokens so far.
#[derive(Clone, Default)]
struct LayerSums {
    cost: Cost,
    error: f64,
    routed: bool,
    pairs: usize,
    max_k: usize,
}

impl<'a, B: Backend> Run<'a, B> {
    fn new(variant: &'a Variant<'a, B>, max_tokens: usize, num_texts: usize) -> Result<Self> {
        let encoder = variant.encoder;
        Ok(Self {
            variant,
            workspace: encoder.workspace(max_tokens)?,
            x: encoder.activations(max_tokens)?,
            num_tokens: 0,
            model_time: Duration::ZERO,
            ffn_time: Duration::ZERO,
            cost: Cost::default(),
            layers: vec![LayerSums::default(); encoder.num_layers()],
            embeddings: vec![0.0; num_texts * encoder.d_model()],
        })
    }

    /// Runs a batch; returns the hidden states behind every layer, compared with `reference`'s.
    fn batch(
        &mut self,
        batch: &Batch,
        texts: &[usize],
        reference: Option<&[Vec<f32>]>,
    ) -> Result<Vec<Vec<f32>>> {
        let Self { variant, workspace, x, .. } = self;
        let (encoder, run, num_tokens) = (variant.encoder, variant.run, batch.num_tokens());
        let device_batch = encoder.batch(batch)?;
        let mut hidden = Vec::with_capacity(encoder.num_layers());

        // Copies to the host are left out of the time.
        let start = Instant::now();
        encoder.embed_tokens(x, &device_batch)?;
        self.model_time += start.elapsed();
        for layer in 0..encoder.num_layers() {
            let start = Instant::now();
            encoder.attention_block(layer, x, &device_batch, workspace)?;
            let ffn_start = Instant::now();
            encoder.ffn_block(layer, run, x, &device_batch, workspace)?;
            self.ffn_time += ffn_start.elapsed();
            self.model_time += start.elapsed();

            let states = encoder.to_host(x, &device_batch)?;
            let sums = &mut self.layers[layer];
            let mask = encoder.mask(workspace)?;
            let executed = match (&mask, run) {
                (Some(mask), _) => Executed::Pairs(mask.num_pairs()),
                (None, FfnRun::Zero) => Executed::Nothing,
                (None, _) => Executed::Everything,
            };
            if let Some(mask) = mask {
                let max_k = (0..num_tokens).map(|t| mask.count(t)).max().unwrap_or(0);
                sums.routed = true;
                sums.pairs += mask.num_pairs();
                sums.max_k = sums.max_k.max(max_k);
            }
            for cost in [&mut self.cost, &mut sums.cost] {
                cost.add_ffn(&variant.costs[layer], executed, num_tokens);
            }
            self.cost.add_attention(encoder.d_model(), batch.sequences().map(<[u32]>::len));
            if let Some(reference) = reference {
                sums.error += relative_errors(&states, &reference[layer], encoder.d_model());
            }
            hidden.push(states);
        }
        self.num_tokens += num_tokens;

        let d_model = encoder.d_model();
        let pooled = encoder.pool(x, &device_batch)?;
        for (embedding, &text) in pooled.chunks_exact(d_model).zip(texts) {
            self.embeddings[text * d_model..(text + 1) * d_model].copy_from_slice(embedding);
        }
        Ok(hidden)
    }

    fn finish(self, dense_embeddings: &[f32]) -> Outcome {
        let tokens = self.num_tokens as f64;
        let layers: Vec<LayerOutcome> = self
            .layers
            .iter()
            .enumerate()
            .map(|(layer, sums)| LayerOutcome {
                layer,
                density: sums.cost.density(),
                hidden_error: sums.error / tokens,
                mean_k: sums.routed.then(|| sums.pairs as f64 / tokens),
                max_k: sums.routed.then_some(sums.max_k),
            })
            .collect();
        let d_model = self.variant.encoder.d_model();
        let cosines = cosines(&self.embeddings, dense_embeddings, d_model);
        Outcome {
            hidden_error: layers.last().map_or(0.0, |last| last.hidden_error),
            embedding_cosine: cosines.iter().sum::<f64>() / cosines.len() as f64,
            density: self.cost.density(),
            flops_saved: self.cost.flops_saved(),
            tokens_per_s: TokensPerSecond {
                model: tokens / self.model_time.as_secs_f64(),
                ffn: tokens / self.ffn_time.as_secs_f64(),
            },
            layers,
            embeddings: self.embeddings,
        }
    }
}

/// Σ over tokens of ‖h − h₀‖/‖h₀‖.
pub(crate) fn relative_errors(states: &[f32], reference: &[f32], d_model: usize) -> f64 {
    let rows = states.chunks_exact(d_model).zip(reference.chunks_exact(d_model));
    rows.map(|(h, h0)| {
        let square = |v: f64| v * v;
        let difference: f64 =
            h.iter().zip(h0).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
        let norm: f64 = h0.iter().map(|&b| square(f64::from(b))).sum();
        (difference / norm).sqrt()
    })
    .sum()
}

/// Cosines between the rows of `a` and `b`, which have unit length.
pub fn cosines(a: &[f32], b: &[f32], d_model: usize) -> Vec<f64> {
    let rows = a.chunks_exact(d_model).zip(b.chunks_exact(d_model));
    rows.map(|(a, b)| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()).collect()
}
