//! The converted model on the way forth and back. Only its FFNs are trained.

use super::ffn::{Gradients, Trace, Trained};
use super::{attention, layer_norm};
use crate::convert::{ThresholdScope, calibrate};
use crate::cpu::{Cpu, Matrix, MatrixMut, gemm, linear};
use crate::error::Result;
use crate::model::{Backend, Batch, Encoder, Linear, Surroundings};

/// An encoder whose FFNs are replaced by trained ones.
pub(super) struct Student<'a> {
    encoder: &'a Encoder<Cpu>,
    pub(super) ffns: Vec<Trained>,
}

/// What the way back needs of one layer.
struct LayerTrace {
    qkv: Vec<f32>,
    attention_norm: layer_norm::Normalised,
    ffn: Trace,
    ffn_norm: layer_norm::Normalised,
}

/// What the way back needs.
pub(super) struct StudentTrace(Vec<LayerTrace>);

impl<'a> Student<'a> {
    pub(super) fn new(encoder: &'a Encoder<Cpu>, ffns: Vec<Trained>) -> Self {
        Self { encoder, ffns }
    }

    /// The final hidden states \[T, d\].
    pub(super) fn forward(&self, batch: &Batch) -> Result<(Vec<f32>, StudentTrace)> {
        let encoder = self.encoder;
        let (d, tokens) = (encoder.d_model(), batch.num_tokens());
        let mut x = encoder.activations(tokens)?;
        encoder.embed_tokens(&mut x, &encoder.batch(batch)?)?;
        let cpu_batch = Cpu.batch(batch, Vec::new())?;
        let mut trace = Vec::with_capacity(self.ffns.len());
        for (layer, ffn) in self.ffns.iter().enumerate() {
            let Surroundings { qkv: project, attention_output, attention_norm, ffn_norm } =
                encoder.surroundings(layer);
            let mut qkv = vec![0.0; tokens * 3 * d];
            run_linear(&mut qkv, &x, project);
            let mut context = vec![0.0; tokens * d];
            Cpu.attention(&mut context, &qkv, &cpu_batch, d, encoder.num_heads())?;
            let mut sum = vec![0.0; tokens * d];
            run_linear(&mut sum, &context, attention_output);
            sum.iter_mut().zip(&x).for_each(|(sum, x)| *sum += x);
            let (inputs, attention_trace) = layer_norm::forward(sum, attention_norm);

            let (sum, ffn_trace) = ffn.forward(inputs)?;
            let (output, norm_trace) = layer_norm::forward(sum, ffn_norm);
            x = output;
            trace.push(LayerTrace {
                qkv,
                attention_norm: attention_trace,
                ffn: ffn_trace,
                ffn_norm: norm_trace,
            });
        }
        Ok((x, StudentTrace(trace)))
    }

    /// Moves the τ of every router that learns towards the one with which this batch has a density.
    pub(super) fn follow_density(
        &mut self,
        trace: &StudentTrace,
        density: f64,
        scope: ThresholdScope,
    ) {
        let layers = self.ffns.iter_mut().zip(&trace.0).filter_map(|(ffn, trace)| {
            let (num_experts, mean_k) =
                (ffn.moe().num_experts(), ffn.moe().partition().mean_k(density));
            let scores = &trace.ffn.router.as_ref()?.scores;
            Some((ffn.router.as_mut()?, scores, num_experts, mean_k))
        });
        match scope {
            ThresholdScope::Layer => {
                for (router, scores, num_experts, mean_k) in layers {
                    router.follow(calibrate::rel_threshold(scores, num_experts, mean_k));
                }
            }
            ThresholdScope::Global => {
                let mut layers: Vec<_> = layers.collect();
                let Some(&(_, _, num_experts, mean_k)) = layers.first() else { return };
                let scores = layers.iter().flat_map(|layer| layer.1).copied().collect::<Vec<_>>();
                let shared = calibrate::rel_threshold(&scores, num_experts, mean_k);
                layers.iter_mut().for_each(|layer| layer.0.follow(shared));
            }
        }
    }

    /// The gradients of all FFNs, from that of the final hidden states.
    pub(super) fn backward(
        &self,
        mut gradient: Vec<f32>,
        trace: StudentTrace,
        batch: &Batch,
    ) -> Vec<Gradients> {
        let d = self.encoder.d_model();
        let mut gradients = Vec::with_capacity(self.ffns.len());
        let layers = self.ffns.iter().zip(trace.0).enumerate().rev();
        for (layer, (ffn, trace)) in layers {
            let Surroundings { qkv: project, attention_output, attention_norm, ffn_norm } =
                self.encoder.surroundings(layer);
            layer_norm::backward(&mut gradient, &trace.ffn_norm, ffn_norm);
            gradients.push(ffn.backward(&mut gradient, &trace.ffn));
            if layer == 0 {
                break;
            }
            layer_norm::backward(&mut gradient, &trace.attention_norm, attention_norm);
            let mut d_context = vec![0.0; gradient.len()];
            add_through(&mut d_context, &gradient, attention_output);
            let heads = self.encoder.num_heads();
            let d_qkv = attention::backward(&trace.qkv, &d_context, batch, d, heads);
            add_through(&mut gradient, &d_qkv, project);
        }
        gradients.reverse();
        gradients
    }
}

fn run_linear(y: &mut [f32], x: &[f32], Linear { weight, bias, d_in, d_out }: &Linear<Vec<f32>>) {
    linear(y, x, weight, Some(bias), *d_in, *d_out);
}

/// dL/dx += dL/dy · W for y = W x + b.
fn add_through(dx: &mut [f32], dy: &[f32], linear: &Linear<Vec<f32>>) {
    let Linear { weight, d_in, d_out, .. } = linear;
    let tokens = dx.len() / d_in;
    gemm(
        1.0,
        Matrix::new(dy, [tokens, *d_out]),
        Matrix::new(weight, [*d_out, *d_in]),
        1.0,
        MatrixMut::new(dx, [tokens, *d_in]),
    );
}
