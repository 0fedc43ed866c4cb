//! A MoEfied FFN as data.

use super::{Compensation, DenseFfn, Gate, Partition, Router, Selection};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// One FFN split into experts, with everything that decides which of them run:
///
/// `y[t] = b2 + shared(x[t]) + Σ_{e ∈ S(t)} g[t,e] · expert_e(x[t])`
///
/// The arrays are those of the dense FFN with its neurons in expert order, so expert e is the slice
/// of `expert_width` neurons that starts at e · `expert_width`, and the dense FFN runs on the same
/// copy.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeFfn {
    neurons: DenseFfn,
    partition: Partition,
    router: Router,
    selection: Selection,
    gate: Gate,
    compensation: Option<Compensation>,
    calibrated_density: Option<f64>,
}

impl MoeFfn {
    /// Splits a dense FFN: its neurons are copied into the partition's expert order. The gate is
    /// [`Gate::One`] and there is no compensation.
    ///
    /// # Errors
    /// When partition, router or selection do not fit the FFN.
    pub fn new(
        dense: &DenseFfn,
        partition: Partition,
        router: Router,
        selection: Selection,
    ) -> Result<Self> {
        check_size(dense, &partition)?;
        let neurons = dense.reordered(&partition.order());
        Self::from_expert_order(neurons, partition, router, selection)
    }

    /// Takes over an FFN whose neurons are in the partition's expert order already.
    ///
    /// # Errors
    /// When partition, router or selection do not fit the FFN.
    pub fn from_expert_order(
        neurons: DenseFfn,
        partition: Partition,
        router: Router,
        selection: Selection,
    ) -> Result<Self> {
        check_size(&neurons, &partition)?;
        router.check(partition.num_experts(), neurons.d_model())?;
        selection.check(partition.num_experts())?;
        let gate = Gate::default();
        Ok(Self {
            neurons,
            partition,
            router,
            selection,
            gate,
            compensation: None,
            calibrated_density: None,
        })
    }

    /// The same layer with its neurons rounded to another element type.
    ///
    /// # Errors
    /// When a value is too large for it.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self { neurons: self.neurons.to_dtype(dtype)?, ..self.clone() })
    }

    /// The same layer with another gate.
    pub fn with_gate(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// The same layer with another selection, whose density is not known: what `retune` does.
    ///
    /// # Errors
    /// When the selection does not fit the number of experts.
    pub fn with_selection(self, selection: Selection) -> Result<Self> {
        selection.check(self.num_experts())?;
        Ok(Self { selection, calibrated_density: None, ..self })
    }

    /// The same layer, of which it is known how much of it its selection runs on average: a plan goes by it when it chooses a
    /// path, and nothing else does.
    pub fn with_calibrated_density(self, density: f64) -> Self {
        Self { calibrated_density: Some(density), ..self }
    }

    /// Executed neurons / d_ff on average, if it is known.
    pub fn calibrated_density(&self) -> Option<f64> {
        self.calibrated_density
    }

    /// The same layer with a compensation.
    ///
    /// # Errors
    /// When its tensors do not fit the layer.
    pub fn with_compensation(self, compensation: Compensation) -> Result<Self> {
        compensation.check(self.neurons.d_ff(), self.neurons.d_model())?;
        Ok(Self { compensation: Some(compensation), ..self })
    }

    /// All neurons, in expert order: the dense FFN on the same copy.
    pub fn neurons(&self) -> &DenseFfn {
        &self.neurons
    }

    /// The dense FFN in its original neuron order, bit for bit.
    pub fn to_dense(&self) -> DenseFfn {
        self.neurons.reordered(&self.partition.slots())
    }

    /// The split.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// The router.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The selection rule.
    pub fn selection(&self) -> Selection {
        self.selection
    }

    /// The gate.
    pub fn gate(&self) -> Gate {
        self.gate
    }

    /// The compensation.
    pub fn compensation(&self) -> Option<&Compensation> {
        self.compensation.as_ref()
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.partition.num_experts()
    }

    /// s.
    pub fn expert_width(&self) -> usize {
        self.partition.expert_width()
    }

    /// Neurons that every token runs.
    pub fn shared(&self) -> usize {
        self.partition.shared()
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.neurons.d_model()
    }

    /// Number of neurons.
    pub fn d_ff(&self) -> usize {
        self.neurons.d_ff()
    }

    /// Multiply-adds of one token that runs `mean_k` experts on average, router and compensation
    /// included.
    pub fn macs_per_token(&self, mean_k: f64) -> f64 {
        let neuron = self.neurons.macs_per_token() as f64 / self.d_ff() as f64;
        let executed = self.shared() as f64 + mean_k * self.expert_width() as f64;
        let compensation = self.compensation.as_ref().map_or(0, Compensation::macs_per_token);
        executed * neuron + (self.router.macs_per_token() + compensation) as f64
    }

    /// ρ: executed neurons / d_ff of tokens that run `mean_k` experts on average.
    pub fn density(&self, mean_k: f64) -> f64 {
        self.partition.density(mean_k)
    }
}

fn check_size(neurons: &DenseFfn, partition: &Partition) -> Result<()> {
    if neurons.d_ff() == partition.d_ff() {
        return Ok(());
    }
    let expected = format!("one for each of the {} neurons", neurons.d_ff());
    Err(Error::argument("partition", "labels", expected, partition.d_ff()))
}
