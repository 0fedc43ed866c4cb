//! A MoEfied FFN on a device.

use std::sync::Arc;

use super::dense::{DenseLayer, Masked};
use super::neurons::Neurons;
use super::view::{Arguments, Format, View};
use super::{Buffer, Device, DeviceRouter, LayerShape, RouterView, ffn_few};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{self, Compensation, Gate, Router, Selection};
use crate::tensor::Tensor;

/// A MoEfied FFN, its weights on a device. [`plan`](Self::plan) makes it ready to run.
pub struct MoeFfn {
    device: Arc<Device>,
    dtype: DType,
    shape: LayerShape,
    neurons: Neurons,
    /// b1, b2, and b2 with the constant of a compensation, of the weights' element type, or null.
    biases: [u64; 3],
    router: DeviceRouter,
    /// The second layer of the router in bf16, as [`ffn_few`] takes it, or null.
    pub(super) few_w2: u64,
    selection: Selection,
    gate: Gate,
    calibrated_density: Option<f64>,
    /// What the addresses lead to.
    _buffers: Vec<Buffer>,
}

/// Copies to the device and remembers what it copied.
struct Upload<'a> {
    device: &'a Device,
    buffers: Vec<Buffer>,
}

impl Upload<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<u64> {
        self.buffers.push(Buffer::from_slice(self.device, bytes)?);
        Ok(self.buffers.last().expect("just pushed").address())
    }

    /// The rows of both, one below the other.
    fn stacked(&mut self, top: &Tensor, bottom: Option<&Tensor>) -> Result<View> {
        let bottom = bottom.map(|bottom| bottom.to_dtype(top.dtype()));
        let bottom_bytes = bottom.as_ref().map_or(&[][..], Tensor::as_bytes);
        let address = self.bytes(&[top.as_bytes(), bottom_bytes].concat())?;
        let rows = top.shape()[0] + bottom.map_or(0, |bottom| bottom.shape()[0]);
        Ok(View::matrix(address, Format::Float(top.dtype()), [rows, top.shape()[1]]))
    }

    fn f32(&mut self, vector: &[f32]) -> Result<View> {
        let address = self.bytes(bytemuck::cast_slice(vector))?;
        Ok(View::vector(address, Format::F32, vector.len()))
    }
}

impl MoeFfn {
    /// Copies a layer to the device; router and compensation are rounded to the weights' element
    /// type.
    ///
    /// # Errors
    /// When d_model is no multiple of 8, or the device has too little memory.
    pub fn new(device: &Arc<Device>, ffn: &ffn::MoeFfn) -> Result<Self> {
        let dense = ffn.neurons();
        let dtype = dense.dtype();
        let mut upload = Upload { device, buffers: Vec::new() };
        let (v, u) = match ffn.compensation() {
            Some(Compensation::Linear { u, v, .. }) => (Some(v), Some(u)),
            _ => (None, None),
        };
        let mean = match ffn.compensation() {
            Some(Compensation::Mean { mean }) => Some(mean.to_f32()),
            _ => None,
        };
        let constant = constant_output(ffn);
        let neurons = Neurons {
            w_in: upload.stacked(dense.w_in(), v)?,
            w_out: upload.stacked(dense.w_out(), u)?,
            b_in: dense.b_in().map(|b| upload.f32(&b.to_f32())).transpose()?,
            b_out: constant.as_ref().map(|b| upload.f32(&b.to_f32())).transpose()?,
            mean: mean.map(|mean| upload.f32(&mean)).transpose()?,
            num_experts: ffn.num_experts(),
            expert_width: ffn.expert_width(),
            shared: ffn.shared(),
            rank: v.map_or(0, |v| v.shape()[0]),
            glu: dense.is_glu(),
            activation: dense.activation(),
        };
        let constant = constant.map(|b| b.to_dtype(dtype));
        let mut biases = [0; 3];
        let of_layer = [dense.b_in(), dense.b_out(), constant.as_ref()];
        for (bias, tensor) in biases.iter_mut().zip(of_layer) {
            *bias = tensor.map_or(Ok(0), |b| upload.bytes(b.as_bytes()))?;
        }
        neurons.check(&Arguments { device, op: "moe_ffn" })?;
        let router = DeviceRouter::new(device, ffn.router(), dtype)?;
        let few_w2 = match (ffn.router(), router.view(), dtype) {
            (_, RouterView::Mlp { w2, .. }, DType::BF16) => w2.address,
            (Router::Mlp { w2, .. }, _, DType::F16) => {
                let w2 = w2.to_dtype(dtype);
                let parts = ffn_few::parts_of_f16(bytemuck::cast_slice(w2.as_bytes()));
                upload.bytes(bytemuck::cast_slice(&parts))?
            }
            _ => 0,
        };
        Ok(Self {
            dtype,
            shape: LayerShape::of(ffn),
            neurons,
            biases,
            router,
            few_w2,
            selection: ffn.selection(),
            gate: ffn.gate(),
            calibrated_density: ffn.calibrated_density(),
            _buffers: upload.buffers,
            device: device.clone(),
        })
    }

