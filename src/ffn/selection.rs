//! Selection rules as data: which experts run, given their scores.

use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// How a row of scores becomes a set of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SelectionRule {
    /// The `k` largest scores; of equal ones the lower expert id first.
    TopK {
        /// Experts per token.
        k: usize,
    },
    /// Every expert whose score is at least `rel_threshold` times the row's largest (D2DMoE,
    /// arXiv 2310.04361, section 3.3; the authors' code calls 1 − `rel_threshold` tau).
    DynamicK {
        /// τ in \[0, 1\]; 0 selects every expert.
        rel_threshold: f32,
    },
    /// The smallest prefix, in descending order of score, that holds this share of the row's sum.
    CumulativeShare {
        /// p in \[0, 1\].
        share: f32,
    },
}

/// A rule and an optional cap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Selection {
    /// The rule.
    #[serde(flatten)]
    pub rule: SelectionRule,
    /// At most this many experts: the best of those that the rule selects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_experts: Option<usize>,
}

/// By hand, because what serde derives for a flattened rule takes unknown keys and second rules.
impl<'de> Deserialize<'de> for Selection {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut keys = Map::deserialize(deserializer)?;
        let max_experts = keys.remove("max_experts").map_or(Ok(None), serde_json::from_value);
        let rule = serde_json::from_value(Value::Object(keys));
        let (rule, max_experts) =
            rule.and_then(|rule| Ok((rule, max_experts?))).map_err(D::Error::custom)?;
        Ok(Self { rule, max_experts })
    }
}

impl Selection {
    /// The most of so many experts that a token can get.
    pub fn most_experts(&self, num_experts: usize) -> usize {
        let of_rule = match self.rule {
            SelectionRule::TopK { k } => k.min(num_experts),
            _ => num_experts,
        };
        of_rule.min(self.max_experts.unwrap_or(num_experts))
    }

    /// Whether it puts a row in order as a whole.
    pub(crate) fn sorts(&self) -> bool {
        matches!(self.rule, SelectionRule::CumulativeShare { .. })
    }

    /// Top-k without a cap.
    pub fn top_k(k: usize) -> Self {
        Self { rule: SelectionRule::TopK { k }, max_experts: None }
    }

    /// Dynamic-k without a cap.
    pub const fn dynamic_k(rel_threshold: f32) -> Self {
        Self { rule: SelectionRule::DynamicK { rel_threshold }, max_experts: None }
    }

    /// Cumulative share without a cap.
    pub fn cumulative_share(share: f32) -> Self {
        Self { rule: SelectionRule::CumulativeShare { share }, max_experts: None }
    }

    /// The same rule, stricter for exponents below 1 and laxer for those above: τ becomes τ^exponent,
    /// and p becomes p^(1/exponent). Top-k stays.
    pub fn raised(self, exponent: f32) -> Self {
        let rule = match self.rule {
            SelectionRule::TopK { k } => SelectionRule::TopK { k },
            SelectionRule::DynamicK { rel_threshold } => {
                SelectionRule::DynamicK { rel_threshold: rel_threshold.powf(exponent) }
            }
            SelectionRule::CumulativeShare { share } => {
                SelectionRule::CumulativeShare { share: share.powf(exponent.recip()) }
            }
        };
        Self { rule, ..self }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// When k is 0 or exceeds `num_experts`, τ or p is outside \[0, 1\], or the cap is 0.
    pub fn check(&self, num_experts: usize) -> Result<()> {
        let unit = |name: &str, value: f32| {
            if (0.0..=1.0).contains(&value) {
                return Ok(());
            }
            Err(Error::argument("select", name, "between 0 and 1", value))
        };
        match self.rule {
            SelectionRule::TopK { k } if k == 0 || k > num_experts => {
                let expected = format!("between 1 and num_experts = {num_experts}");
                return Err(Error::argument("select", "k", expected, k));
            }
            SelectionRule::TopK { .. } => {}
            SelectionRule::DynamicK { rel_threshold } => unit("rel_threshold", rel_threshold)?,
            SelectionRule::CumulativeShare { share } => unit("share", share)?,
        }
        if self.max_experts == Some(0) {
            return Err(Error::argument("select", "max_experts", "at least 1", 0));
        }
        Ok(())
    }
}

/// The factor of a selected expert's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// 1: the experts of a dense layer, as in MoEfication and D2DMoE.
    #[default]
    One,
    /// The router's score.
    Score,
    /// Softmax of the scores over all experts.
    Softmax,
    /// Softmax divided by its sum over the selected experts.
    Renormalised,
}
