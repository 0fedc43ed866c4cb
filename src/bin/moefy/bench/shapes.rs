//! Layers on the command line.

use moefy::cuda::LayerShape;
use moefy::ffn::Activation;
use moefy::{DType, Result};

/// d_model, d_ff and whether it is a GLU, of layers that models have.
const LAYERS: [(usize, usize, bool); 4] =
    [(384, 1536, false), (768, 3072, false), (1024, 4096, false), (4096, 14336, true)];

/// Layers that a command measures.
#[derive(clap::Args)]
pub struct Layers {
    /// Layers by name: d768-e96 has the d_model 768 of BERT and 96 experts; also d384, d1024, d4096
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = named)]
    #[arg(conflicts_with_all = ["d_model", "d_ff", "experts", "glu"])]
    named: Vec<LayerShape>,
    /// Width of a token
    #[arg(long, value_name = "D", requires_all = ["d_ff", "experts"])]
    d_model: Option<usize>,
    /// Neurons
    #[arg(long, value_name = "F", requires_all = ["d_model", "experts"])]
    d_ff: Option<usize>,
    /// A gated layer
    #[arg(long, requires = "d_model")]
    glu: bool,
    /// Experts, which share the neurons equally
    #[arg(long, value_name = "E", requires_all = ["d_model", "d_ff"])]
    experts: Option<usize>,
    /// Neurons that every token runs
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared: usize,
    /// relu, gelu, gelu_tanh, silu or identity [default: gelu_tanh, of a gated layer silu]
    #[arg(long, value_name = "NAME", value_parser = activation)]
    activation: Option<Activation>,
    /// linear, or d2dmoe-N with N hidden units
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = router_hidden)]
    #[arg(default_value = "d2dmoe-128")]
    router: Vec<usize>,
}

impl Layers {
    /// All of them in each of these types.
    pub fn shapes(&self, dtypes: &[DType]) -> Result<Vec<LayerShape>> {
        let own = || {
            let num_experts = self.experts?;
            Some(layer(self.d_model?, self.d_ff?, self.glu, num_experts))
        };
        let shapes: Vec<LayerShape> = self.named.iter().copied().chain(own()).collect();
        let mut layers = Vec::new();
        for shape in shapes {
            let activation = self.activation.unwrap_or(shape.activation);
            for &dtype in dtypes {
                for &router_hidden in &self.router {
                    let shared = self.shared;
                    let layer = LayerShape { activation, dtype, router_hidden, shared, ..shape };
                    layer.expert_width()?;
                    layers.push(layer);
                }
            }
        }
        Ok(layers)
    }
}

fn activation(name: &str) -> Result<Activation, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

pub fn tokens(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&tokens| tokens > 0).ok_or("expected a positive number".into())
}

pub fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or("expected a number between 0 and 1".into())
}

/// `d768-e96`: the layer of models with this d_model, split into so many experts.
pub fn named(name: &str) -> Result<LayerShape, String> {
    let sizes = name.strip_prefix('d').and_then(|rest| rest.split_once("-e"));
    let sizes = sizes.and_then(|(d, e)| Some((d.parse::<usize>().ok()?, e.parse().ok()?)));
    let found = sizes.and_then(|(d_model, num_experts)| {
        let layer = LAYERS.into_iter().find(|(d, ..)| *d == d_model)?;
        Some((layer, num_experts))
    });
    let Some(((d_model, d_ff, glu), num_experts)) = found else {
        let known = LAYERS.map(|(d, ..)| format!("d{d}-eN")).join(", ");
        return Err(format!("expected one of {known}, with a number of experts as N"));
    };
    let shape = layer(d_model, d_ff, glu, num_experts);
    shape.expert_width().map_err(|error| error.to_string())?;
    Ok(shape)
}

/// A layer in bf16 with a D2DMoE router of 128 hidden units.
pub fn layer(d_model: usize, d_ff: usize, glu: bool, num_experts: usize) -> LayerShape {
    LayerShape {
        d_model,
        d_ff,
        glu,
        // The only GELU that cuBLASLt fuses; what GLUs have.
        activation: if glu { Activation::Silu } else { Activation::GeluTanh },
        num_experts,
        shared: 0,
        rank: 0,
        dtype: DType::BF16,
        router_hidden: 128,
    }
}

/// `linear`, or `d2dmoe-` and the hidden units, which are returned; 0 for linear.
pub fn router_hidden(name: &str) -> Result<usize, String> {
    if name == "linear" {
        return Ok(0);
    }
    let hidden = name.strip_prefix("d2dmoe-").and_then(|hidden| hidden.parse().ok());
    hidden
        .filter(|&hidden| hidden > 0)
        .ok_or("expected linear or d2dmoe-N, such as d2dmoe-128".into())
}

/// What a layer is called where the columns are few.
pub fn label(d_model: usize, d_ff: usize, glu: bool, num_experts: usize) -> String {
    let glu = if glu { " GLU" } else { "" };
    format!("d{d_model} F{d_ff}{glu} E{num_experts}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layers() {
        let shape = named("d768-e96").unwrap();
        assert_eq!((shape.d_ff, shape.glu, shape.expert_width().unwrap()), (3072, false, 32));
        let shape = named("d4096-e448").unwrap();
        assert_eq!((shape.d_ff, shape.glu, shape.expert_width().unwrap()), (14336, true, 32));
        assert!(named("d768-e7").unwrap_err().contains("3072"));
        for wrong in ["", "d768", "d5-e1", "d768-e", "768-e96"] {
            assert!(named(wrong).unwrap_err().contains("d768-eN"), "{wrong}");
        }
        assert_eq!((router_hidden("linear"), router_hidden("d2dmoe-64")), (Ok(0), Ok(64)));
        assert!(router_hidden("d2dmoe-0").is_err());
    }
}
