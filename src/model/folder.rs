//! An opened model folder.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorInfo};

use super::format::MoefyConfig;
use super::shards::{Shard, Weights, read_text};
use super::{Config, Names, ffn_tensors};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, MoeFfn};
use crate::tensor::TensorRef;

/// One feed-forward layer of a folder.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there are only as many as layers")]
pub enum Ffn {
    /// As the model was trained.
    Dense(DenseFfn),
    /// Converted.
    Moe(MoeFfn),
}

impl Ffn {
    /// All neurons, in the order in which they are stored.
    pub fn neurons(&self) -> &DenseFfn {
        match self {
            Self::Dense(dense) => dense,
            Self::Moe(moe) => moe.neurons(),
        }
    }
}

/// A model folder: `config.json` beside `model.safetensors`, or beside shards and
/// `model.safetensors.index.json`.
///
/// Opening checks config, headers and the presence, shape and format of every tensor of the
/// encoder; values are checked when a tensor is taken. Tensors that the encoder does not know
/// (poolers, heads, position ids) are carried along.
///
/// The weights are memory-mapped. Whoever truncates a mapped file ends the process with SIGBUS, and
/// whoever overwrites one changes the model under way: replace model folders, don't edit them.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    config: Config,
    names: Names,
    moefy: Option<MoefyConfig>,
    weights: Weights,
}

