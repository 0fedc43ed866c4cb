use super::neurons::{self, Neurons};
use super::{TOKENS_AT_ONCE, Workspace, check_rows, tokens_of};
use crate::error::Result;
use crate::ffn;

/// A dense FFN on the CPU. All arithmetic is f32.
#[derive(Clone, Debug)]
pub struct DenseFfn {
    neurons: [Neurons; 1],
    b_out: Vec<f32>,
}

impl DenseFfn {
    /// Copies the weights, widened to f32: 4 bytes for each of the (G + 1) · d_ff · d_model weights
    /// and of the biases, with G = 2 for a GLU and 1 otherwise.
    pub fn new(ffn: &ffn::DenseFfn) -> Self {
        let b_out = ffn.b_out().map_or(vec![0.0; ffn.d_model()], |b| b.to_f32().into_owned());
        Self { neurons: [Neurons::new(ffn, None)], b_out }
    }

    /// Bytes of the weights and biases.
    pub fn weight_bytes(&self) -> usize {
        self.neurons[0].bytes() + size_of_val(self.b_out.as_slice())
    }

    /// x \[T, d_model\] → y \[T, d_model\]. The bits depend neither on the number of threads nor
    /// on which other tokens are in the batch.
    ///
    /// # Errors
    /// When x is not a whole number of tokens, or y is not as long as x.
    pub fn run(&self, x: &[f32], y: &mut [f32], ws: &mut Workspace) -> Result<()> {
        run_dense(&self.neurons, &self.b_out, x, y, ws)
    }
}

/// All neurons of the first part for every token.
pub(super) fn run_dense(
    parts: &[Neurons],
    bias: &[f32],
    x: &[f32],
    y: &mut [f32],
    ws: &mut Workspace,
) -> Result<()> {
    let d_model = bias.len();
    let num_tokens = tokens_of("dense_ffn", x, d_model)?;
    check_rows("dense_ffn", "y", y.len(), num_tokens, d_model)?;
    let step = TOKENS_AT_ONCE * d_model;
    for (x, y) in x.chunks(step).zip(y.chunks_mut(step)) {
        ws.index.build(None, 0..x.len() / d_model);
        ws.pieces.clear();
        ws.pieces.push(&parts[0], 0, 0..parts[0].d_ff(), ws.index.all(), false);
        let Workspace { pieces, index, hidden, .. } = &mut *ws;
        neurons::run(parts, bias, pieces, index, None, x, y, hidden);
    }
    Ok(())
}
