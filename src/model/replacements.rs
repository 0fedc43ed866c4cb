//! Which tensors take the place of which when a model is converted or restored.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::Dtype;

use super::format::LayerConfig;
use super::{ConvertedLayer, Folder, ffn_tensors};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::DenseFfn;
use crate::tensor::{Tensor, TensorRef};

/// A tensor of the new weights.
pub(super) struct Planned<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub content: Content<'a>,
}

pub(super) enum Content<'a> {
    Bytes(Cow<'a, [u8]>),
    /// Elements that are rounded to another format when their turn comes.
    Rounded(TensorRef<'a>, DType),
    /// Part of the FFN of a layer, which is made when its turn comes.
    Neurons(usize, Part),
}

#[derive(Clone, Copy)]
pub(super) enum Part {
    Input,
    InputBias,
    Output,
    OutputTransposed,
    OutputBias,
}

impl Part {
    pub fn of(self, ffn: &DenseFfn) -> Cow<'_, Tensor> {
        let bias = |bias| Cow::Borrowed(Option::expect(bias, "FFNs of folders have biases"));
        match self {
            Self::Input => Cow::Borrowed(ffn.w_in()),
            Self::InputBias => bias(ffn.b_in()),
            Self::Output => Cow::Owned(ffn.w_out().transposed()),
            Self::OutputTransposed => Cow::Borrowed(ffn.w_out()),
            Self::OutputBias => bias(ffn.b_out()),
        }
    }
}

/// What takes the place of each dense tensor of a converted layer, so that it stays in its shard.
pub(super) fn moefied<'a>(
    source: &Folder,
    layer: &'a ConvertedLayer,
    record: &LayerConfig,
) -> Result<Vec<(String, Vec<Planned<'a>>)>> {
    let config = source.config();
    if layer.partition.d_ff() != config.intermediate_size {
        let expected = format!("one for each of the {} neurons", config.intermediate_size);
        return Err(Error::argument("convert", "labels", expected, layer.partition.d_ff()));
    }
    layer.router.check(record.num_experts, config.hidden_size)?;
    if let Some(compensation) = &layer.compensation {
        compensation.check(config.intermediate_size, config.hidden_size)?;
    }
    let labels: Vec<u8> = layer.partition.labels().iter().flat_map(|l| l.to_le_bytes()).collect();
    let compensation = layer.compensation.iter().flat_map(ffn_tensors::of_compensation);
    let small: HashMap<_, _> =
        ffn_tensors::of_router(&layer.router).into_iter().chain(compensation).collect();

    let dense = source.names().dense_ffn(layer.layer, config).map(|(name, _)| name);
    let dtype = dtype_of(source, &dense[0]);
    let parts = [Part::Input, Part::InputBias, Part::OutputTransposed, Part::OutputBias];
    let mut planned = [const { Vec::new() }; 4];
    for (name, shape) in ffn_tensors::parts(record, config) {
        let neurons = ffn_tensors::NEURONS.iter().position(|part| *part == name);
        let (dtype, content) = match (neurons, small.get(name)) {
            (Some(part), _) => (dtype, Content::Neurons(layer.layer, parts[part])),
            (None, Some(tensor)) => {
                (stored_dtype(tensor.dtype()), Content::Bytes(tensor.as_bytes().into()))
            }
            (None, None) => (Dtype::I32, Content::Bytes(labels.clone().into())),
        };
        let name = source.names().moefy(layer.layer, name);
        planned[neurons.unwrap_or(0)].push(Planned { name, dtype, shape, content });
    }
    Ok(dense.into_iter().zip(planned).collect())
}

/// What takes the place of each tensor of a MoEfied layer: the reverse of [`moefied`].
pub(super) fn restored(
    source: &Folder,
    record: &LayerConfig,
) -> HashMap<String, Vec<Planned<'static>>> {
    let name = |part: &str| source.names().moefy(record.layer, part);
    let parts = ffn_tensors::parts(record, source.config());
    let mut replacements: HashMap<_, _> =
        parts.into_iter().map(|(part, _)| (name(part), vec![])).collect();
    let dense = source.names().dense_ffn(record.layer, source.config());
    let contents = [Part::Input, Part::InputBias, Part::Output, Part::OutputBias];
    for ((part, (dense, shape)), content) in ffn_tensors::NEURONS.iter().zip(dense).zip(contents) {
        let dtype = dtype_of(source, &name(part));
        let content = Content::Neurons(record.layer, content);
        replacements.insert(name(part), vec![Planned { name: dense, dtype, shape, content }]);
    }
    replacements
}

/// What takes the place of each tensor of floating-point numbers when they are all stored in one format.
pub(super) fn rounded(source: &Folder, dtype: DType) -> Result<HashMap<String, Vec<Planned<'_>>>> {
    let mut replacements = HashMap::new();
    for shard in &source.weights().shards {
        for (name, info) in &shard.tensors {
            let from = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                _ => continue,
            };
            let bytes = shard.tensor_bytes(info);
            let elements = TensorRef::from_bytes(from, bytes, [1, bytes.len() / from.bytes()])?;
            let content = Content::Rounded(elements, dtype);
            let (dtype, shape) = (stored_dtype(dtype), info.shape.clone());
            let planned = Planned { name: name.clone(), dtype, shape, content };
            replacements.insert(name.clone(), vec![planned]);
        }
    }
    Ok(replacements)
}

/// The format of a tensor that opening the folder has found.
fn dtype_of(source: &Folder, name: &str) -> Dtype {
    source.weights().get(name).expect("checked when the folder was opened").1.dtype
}

fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}