impl Folder {
    /// Opens and checks a folder.
    ///
    /// # Errors
    /// When anything but tensor values is not as it should be; one sentence names the file, the
    /// tensor, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.metadata().map_err(Error::io("open", path))?.is_dir() {
            return Err(Error::file(path, "not a folder: give the folder that holds config.json"));
        }
        let config_file = path.join("config.json");
        let config = Config::parse(&config_file, &read_text(&config_file)?)?;
        let moefy = MoefyConfig::parse(&config_file, config.raw())?;
        if let Some(moefy) = &moefy {
            moefy.check(&config_file, config.num_hidden_layers, config.intermediate_size)?;
        }
        let weights = Weights::open(path)?;
        let names = Names::detect(|name| weights.get(name).is_some());
        let folder = Self { path: path.into(), config, names, moefy, weights };
        folder.check_tensors()?;
        Ok(folder)
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the folder's tensors are called.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The `moefy` object of a converted model.
    pub fn moefy(&self) -> Option<&MoefyConfig> {
        self.moefy.as_ref()
    }

    /// Number of encoder layers.
    pub fn num_layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    /// The matrix `name`, which must be of f32, f16 or bf16 and finite.
    ///
    /// # Errors
    /// When there is no such tensor, its shape or format differs, or a value is NaN or infinite.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<TensorRef<'_>> {
        self.floats(name, &shape, shape)
    }

    /// The vector `name`, as a matrix of one row.
    ///
    /// # Errors
    /// As for [`matrix`](Self::matrix).
    pub fn vector(&self, name: &str, len: usize) -> Result<TensorRef<'_>> {
        self.floats(name, &[len], [1, len])
    }

    /// A copy of the FFN of a layer, dense or MoEfied as the folder holds it.
    ///
    /// # Errors
    /// When there is no such layer, or a value of its tensors cannot work.
    pub fn ffn(&self, layer: usize) -> Result<Ffn> {
        if layer >= self.num_layers() {
            let expected = format!("below {}, the number of layers", self.num_layers());
            return Err(Error::argument("ffn", "layer", expected, layer));
        }
        match self.moefy.as_ref().and_then(|moefy| moefy.layer(layer)) {
            Some(record) => Ok(Ffn::Moe(ffn_tensors::read_moe(self, record)?)),
            None => Ok(Ffn::Dense(ffn_tensors::read_dense(self, layer)?)),
        }
    }

    /// Weights of the encoder, whatever their format.
    pub(super) fn num_weights(&self) -> usize {
        let of = |tensors: Vec<(String, Vec<usize>)>| -> usize {
            tensors.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum()
        };
        let layers = (0..self.num_layers()).map(|layer| {
            let ffn = match self.moefy.as_ref().and_then(|moefy| moefy.layer(layer)) {
                Some(record) => ffn_tensors::parts(record, &self.config)
                    .iter()
                    .filter(|(part, _)| *part != ffn_tensors::LABELS)
                    .map(|(_, dims)| dims.iter().product::<usize>())
                    .sum(),
                None => of(self.names.dense_ffn(layer, &self.config).into()),
            };
            ffn + of(self.names.outside_ffn(layer, &self.config))
        });
        of(self.names.embeddings(&self.config)) + layers.sum::<usize>()
    }

    pub(super) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The labels of a partition.
    pub(super) fn labels(&self, name: &str, len: usize) -> Result<Vec<u32>> {
        let (shard, info) = self.checked(name, &[len], &LABELS)?;
        let (labels, _) = shard.tensor_bytes(info).as_chunks();
        let signed = info.dtype == Dtype::I32;
        let negative = labels.iter().find(|&&label| signed && i32::from_le_bytes(label) < 0);
        if let Some(&label) = negative {
            let got = i32::from_le_bytes(label);
            return Err(self.tensor_error(name, "labels of at least 0", got));
        }
        Ok(labels.iter().map(|&label| u32::from_le_bytes(label)).collect())
    }

    /// An [`Error::Tensor`] that names the file of the tensor, or the one that should list it.
    pub(super) fn tensor_error(
        &self,
        name: &str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Error {
        let file = self.weights.get(name).map_or(&self.weights.listing, |(shard, _)| &shard.path);
        Error::tensor(file, name, expected, got)
    }

    fn floats(&self, name: &str, dims: &[usize], shape: [usize; 2]) -> Result<TensorRef<'_>> {
        let (shard, info) = self.checked(name, dims, &FLOATS)?;
        let bytes = shard.tensor_bytes(info);
        if let Some((at, value)) = first_non_finite(info.dtype, bytes) {
            let got = format!("{value} at [{}, {}]", at / shape[1], at % shape[1]);
            return Err(self.tensor_error(name, "finite values", got));
        }
        let dtype = match info.dtype {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => DType::F32,
        };
        TensorRef::from_bytes(dtype, bytes, shape)
    }

    fn checked(
        &self,
        name: &str,
        dims: &[usize],
        dtypes: &[Dtype],
    ) -> Result<(&Shard, &TensorInfo)> {
        let expected = || format!("{} of shape {dims:?}", one_of(dtypes));
        let Some((shard, info)) = self.weights.get(name) else {
            return Err(self.tensor_error(name, expected(), "no such tensor"));
        };
        if info.shape != dims || !dtypes.contains(&info.dtype) {
            let got = format!("{} of shape {:?}", info.dtype, info.shape);
            return Err(self.tensor_error(name, expected(), got));
        }
        Ok((shard, info))
    }

    /// Presence, shape and format of every tensor of the encoder; and where an FFN is MoEfied,
    /// nothing of its dense form, nor anything unknown beside it.
    fn check_tensors(&self) -> Result<()> {
        let floats = |tensors: &[(String, Vec<usize>)]| {
            tensors.iter().try_for_each(|(name, dims)| self.checked(name, dims, &FLOATS).map(drop))
        };
        floats(&self.names.embeddings(&self.config))?;
        let mut known = HashSet::new();
        for layer in 0..self.num_layers() {
            floats(&self.names.outside_ffn(layer, &self.config))?;
            let dense = self.names.dense_ffn(layer, &self.config);
            let Some(record) = self.moefy.as_ref().and_then(|moefy| moefy.layer(layer)) else {
                floats(&dense)?;
                continue;
            };
            for (part, dims) in ffn_tensors::parts(record, &self.config) {
                let name = self.names.moefy(layer, part);
                let labels = part == ffn_tensors::LABELS;
                self.checked(&name, &dims, if labels { &LABELS } else { &FLOATS })?;
                known.insert(name);
            }
            for (name, _) in dense {
                if self.weights.get(&name).is_some() {
                    let expected = "none, because config.json says that the layer is MoEfied";
                    return Err(self.tensor_error(&name, expected, "one"));
                }
            }
        }
        match self.weights.names().find(|name| name.contains(".moefy.") && !known.contains(*name)) {
            Some(stray) => {
                let expected = "only the tensors that the `moefy` object of config.json implies";
                Err(self.tensor_error(stray, expected, "this one as well"))
            }
            None => Ok(()),
        }
    }
}

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];
const LABELS: [Dtype; 2] = [Dtype::I32, Dtype::U32];

fn one_of(dtypes: &[Dtype]) -> String {
    dtypes.iter().map(Dtype::to_string).collect::<Vec<_>>().join(" or ")
}

/// Index and value of the first NaN or infinity among little-endian elements.
fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    fn find<const N: usize>(bytes: &[u8], value: fn([u8; N]) -> f32) -> Option<(usize, f32)> {
        let values = bytes.as_chunks().0.iter().map(|&element| value(element));
        values.enumerate().find(|(_, value)| !value.is_finite())
    }
    match dtype {
        Dtype::F16 => find(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => find(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => find(bytes, f32::from_le_bytes),
    }
}
