use std::ops::Range;

use super::dense_ffn::run_dense;
use super::gates;
use super::neurons::{self, Neurons};
use super::router::Router;
use super::select::select_with;
use super::{TOKENS_AT_ONCE, Workspace, check_rows, tokens_of};
use crate::error::{Error, Result};
use crate::ffn::{self, Compensation, ExpertMask, Gate, Selection};

/// A MoEfied FFN on the CPU: experts that no token selects are neither read nor computed.
/// Scores, selection and all other arithmetic are f32.
#[derive(Clone, Debug)]
pub struct MoeFfn {
    num_experts: usize,
    expert_width: usize,
    router: Router,
    selection: Selection,
    gate: Gate,
    /// The neurons, and those of a linear compensation.
    parts: Vec<Neurons>,
    /// b2, with what the compensation adds to every token.
    bias: Vec<f32>,
    /// What the dense FFN adds to every token.
    dense_bias: Vec<f32>,
}

/// What routing did with a batch.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// S(t).
    pub mask: &'a ExpertMask,
    /// Number of tokens without a finite score; they selected nothing.
    pub rows_without_score: usize,
}

impl MoeFfn {
    /// Copies the weights, widened to f32: 4 bytes for each of the (G + 1) · d_ff · d_model weights
    /// of the neurons, with G = 2 for a GLU and 1 otherwise, and for each element of the biases,
    /// the router and the compensation.
    pub fn new(ffn: &ffn::MoeFfn) -> Self {
        let neurons = ffn.neurons();
        let mut bias: Vec<f64> =
            neurons.b_out().map_or(vec![0.0; ffn.d_model()], |bias| bias.to_f64());
        let to_f32 = |bias: &[f64]| bias.iter().map(|&b| b as f32).collect();
        let mut dense_bias: Option<Vec<f32>> = None;
        let parts = match ffn.compensation() {
            None => vec![Neurons::new(neurons, None)],
            Some(Compensation::Mean { mean }) => {
                let w_out = neurons.w_out().to_f64();
                for (row, mean) in w_out.chunks_exact(ffn.d_model()).zip(mean.to_f64()) {
                    bias.iter_mut().zip(row).for_each(|(bias, w)| *bias += mean * w);
                }
                vec![Neurons::new(neurons, Some(mean))]
            }
            Some(Compensation::Linear { u, v, c }) => {
                dense_bias = Some(to_f32(&bias));
                bias.iter_mut().zip(c.to_f64()).for_each(|(bias, c)| *bias += c);
                vec![Neurons::new(neurons, None), Neurons::low_rank(u, v)]
            }
        };
        let bias: Vec<f32> = to_f32(&bias);
        Self {
            num_experts: ffn.num_experts(),
            expert_width: ffn.expert_width(),
            router: Router::new(ffn.router(), ffn.d_model()),
            selection: ffn.selection(),
            gate: ffn.gate(),
            parts,
            dense_bias: dense_bias.unwrap_or_else(|| bias.clone()),
            bias,
        }
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.bias.len()
    }

    /// The selection rule.
    pub fn selection(&self) -> Selection {
        self.selection
    }