    /// The same layer in memory of its own, copied on the device. `router` is the one it was made of.
    #[cfg(feature = "cuda")]
    pub(super) fn copy(&self, router: &Router) -> Result<Self> {
        let buffers = self._buffers.iter().map(Buffer::copy).collect::<Result<Vec<_>>>()?;
        let moved = |address: u64| {
            let pairs = self._buffers.iter().zip(&buffers);
            pairs.filter(|(old, _)| old.address() == address).map(|(_, new)| new.address()).sum()
        };
        let view = |view: View| View { address: moved(view.address), ..view };
        let neurons = Neurons {
            w_in: view(self.neurons.w_in),
            w_out: view(self.neurons.w_out),
            b_in: self.neurons.b_in.map(view),
            b_out: self.neurons.b_out.map(view),
            mean: self.neurons.mean.map(view),
            ..self.neurons
        };
        let router = DeviceRouter::new(&self.device, router, self.dtype)?;
        let few_w2 = match (self.router.view(), router.view()) {
            (RouterView::Mlp { w2: old, .. }, RouterView::Mlp { w2, .. })
                if old.address == self.few_w2 =>
            {
                w2.address
            }
            _ => moved(self.few_w2),
        };
        Ok(Self {
            dtype: self.dtype,
            shape: self.shape,
            neurons,
            biases: self.biases.map(moved),
            router,
            few_w2,
            selection: self.selection,
            gate: self.gate,
            calibrated_density: self.calibrated_density,
            device: self.device.clone(),
            _buffers: buffers,
        })
    }

    /// Another selection, for plans that are made from now on.
    #[cfg(feature = "cuda")]
    pub(super) fn set_selection(&mut self, selection: Selection) -> Result<()> {
        selection.check(self.neurons.num_experts)?;
        self.selection = selection;
        Ok(())
    }

    /// Where the weights are.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The weights, valid as long as `self`.
    pub fn neurons(&self) -> &Neurons {
        &self.neurons
    }

    /// The router, valid as long as `self`.
    pub fn router(&self) -> &DeviceRouter {
        &self.router
    }

    /// Element type of weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What measured times are kept by.
    pub(super) fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// The selection rule.
    pub fn selection(&self) -> Selection {
        self.selection
    }

    /// The gate.
    pub fn gate(&self) -> Gate {
        self.gate
    }

    /// Executed neurons / d_ff on average, if it is known.
    pub fn calibrated_density(&self) -> Option<f64> {
        self.calibrated_density
    }

    /// Whether a plan for one is a plan for the other.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let sizes = |ffn: &Self| {
            let n = &ffn.neurons;
            let optional = [n.b_in.is_some(), n.b_out.is_some(), n.mean.is_some(), n.glu];
            let numbers = [n.num_experts, n.expert_width, n.shared, n.rank, n.d_model()];
            (optional, numbers, n.activation, ffn.dtype, ffn.selection, ffn.gate)
        };
        let router = |ffn: &Self| (ffn.router.view().hidden(), ffn.router.view().num_experts());
        Arc::ptr_eq(&self.device, &other.device)
            && sizes(self) == sizes(other)
            && router(self) == router(other)
    }

    /// The original FFN.
    pub(super) fn exact(&self) -> Result<DenseLayer> {
        let neurons = Neurons { mean: None, b_out: None, ..self.neurons };
        let mut layer = self.dense_layer(&neurons, self.biases[1], false)?;
        layer.neurons.rank = 0;
        Ok(layer)
    }

    /// The function of the experts under masks.
    pub(super) fn masked(&self) -> Result<DenseLayer> {
        self.dense_layer(&self.neurons, self.biases[2], true)
    }

    fn dense_layer(&self, neurons: &Neurons, bias_out: u64, masked: bool) -> Result<DenseLayer> {
        let check = Arguments { device: &self.device, op: "moe_ffn" };
        let (neurons, dtype) = neurons.check(&check)?;
        let masked =
            masked.then(|| if self.gate() == Gate::One { Masked::Plain } else { Masked::Gated });
        let activation = self.neurons.activation;
        Ok(DenseLayer { neurons, dtype, activation, bias_in: self.biases[0], bias_out, masked })
    }
}

/// b2 with what a compensation adds to every token: W2 μ, or c. `None`: zero.
fn constant_output(ffn: &ffn::MoeFfn) -> Option<Tensor> {
    let dense = ffn.neurons();
    let d_model = dense.d_model();
    let mut sum = dense.b_out().map_or_else(|| vec![0.0; d_model], Tensor::to_f64);
    match ffn.compensation() {
        None => return dense.b_out().cloned(),
        Some(Compensation::Linear { c, .. }) => {
            sum.iter_mut().zip(c.to_f64()).for_each(|(sum, c)| *sum += c);
        }
        Some(Compensation::Mean { mean }) => {
            let w_out = dense.w_out().to_f64();
            for (mean, row) in mean.to_f64().iter().zip(w_out.chunks_exact(d_model)) {
                sum.iter_mut().zip(row).for_each(|(sum, w)| *sum += mean * w);
            }
        }
    }
    Some(Tensor::vector(sum.into_iter().map(|v| v as f32).collect::<Vec<f32>>()))
}
