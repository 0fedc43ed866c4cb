//! A dense feed-forward network as data.

use super::Activation;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, TensorRef};

/// The tensors of one FFN as models store them (`nn.Linear` weights are \[out, in\]; use
/// [`TensorRef::transposed`] for a model that stores \[in, out\]).
///
/// Plain: `y = W2 φ(W1 x + b1) + b2`. With `gate` it is a GLU:
/// `y = W2 (φ(Wg x + bg) ⊙ (W1 x + b1)) + b2`, where W1 is the "up" projection.
#[derive(Clone, Copy, Debug)]
pub struct FfnTensors<'a> {
    /// Wg \[d_ff, d_model\], for a GLU.
    pub gate: Option<TensorRef<'a>>,
    /// bg \[d_ff\], for a GLU.
    pub gate_bias: Option<TensorRef<'a>>,
    /// W1 \[d_ff, d_model\]; for a GLU the up projection.
    pub input: TensorRef<'a>,
    /// b1 \[d_ff\].
    pub input_bias: Option<TensorRef<'a>>,
    /// W2 \[d_model, d_ff\].
    pub output: TensorRef<'a>,
    /// b2 \[d_model\].
    pub output_bias: Option<TensorRef<'a>>,
}

impl<'a> FfnTensors<'a> {
    /// A plain FFN without biases; set the others with struct update syntax.
    pub fn plain(input: TensorRef<'a>, output: TensorRef<'a>) -> Self {
        Self { gate: None, gate_bias: None, input, input_bias: None, output, output_bias: None }
    }

    /// A GLU without biases.
    pub fn glu(gate: TensorRef<'a>, up: TensorRef<'a>, down: TensorRef<'a>) -> Self {
        Self { gate: Some(gate), ..Self::plain(up, down) }
    }
}

/// A dense FFN, neuron-major: every neuron's input row and its output row are contiguous in
/// `d_model`, so that any order of the neurons computes the same function.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseFfn {
    activation: Activation,
    glu: bool,
    w_in: Tensor,
    b_in: Option<Tensor>,
    w_out: Tensor,
    b_out: Option<Tensor>,
}

impl DenseFfn {
    /// Copies the tensors of one FFN into neuron-major order.
    ///
    /// # Errors
    /// When shapes or dtypes do not fit together, when a bias of a gate comes without a gate, or
    /// when a weight is NaN or infinite. The error names the tensor, the expected and the found.
    pub fn new(activation: Activation, tensors: FfnTensors<'_>) -> Result<Self> {
        let [d_ff, d_model] = tensors.input.shape();
        let dtype = tensors.input.dtype();
        let check = |name: &str, t: Option<TensorRef<'_>>, shape: [usize; 2]| match t {
            Some(t) if t.shape() != shape => Err(mismatch(name, shape, t.shape())),
            Some(t) if t.dtype() != dtype => Err(Error::argument(
                "ffn",
                name,
                format!("{dtype}, as the input weight"),
                t.dtype(),
            )),
            _ => Ok(()),
        };
        if tensors.gate.is_none() && tensors.gate_bias.is_some() {
            return Err(Error::argument(
                "ffn",
                "gate bias",
                "absent where there is no gate",
                "one",
            ));
        }
        check("gate weight", tensors.gate, [d_ff, d_model])?;
        check("gate bias", tensors.gate_bias, [1, d_ff])?;
        check("input bias", tensors.input_bias, [1, d_ff])?;
        check("output weight", Some(tensors.output), [d_model, d_ff])?;
        check("output bias", tensors.output_bias, [1, d_model])?;

