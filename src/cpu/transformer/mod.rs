//! The CPU as a backend for whole models.

mod attention;
mod embed_tokens;
mod lanes;
mod layer_norm;
mod pool;

use super::{DenseFfn, MoeFfn, Workspace, linear};
use crate::error::Result;
use crate::ffn::ExpertMask;
use crate::model::{Backend, Batch, Embeddings, Ffn, FfnRun, LayerNorm, Linear};
use crate::tensor::TensorRef;

/// Runs models on rayon's current pool, in f32; other weights are widened once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// A batch and its positions.
#[derive(Clone, Debug)]
pub struct CpuBatch {
    batch: Batch,
    position_ids: Vec<u32>,
}

/// An FFN on the CPU.
#[derive(Clone, Debug)]
pub struct CpuFfn {
    neurons: Neurons,
    b_out: Vec<f32>,
}

#[derive(Clone, Debug)]
enum Neurons {
    Dense(DenseFfn),
    Moe(MoeFfn),
}

/// Scratch memory of FFNs.
#[derive(Debug, Default)]
pub struct CpuFfnWorkspace {
    memory: Workspace,
    mask: Option<ExpertMask>,
}

impl Backend for Cpu {
    type Tensor = Vec<f32>;
    type Batch = CpuBatch;
    type Ffn = CpuFfn;
    type FfnWorkspace = CpuFfnWorkspace;

    fn tensor(&self, host: TensorRef<'_>) -> Result<Vec<f32>> {
        Ok(host.to_owned().to_f32().into_owned())
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; rows * cols])
    }

    fn to_host(&self, tensor: &Vec<f32>, len: usize) -> Result<Vec<f32>> {
        Ok(tensor[..len].to_vec())
    }

    fn batch(&self, batch: &Batch, position_ids: Vec<u32>) -> Result<CpuBatch> {
        Ok(CpuBatch { batch: batch.clone(), position_ids })
    }

    fn refill(
        &self,
        on_device: &mut CpuBatch,
        batch: &Batch,
        position_ids: Vec<u32>,
    ) -> Result<()> {
        *on_device = CpuBatch { batch: batch.clone(), position_ids };
        Ok(())
    }

    fn ffn(&self, ffn: &Ffn) -> Result<CpuFfn> {
        let b_out = ffn.neurons().b_out();
        let zeros = || vec![0.0; ffn.neurons().d_model()];
        Ok(CpuFfn {
            b_out: b_out.map_or_else(zeros, |b_out| b_out.to_f32().into_owned()),
            neurons: match ffn {
                Ffn::Dense(dense) => Neurons::Dense(DenseFfn::new(dense)),
                Ffn::Moe(moe) => Neurons::Moe(MoeFfn::new(moe)),
            },
        })
    }

    fn ffn_workspace(&self, _: usize) -> Result<CpuFfnWorkspace> {
        Ok(CpuFfnWorkspace::default())
    }

    fn embed_tokens(
        &self,
        y: &mut Vec<f32>,
        CpuBatch { batch, position_ids }: &CpuBatch,
        embeddings: &Embeddings<Vec<f32>>,
    ) -> Result<()> {
        let y = &mut y[..batch.num_tokens() * embeddings.d_model];
        embed_tokens::embed_tokens(y, batch.token_ids(), position_ids, embeddings);
        Ok(())
    }

    fn layer_norm(
        &self,
        x: &mut Vec<f32>,
        branch: Option<&Vec<f32>>,
        norm: &LayerNorm<Vec<f32>>,
        num_tokens: usize,
    ) -> Result<()> {
        let len = num_tokens * norm.d_model;
        layer_norm::layer_norm(&mut x[..len], branch.map(|branch| &branch[..len]), norm);
        Ok(())
    }

    fn linear(
        &self,
        y: &mut Vec<f32>,
        x: &Vec<f32>,
        Linear { weight, bias, d_in, d_out }: &Linear<Vec<f32>>,
        num_tokens: usize,
    ) -> Result<()> {
        let (y, x) = (&mut y[..num_tokens * d_out], &x[..num_tokens * d_in]);
        linear(y, x, weight, Some(bias), *d_in, *d_out);
        Ok(())
    }

    fn attention(
        &self,
        y: &mut Vec<f32>,
        qkv: &Vec<f32>,
        CpuBatch { batch, .. }: &CpuBatch,
        d_model: usize,
        num_heads: usize,
    ) -> Result<()> {
        let y = &mut y[..batch.num_tokens() * d_model];
        attention::attention(y, qkv, batch.sequence_offsets(), d_model, num_heads);
        Ok(())
    }

    fn run_ffn(
        &self,
        y: &mut Vec<f32>,
        x: &Vec<f32>,
        CpuFfn { neurons, b_out }: &CpuFfn,
        run: FfnRun,
        CpuBatch { batch, .. }: &CpuBatch,
        CpuFfnWorkspace { memory, mask }: &mut CpuFfnWorkspace,
    ) -> Result<()> {
        let len = batch.num_tokens() * b_out.len();
        let (x, y) = (&x[..len], &mut y[..len]);
        *mask = None;
        match (neurons, run) {
            (_, FfnRun::Zero) => {
                y.chunks_exact_mut(b_out.len()).for_each(|y| y.copy_from_slice(b_out));
            }
            (Neurons::Dense(dense), _) => dense.run(x, y, memory)?,
            (Neurons::Moe(moe), FfnRun::Dense) => moe.run_dense(x, y, memory)?,
            (Neurons::Moe(moe), FfnRun::Stored) => {
                *mask = Some(moe.run(x, y, memory)?.mask.clone())
            }
            (Neurons::Moe(moe), FfnRun::Selection(selection)) => {
                *mask = Some(moe.run_with_selection(selection, x, y, memory)?.mask.clone());
            }
            (Neurons::Moe(moe), FfnRun::Raised(exponent)) => {
                let selection = moe.selection().raised(exponent);
                *mask = Some(moe.run_with_selection(selection, x, y, memory)?.mask.clone());
            }
        }
        Ok(())
    }

    fn mask(&self, workspace: &CpuFfnWorkspace) -> Result<Option<ExpertMask>> {
        Ok(workspace.mask.clone())
    }

    fn pool(
        &self,
        y: &mut Vec<f32>,
        x: &Vec<f32>,
        CpuBatch { batch, .. }: &CpuBatch,
        d_model: usize,
    ) -> Result<()> {
        let y = &mut y[..batch.num_sequences() * d_model];
        pool::pool(y, x, batch.sequence_offsets(), d_model);
        Ok(())
    }
}
