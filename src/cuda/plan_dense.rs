//! The paths of a plan that compute a layer densely: the original FFN, and the function of the experts under masks.

use super::dense::{Dense, DenseRun};
use super::driver::RawStream;
use super::view::{Arguments, View, Workspace};
use super::{FfnInputs, FfnPlan, experts_masked, padding};
use crate::abi::{moefy_clear_invalid_params, moefy_experts_params};
use crate::error::Result;

impl FfnPlan {
    /// # Safety
    /// As for [`FfnPlan::run`].
    pub(super) unsafe fn run_dense(
        &self,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        op: Workspace,
    ) -> Result<()> {
        let run = self.dense_run(y, inputs, op);
        // SAFETY: the caller's promise.
        unsafe {
            self.dense().run(self.ffn.device(), stream, &run)?;
            self.clear_invalid(stream, y, inputs)
        }
    }

    /// # Safety
    /// As for [`FfnPlan::run`].
    pub(super) unsafe fn run_masked(
        &self,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        base: u64,
    ) -> Result<()> {
        let dense = self.dense();
        // SAFETY: the caller's promise.
        let begin = |run: &DenseRun| unsafe { dense.begin(stream, run) };
        // SAFETY: the caller's promise.
        unsafe {
            match self.ffn.under_masks(inputs.x.shape[0]) {
                Some(shape) => self.run_under_masks(&shape, stream, y, inputs, base),
                None => self.run_masked_by(dense, begin, stream, y, inputs, base),
            }
        }
    }

    /// The first product masks what it gives, and multiplies while the router works.
    unsafe fn run_under_masks(
        &self,
        shape: &experts_masked::Shape,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        base: u64,
    ) -> Result<()> {
        let (ffn, device, dense) = (&self.ffn, self.ffn.device(), self.dense());
        let check = Arguments { device, op: "moe_ffn" };
        let run = self.dense_run(y, inputs, self.op_workspace(base));
        let valid = check.optional_words("num_valid_tokens", inputs.num_valid_tokens, 1)?;
        let kernels = device.experts.many.masked(ffn.dtype()).expect("the shape is for them");
        // SAFETY: the caller's promise.
        unsafe {
            let routed = self.route(stream, inputs, base, self.beside(base))?;
            let params = moefy_experts_params {
                neurons: ffn.neurons().check(&check)?.0,
                x: run.x,
                mask: routed.mask.address,
                gates: routed.gates.map_or(0, |gates| gates.address),
                num_valid_tokens: valid,
                hidden: dense.hidden(&run),
                num_tokens: run.num_tokens as u32,
                ..bytemuck::Zeroable::zeroed()
            };
            shape.launch_hidden(kernels, stream, &params, routed.next_begins)?;
            // Not before it: it begins early behind a router alone.
            self.count(stream, params.mask, inputs)?;
            dense.second(stream, &run)?;
            self.clear_invalid(stream, y, inputs)
        }
    }

    /// The router runs beside the first product, which does not need it and which `begin` launches.
    ///
    /// # Safety
    /// As for [`FfnPlan::run`], with a workspace at `base`.
    pub(super) unsafe fn run_masked_by(
        &self,
        dense: &Dense,
        begin: impl FnOnce(&DenseRun) -> Result<()>,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        base: u64,
    ) -> Result<()> {
        let device = self.ffn.device();
        let first = self.dense_run(y, inputs, self.op_workspace(base));
        let mut run = first;
        let mut route = |stream| {
            // SAFETY: the caller's promise.
            let routed = unsafe { self.route(stream, inputs, base, self.beside(base))? };
            // SAFETY: the caller's promise.
            unsafe { self.count(stream, routed.mask.address, inputs)? };
            run.mask = routed.mask.address;
            run.gates = routed.gates.map_or(0, |gates| gates.address);
            Ok(())
        };
        // SAFETY: the caller's promise.
        unsafe {
            if self.ffn.routes_beside(inputs.x.shape[0])
                && let Some(branch) = &self.branch
            {
                branch.run(stream, route, || begin(&first))?;
            } else {
                route(stream)?;
                begin(&first)?;
            }
            dense.finish(device, stream, &run)?;
            self.clear_invalid(stream, y, inputs)
        }
    }

    fn dense(&self) -> &Dense {
        self.dense.as_ref().expect("a plan that takes a dense path has tuned it")
    }

    /// A run without masks.
    fn dense_run(&self, y: View, inputs: &FfnInputs, op: Workspace) -> DenseRun {
        DenseRun {
            x: inputs.x.address,
            y: y.address,
            mask: 0,
            gates: 0,
            num_tokens: y.shape[0],
            workspace: op.address,
        }
    }

    /// Makes zeros of the rows that are padding.
    unsafe fn clear_invalid(&self, stream: RawStream, y: View, inputs: &FfnInputs) -> Result<()> {
        let Some(valid) = inputs.num_valid_tokens else { return Ok(()) };
        let [num_tokens, d_model] = y.shape;
        let params = moefy_clear_invalid_params {
            y: y.address,
            num_valid_tokens: valid.address,
            row_bytes: (d_model * y.format.bytes()) as u64,
            num_tokens: num_tokens as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { padding::clear_invalid(self.ffn.device(), stream, &params) }
    }
}