    /// Another selection, from the next call on.
    ///
    /// # Errors
    /// When it does not fit the number of experts.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        selection.check(self.num_experts)?;
        self.selection = selection;
        Ok(())
    }

    /// Bytes of the weights, biases, router and compensation.
    pub fn weight_bytes(&self) -> usize {
        let parts: usize = self.parts.iter().map(Neurons::bytes).sum();
        let biases = size_of_val(&self.bias[..]) + size_of_val(&self.dense_bias[..]);
        parts + self.router.bytes() + biases
    }

    /// x \[T, d_model\] → r \[T, E\].
    ///
    /// # Errors
    /// When x is not a whole number of tokens.
    pub fn scores<'w>(&self, x: &[f32], ws: &'w mut Workspace) -> Result<&'w [f32]> {
        let num_tokens = tokens_of("moe_ffn", x, self.d_model())?;
        ws.index.build(None, 0..num_tokens);
        let scores = ws.scores.first(num_tokens * self.num_experts);
        if num_tokens > 0 {
            self.router.scores(x, ws.index.ids(), &mut ws.router_hidden, scores);
        }
        Ok(scores)
    }

    /// Scores, selection, experts: x \[T, d_model\] → y \[T, d_model\].
    ///
    /// The bits depend neither on the number of threads nor on which other tokens are in the batch.
    ///
    /// # Errors
    /// When x is not a whole number of tokens, or y is not as long as x.
    pub fn run<'w>(&self, x: &[f32], y: &mut [f32], ws: &'w mut Workspace) -> Result<Routed<'w>> {
        self.run_with_selection(self.selection, x, y, ws)
    }

    /// The same with another selection.
    ///
    /// # Errors
    /// When it does not fit the number of experts, x is not a whole number of tokens, or y is not
    /// as long as x.
    pub fn run_with_selection<'w>(
        &self,
        selection: Selection,
        x: &[f32],
        y: &mut [f32],
        ws: &'w mut Workspace,
    ) -> Result<Routed<'w>> {
        selection.check(self.num_experts)?;
        let len = self.scores(x, ws)?.len();
        let mut scores = std::mem::take(&mut ws.scores);
        let rows_without_score =
            self.select_and_run(selection, x, scores.first(len), y, ws)?.rows_without_score;
        ws.scores = scores;
        Ok(Routed { mask: &ws.mask, rows_without_score })
    }

    /// The dense FFN on the same copy: every neuron, no router, no linear compensation.
    ///
    /// # Errors
    /// When x is not a whole number of tokens, or y is not as long as x.
    pub fn run_dense(&self, x: &[f32], y: &mut [f32], ws: &mut Workspace) -> Result<()> {
        run_dense(&self.parts, &self.dense_bias, x, y, ws)
    }

    /// Selection and experts with the scores r \[T, E\] of any router.
    ///
    /// # Errors
    /// When x is not a whole number of tokens, or y or the scores do not have as many.
    pub fn run_with_scores<'w>(
        &self,
        x: &[f32],
        scores: &[f32],
        y: &mut [f32],
        ws: &'w mut Workspace,
    ) -> Result<Routed<'w>> {
        self.select_and_run(self.selection, x, scores, y, ws)
    }

    fn select_and_run<'w>(
        &self,
        selection: Selection,
        x: &[f32],
        scores: &[f32],
        y: &mut [f32],
        ws: &'w mut Workspace,
    ) -> Result<Routed<'w>> {
        let num_tokens = tokens_of("moe_ffn", x, self.d_model())?;
        check_rows("moe_ffn", "scores", scores.len(), num_tokens, self.num_experts)?;
        let mut mask = std::mem::replace(&mut ws.mask, ExpertMask::none(0, 0));
        mask.reset(num_tokens, self.num_experts);
        let rows_without_score = select_with(&selection, scores, &mut mask, &mut ws.order);
        let done = self.experts(x, &mask, Some(scores), y, ws);
        ws.mask = mask;
        done.map(|()| Routed { mask: &ws.mask, rows_without_score })
    }

    /// The experts of a given mask; gates other than [`Gate::One`] need the scores r \[T, E\].
    ///
    /// # Errors
    /// When x is not a whole number of tokens, when y, mask or scores do not fit it, or when the
    /// gate needs scores and there are none.
    pub fn experts(
        &self,
        x: &[f32],
        mask: &ExpertMask,
        scores: Option<&[f32]>,
        y: &mut [f32],
        ws: &mut Workspace,
    ) -> Result<()> {
        let d_model = self.d_model();
        let num_tokens = tokens_of("moe_ffn", x, d_model)?;
        check_rows("moe_ffn", "y", y.len(), num_tokens, d_model)?;
        if [mask.num_tokens(), mask.num_experts()] != [num_tokens, self.num_experts] {
            let expected = format!("of {num_tokens} tokens and {} experts", self.num_experts);
            let got = format!("{} tokens and {} experts", mask.num_tokens(), mask.num_experts());
            return Err(Error::argument("moe_ffn", "mask", expected, got));
        }
        match scores {
            Some(scores) => {
                check_rows("moe_ffn", "scores", scores.len(), num_tokens, self.num_experts)?;
            }
            None if self.gate != Gate::One => {
                let expected = format!("given, because the gate is {:?}", self.gate);
                return Err(Error::argument("moe_ffn", "scores", expected, "none"));
            }
            None => {}
        }
        for first in (0..num_tokens).step_by(TOKENS_AT_ONCE) {
            let tokens = first..num_tokens.min(first + TOKENS_AT_ONCE);
            let range = tokens.start * d_model..tokens.end * d_model;
            self.run_tokens(tokens, mask, scores, &x[range.clone()], &mut y[range], ws);
        }
        Ok(())
    }

    /// One batch of tokens at most, so that hidden values stay in reach.
    fn run_tokens(
        &self,
        tokens: Range<usize>,
        mask: &ExpertMask,
        scores: Option<&[f32]>,
        x: &[f32],
        y: &mut [f32],
        ws: &mut Workspace,
    ) {
        let Workspace { hidden, gates: factors, norms, index, pieces, .. } = ws;
        index.build(Some(mask), tokens.clone());
        if self.gate != Gate::One {
            let scores = scores.expect("checked by the caller");
            let scores = &scores[tokens.start * self.num_experts..];
            gates::of_pairs(self.gate, scores, self.num_experts, index, norms, factors);
        }
        pieces.clear();
        let (neurons, width) = (&self.parts[0], self.expert_width);
        for expert in 0..self.num_experts {
            let rows = expert * width..(expert + 1) * width;
            pieces.push(neurons, 0, rows, index.expert(expert), true);
        }
        pieces.push(neurons, 0, self.num_experts * width..neurons.d_ff(), index.all(), false);
        for (part, neurons) in self.parts.iter().enumerate().skip(1) {
            pieces.push(neurons, part, 0..neurons.d_ff(), index.all(), false);
        }
        let gates = (self.gate != Gate::One).then_some(factors.as_slice());
        neurons::run(&self.parts, &self.bias, pieces, index, gates, x, y, hidden);
    }
}
