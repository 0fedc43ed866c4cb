//! Which expert every neuron belongs to.

use crate::error::{Error, Result};

/// A split of `d_ff` neurons into `num_experts` experts of equal width and, optionally, neurons
/// that every token runs (`shared`).
///
/// Slot j of expert e is the j-th smallest neuron index with label e; the shared neurons come last,
/// in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    num_experts: usize,
    expert_width: usize,
    labels: Vec<u32>,
}

impl Partition {
    /// A partition from one label per neuron: the neuron's expert, or `num_experts` for a shared
    /// neuron.
    ///
    /// # Errors
    /// When there is no expert, when a label is out of range, or when the experts differ in width.
    pub fn new(num_experts: usize, labels: Vec<u32>) -> Result<Self> {
        if num_experts == 0 || num_experts > labels.len() {
            let expected = format!("between 1 and the number of neurons, {}", labels.len());
            return Err(Error::argument("partition", "num_experts", expected, num_experts));
        }
        let mut widths = vec![0usize; num_experts + 1];
        for (neuron, &label) in labels.iter().enumerate() {
            let Some(width) = widths.get_mut(label as usize) else {
                let expected = format!("labels of at most {num_experts} (a shared neuron)");
                let got = format!("{label} for neuron {neuron}");
                return Err(Error::argument("partition", "labels", expected, got));
            };
            *width += 1;
        }
        let expert_width = widths[0];
        for (expert, &width) in widths[..num_experts].iter().enumerate() {
            if width != expert_width || width == 0 {
                let got = format!("{expert_width} for expert 0 and {width} for expert {expert}");
                let expected = "experts of one width, at least 1 neuron";
                return Err(Error::argument("partition", "labels", expected, got));
            }
        }
        Ok(Self { num_experts, expert_width, labels })
    }

    /// The width that `num_experts` equal experts have beside `shared` shared neurons.
    ///
    /// # Errors
    /// When `num_experts` is 0 or does not divide `d_ff - shared`.
    pub fn width_of_experts(d_ff: usize, num_experts: usize, shared: usize) -> Result<usize> {
        let routed = d_ff.checked_sub(shared).filter(|&routed| routed > 0).ok_or_else(|| {
            Error::argument("partition", "shared", format!("less than d_ff = {d_ff}"), shared)
        })?;
        if num_experts == 0 || routed % num_experts != 0 {
            // A damaged file can ask for 2^62 neurons: the way to the next divisor may be long.
            const FURTHEST: usize = 1 << 20;
            let divides = |&n: &usize| routed.is_multiple_of(n);
            let end = num_experts.min(routed.saturating_add(1));
            let below = (1..end).rev().take(FURTHEST).find(divides);
            let above = (num_experts.saturating_add(1)..=routed).take(FURTHEST).find(divides);
            let near: Vec<String> =
                below.into_iter().chain(above).map(|near| near.to_string()).collect();
            let mut expected = format!("a divisor of the {routed} routed neurons");
            if !near.is_empty() {
                expected = format!("{expected}, such as {}", near.join(" or "));
            }
            return Err(Error::argument("partition", "num_experts", expected, num_experts));
        }
        Ok(routed / num_experts)
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// s, the neurons of one expert.
    pub fn expert_width(&self) -> usize {
        self.expert_width
    }

    /// Number of neurons.
    pub fn d_ff(&self) -> usize {
        self.labels.len()
    }

    /// Number of neurons that every token runs.
    pub fn shared(&self) -> usize {
        self.labels.len() - self.num_experts * self.expert_width
    }

    /// ρ: executed neurons / d_ff of tokens that run `mean_k` experts on average.
    pub fn density(&self, mean_k: f64) -> f64 {
        (self.shared() as f64 + mean_k * self.expert_width as f64) / self.d_ff() as f64
    }

    /// The inverse of [`density`](Self::density).
    pub fn mean_k(&self, density: f64) -> f64 {
        (density * self.d_ff() as f64 - self.shared() as f64) / self.expert_width as f64
    }

    /// One label per neuron; `num_experts` marks a shared one.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// The neurons in expert order: entry i is the original index of the neuron in slot i.
    pub fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.labels.len() as u32).collect();
        // Stable, so that slots of one expert stay in ascending neuron order.
        order.sort_by_key(|&neuron| self.labels[neuron as usize]);
        order
    }

    /// The inverse of [`order`](Self::order): entry n is the slot of original neuron n.
    pub fn slots(&self) -> Vec<u32> {
        let mut slots = vec![0; self.labels.len()];
        for (slot, neuron) in self.order().into_iter().enumerate() {
            slots[neuron as usize] = slot as u32;
        }
        slots
    }
}