        let glu = tensors.gate.is_some();
        let b_in = match (glu, tensors.gate_bias, tensors.input_bias) {
            (_, None, None) => None,
            (false, _, bias) => bias.map(|b| b.to_owned()),
            (true, gate, up) => {
                let zeros = Tensor::vector(vec![0.0f32; d_ff]).to_dtype(dtype);
                let or_zeros = |b: Option<TensorRef<'_>>| b.map_or(zeros.clone(), |b| b.to_owned());
                Some(stack_cols(&or_zeros(gate), &or_zeros(up)))
            }
        };
        let w_in = match tensors.gate {
            Some(gate) => stack_rows(&gate.to_owned(), &tensors.input.to_owned()),
            None => tensors.input.to_owned(),
        };
        Self::from_neuron_major(
            activation,
            glu,
            w_in,
            b_in,
            tensors.output.transposed().to_owned(),
            tensors.output_bias.map(|b| b.to_owned()),
        )
    }

    /// Takes over arrays that are neuron-major already: `w_in` \[G·d_ff, d_model\] with G = 2 for a
    /// GLU (gate rows first) and 1 otherwise, `b_in` \[G·d_ff\], `w_out` = W2ᵀ \[d_ff, d_model\],
    /// `b_out` \[d_model\].
    ///
    /// # Errors
    /// When shapes or dtypes do not fit together, a size is zero, or a value is NaN or infinite.
    pub fn from_neuron_major(
        activation: Activation,
        glu: bool,
        w_in: Tensor,
        b_in: Option<Tensor>,
        w_out: Tensor,
        b_out: Option<Tensor>,
    ) -> Result<Self> {
        let [d_ff, d_model] = w_out.shape();
        if d_ff == 0 || d_model == 0 {
            let expected = "of at least one neuron and a token width of at least 1";
            let got = format!("d_ff = {d_ff} and d_model = {d_model}");
            return Err(Error::argument("ffn", "weights", expected, got));
        }
        let rows = if glu { 2 * d_ff } else { d_ff };
        let named = [
            ("input weight", Some(&w_in), [rows, d_model]),
            ("input bias", b_in.as_ref(), [1, rows]),
            ("output weight", Some(&w_out), [d_ff, d_model]),
            ("output bias", b_out.as_ref(), [1, d_model]),
        ];
        for (name, tensor, shape) in named {
            let Some(tensor) = tensor else { continue };
            if tensor.shape() != shape {
                return Err(mismatch(name, shape, tensor.shape()));
            }
            if tensor.dtype() != w_in.dtype() {
                let expected = format!("{}, as the input weight", w_in.dtype());
                return Err(Error::argument("ffn", name, expected, tensor.dtype()));
            }
            if let Some(([r, c], value)) = tensor.first_non_finite() {
                let got = format!("{value} at [{r}, {c}]");
                return Err(Error::argument("ffn", name, "finite everywhere", got));
            }
        }
        Ok(Self { activation, glu, w_in, b_in, w_out, b_out })
    }

    /// The same with every element rounded to another type.
    ///
    /// # Errors
    /// When a value is too large for it.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let rounded = |tensor: &Tensor| tensor.to_dtype(dtype);
        Self::from_neuron_major(
            self.activation,
            self.glu,
            rounded(&self.w_in),
            self.b_in.as_ref().map(rounded),
            rounded(&self.w_out),
            self.b_out.as_ref().map(rounded),
        )
    }

    /// φ.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Whether this is a gated FFN.
    pub fn is_glu(&self) -> bool {
        self.glu
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.w_out.shape()[1]
    }

    /// Number of neurons.
    pub fn d_ff(&self) -> usize {
        self.w_out.shape()[0]
    }

    /// Element format of all weights.
    pub fn dtype(&self) -> DType {
        self.w_in.dtype()
    }

    /// \[G·d_ff, d_model\]; G = 2 for a GLU: the gate rows, then the up rows.
    pub fn w_in(&self) -> &Tensor {
        &self.w_in
    }

    /// \[G·d_ff\].
    pub fn b_in(&self) -> Option<&Tensor> {
        self.b_in.as_ref()
    }

    /// W2ᵀ \[d_ff, d_model\].
    pub fn w_out(&self) -> &Tensor {
        &self.w_out
    }

    /// b2 \[d_model\].
    pub fn b_out(&self) -> Option<&Tensor> {
        self.b_out.as_ref()
    }

    /// Multiply-adds of one token.
    pub fn macs_per_token(&self) -> u64 {
        (self.w_in.len() + self.w_out.len()) as u64
    }

    /// The same function with its neurons in another order: neuron i of the result is neuron
    /// `order[i]`.
    pub(crate) fn reordered(&self, order: &[u32]) -> Self {
        let d_ff = self.d_ff() as u32;
        let input_rows: Vec<u32> = if self.glu {
            order.iter().copied().chain(order.iter().map(|&n| d_ff + n)).collect()
        } else {
            order.to_vec()
        };
        Self {
            activation: self.activation,
            glu: self.glu,
            w_in: self.w_in.gather_rows(&input_rows),
            b_in: self.b_in.as_ref().map(|b| b.gather_cols(&input_rows)),
            w_out: self.w_out.gather_rows(order),
            b_out: self.b_out.clone(),
        }
    }
}

fn mismatch(name: &str, expected: [usize; 2], got: [usize; 2]) -> Error {
    Error::argument("ffn", name, format!("of shape {expected:?}"), format!("{got:?}"))
}

fn stack_rows(top: &Tensor, bottom: &Tensor) -> Tensor {
    let [rows, cols] = top.shape();
    let bytes = [top.as_bytes(), bottom.as_bytes()].concat();
    TensorRef::from_bytes(top.dtype(), &bytes, [rows + bottom.shape()[0], cols])
        .expect("sizes add up")
        .to_owned()
}

fn stack_cols(left: &Tensor, right: &Tensor) -> Tensor {
    stack_rows(&left.transposed(), &right.transposed()).transposed()
}
