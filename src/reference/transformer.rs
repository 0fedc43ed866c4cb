//! The reference as a backend: whole models in f64.

use super::{attention, dense_ffn, embed_tokens, layer_norm, linear, moe_ffn, optional, pool};
use crate::error::Result;
use crate::ffn::ExpertMask;
use crate::model::{Backend, Batch, Embeddings, Ffn, FfnRun, LayerNorm, Linear};
use crate::tensor::TensorRef;

/// Runs models with the functions of this module: slow, and the measure of every other backend.
/// Activations are f64 throughout.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

/// A batch and its positions.
#[derive(Clone, Debug)]
pub struct ReferenceBatch {
    batch: Batch,
    position_ids: Vec<u32>,
}

impl Backend for Reference {
    type Tensor = Vec<f64>;
    type Batch = ReferenceBatch;
    type Ffn = Ffn;
    type FfnWorkspace = Option<ExpertMask>;

    fn tensor(&self, host: TensorRef<'_>) -> Result<Vec<f64>> {
        Ok(host.to_owned().to_f64())
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Vec<f64>> {
        Ok(vec![f64::NAN; rows * cols])
    }

    fn to_host(&self, tensor: &Vec<f64>, len: usize) -> Result<Vec<f32>> {
        Ok(tensor[..len].iter().map(|&x| x as f32).collect())
    }

    fn batch(&self, batch: &Batch, position_ids: Vec<u32>) -> Result<ReferenceBatch> {
        Ok(ReferenceBatch { batch: batch.clone(), position_ids })
    }

    fn refill(
        &self,
        on_device: &mut ReferenceBatch,
        batch: &Batch,
        position_ids: Vec<u32>,
    ) -> Result<()> {
        *on_device = ReferenceBatch { batch: batch.clone(), position_ids };
        Ok(())
    }

    fn ffn(&self, ffn: &Ffn) -> Result<Ffn> {
        Ok(ffn.clone())
    }

    fn ffn_workspace(&self, _: usize) -> Result<Option<ExpertMask>> {
        Ok(None)
    }

    fn embed_tokens(
        &self,
        y: &mut Vec<f64>,
        batch: &ReferenceBatch,
        embeddings: &Embeddings<Vec<f64>>,
    ) -> Result<()> {
        let Embeddings { words, positions, token_type, .. } = embeddings;
        let ids = batch.batch.token_ids();
        store(y, &embed_tokens(words, positions, token_type, ids, &batch.position_ids))
    }

    fn layer_norm(
        &self,
        x: &mut Vec<f64>,
        branch: Option<&Vec<f64>>,
        norm: &LayerNorm<Vec<f64>>,
        num_tokens: usize,
    ) -> Result<()> {
        let x_used = &mut x[..num_tokens * norm.d_model];
        if let Some(branch) = branch {
            x_used.iter_mut().zip(branch).for_each(|(x, b)| *x += b);
        }
        let y = layer_norm(&norm.weight, &norm.bias, norm.epsilon, x_used);
        store(x, &y)
    }

    fn linear(
        &self,
        y: &mut Vec<f64>,
        x: &Vec<f64>,
        layer: &Linear<Vec<f64>>,
        num_tokens: usize,
    ) -> Result<()> {
        let x = &x[..num_tokens * layer.d_in];
        store(y, &linear(&layer.weight, &layer.bias, x, layer.d_in))
    }

    fn attention(
        &self,
        y: &mut Vec<f64>,
        qkv: &Vec<f64>,
        batch: &ReferenceBatch,
        d_model: usize,
        num_heads: usize,
    ) -> Result<()> {
        let qkv = &qkv[..batch.batch.num_tokens() * 3 * d_model];
        store(y, &attention(qkv, batch.batch.sequence_offsets(), d_model, num_heads))
    }

    fn run_ffn(
        &self,
        y: &mut Vec<f64>,
        x: &Vec<f64>,
        ffn: &Ffn,
        run: FfnRun,
        batch: &ReferenceBatch,
        mask: &mut Option<ExpertMask>,
    ) -> Result<()> {
        let (neurons, num_tokens) = (ffn.neurons(), batch.batch.num_tokens());
        let x = &x[..num_tokens * neurons.d_model()];
        *mask = None;
        let moe = match (ffn, run) {
            (Ffn::Moe(moe), FfnRun::Stored) => Some(moe.clone()),
            (Ffn::Moe(moe), FfnRun::Selection(rule)) => Some(moe.clone().with_selection(rule)?),
            (Ffn::Moe(moe), FfnRun::Raised(exponent)) => {
                Some(moe.clone().with_selection(moe.selection().raised(exponent))?)
            }
            _ => None,
        };
        match (moe, run) {
            (_, FfnRun::Zero) => {
                let b_out = optional(neurons.b_out(), neurons.d_model());
                store(y, &b_out.repeat(num_tokens))
            }
            (Some(moe), _) => {
                let (output, selected) = moe_ffn(&moe, x);
                *mask = Some(selected);
                store(y, &output)
            }
            (None, _) => store(y, &dense_ffn(neurons, x)),
        }
    }

    fn mask(&self, workspace: &Option<ExpertMask>) -> Result<Option<ExpertMask>> {
        Ok(workspace.clone())
    }

    fn pool(
        &self,
        y: &mut Vec<f64>,
        x: &Vec<f64>,
        batch: &ReferenceBatch,
        d_model: usize,
    ) -> Result<()> {
        store(y, &pool(x, batch.batch.sequence_offsets(), d_model))
    }
}

fn store(y: &mut [f64], values: &[f64]) -> Result<()> {
    y[..values.len()].copy_from_slice(values);
    Ok(())
}
