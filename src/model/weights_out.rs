//! Writing of weight files, one tensor at a time.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use super::output::{Staging, Writer};
use super::replacements::{Content, Planned};
use super::shards::{INDEX, Weights};
use crate::error::{Error, Result};
use crate::ffn::DenseFfn;

/// Writes weight files like the source's, with some tensors replaced by others. `neurons` makes the
/// FFN of a layer that [`Content::Neurons`] asks for; one is kept at a time.
pub(super) fn write_weights<'a>(
    source: &'a Weights,
    mut replaced: HashMap<String, Vec<Planned<'a>>>,
    neurons: &dyn Fn(usize) -> Result<DenseFfn>,
    staging: &Staging<'_>,
) -> Result<()> {
    let mut current = None;
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for shard in &source.shards {
        let mut tensors = Vec::with_capacity(shard.tensors.len());
        for (name, info) in &shard.tensors {
            match replaced.remove(name) {
                Some(others) => tensors.extend(others),
                None => tensors.push(Planned {
                    name: name.clone(),
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    content: Content::Bytes(shard.tensor_bytes(info).into()),
                }),
            }
        }
        // The order that the format's own writers use, so that what is restored is the same file.
        tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));

        let mut writer = staging.create(&shard.name)?;
        total_size += write_header(&mut writer, shard.metadata.as_ref(), &tensors)?;
        for tensor in tensors {
            match &tensor.content {
                Content::Bytes(bytes) => writer.write(bytes)?,
                Content::Rounded(elements, dtype) => {
                    let elements = elements.to_owned();
                    let rounded = elements.to_dtype(*dtype);
                    if let Some(([_, at], _)) = rounded.first_non_finite() {
                        let got = format!("{} at element {at}", elements.to_f64()[at]);
                        let expected = format!("values that {dtype} can hold");
                        let file = Path::new(&shard.name);
                        return Err(Error::tensor(file, tensor.name, expected, got));
                    }
                    writer.write(rounded.as_bytes())?;
                }
                Content::Neurons(layer, part) => {
                    if current.as_ref().is_none_or(|(made, _)| made != layer) {
                        // The last one goes before the next one comes.
                        drop(current.take());
                        current = Some((*layer, neurons(*layer)?));
                    }
                    if let Some((_, ffn)) = &current {
                        writer.write(part.of(ffn).as_bytes())?;
                    }
                }
            }
            weight_map.insert(tensor.name, shard.name.as_str());
        }
        writer.finish()?;
    }
    let Some(metadata) = &source.index_metadata else { return Ok(()) };
    let mut metadata = metadata.clone();
    metadata.insert("total_size".into(), total_size.into());
    let index = [("metadata", metadata.into()), ("weight_map", json!(weight_map))];
    let index = index.into_iter().map(|(key, value): (&str, Value)| (key.to_string(), value));
    staging.create(INDEX)?.write_json(&index.collect())
}

/// Writes the length of the header and the header, and returns the bytes of the tensors to follow.
fn write_header(
    writer: &mut Writer<'_>,
    metadata: Option<&BTreeMap<String, String>>,
    tensors: &[Planned<'_>],
) -> Result<usize> {
    let mut header = Map::new();
    if let Some(metadata) = metadata {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        let info = TensorInfo { dtype, shape, data_offsets: (start, end) };
        header.insert(tensor.name.clone(), json!(info));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The tensors begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write(&(header.len() as u64).to_le_bytes())?;
    writer.write(&header)?;
    Ok(end)
}
