//! The weight files of a folder: one `model.safetensors`, or shards and their index.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};

use super::config::object;
use crate::error::{Error, Result};

/// The file name of unsharded weights.
pub(super) const SINGLE: &str = "model.safetensors";
/// The file name of the index of sharded weights.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// One memory-mapped safetensors file whose header has been checked against its size.
#[derive(Debug)]
pub(super) struct Shard {
    /// File name inside the folder.
    pub name: String,
    pub path: PathBuf,
    /// The header's `__metadata__`.
    pub metadata: Option<BTreeMap<String, String>>,
    /// In the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
    map: Mmap,
    /// Where the header ends and the tensors begin.
    data_start: usize,
}

impl Shard {
    fn open(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let file = open_file(&path)?;
        // SAFETY: the map is only read, as plain bytes. Another process that changes the file can
        // change these bytes, or end this process with SIGBUS by truncating it: `Folder` says so.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|e| {
            let bytes = map.len();
            Error::file(&path, format!("not a valid safetensors file of {bytes} bytes: {e}"))
        })?;
        let metadata = header.metadata().as_ref().map(|m| m.clone().into_iter().collect());
        let tensors = header.offset_keys().into_iter().filter_map(|name| {
            let info = header.info(&name)?.clone();
            Some((name, info))
        });
        let (name, tensors) = (name.to_string(), tensors.collect());
        Ok(Self { name, path, metadata, tensors, map, data_start: 8 + header_len })
    }

    /// The whole file.
    pub fn file_bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes of one of this shard's tensors.
    pub fn tensor_bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }
}

/// All weights of a folder.
#[derive(Debug)]
pub(super) struct Weights {
    /// In the order of their names.
    pub shards: Vec<Shard>,
    /// The `metadata` object of the index, for sharded weights.
    pub index_metadata: Option<Map<String, Value>>,
    /// The file that promises the tensors: the index, or the only weight file.
    pub listing: PathBuf,
    /// Tensor name to (shard, tensor within the shard).
    places: HashMap<String, (usize, usize)>,
}

impl Weights {
    /// Opens `model.safetensors`, or else the shards that `model.safetensors.index.json` lists.
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.join(SINGLE).exists() {
            let shard = Shard::open(folder, SINGLE)?;
            return Self::new(vec![shard], None, folder.join(SINGLE));
        }
        let listing = folder.join(INDEX);
        if !listing.exists() {
            return Err(Error::file(folder, missing_weights(folder)));
        }
        let text = read_text(&listing)?;
        let index = Index::parse(&listing, &text)?;
        let shards = index.shards().into_iter().map(|name| Shard::open(folder, name));
        let weights = Self::new(shards.collect::<Result<_>>()?, Some(index.metadata), listing)?;
        for (tensor, shard) in &index.weight_map {
            match weights.get(tensor) {
                Some((found, _)) if found.name == *shard => {}
                found => {
                    let got = found.map_or("in no file".into(), |(s, _)| format!("in {}", s.name));
                    let expected = format!("in {shard}");
                    return Err(Error::tensor(&weights.listing, tensor, expected, got));
                }
            }
        }
        Ok(weights)
    }

    fn new(
        shards: Vec<Shard>,
        index_metadata: Option<Map<String, Value>>,
        listing: PathBuf,
    ) -> Result<Self> {
        let mut places = HashMap::new();
        for (s, shard) in shards.iter().enumerate() {
            for (t, (name, _)) in shard.tensors.iter().enumerate() {
                if let Some((other, _)) = places.insert(name.clone(), (s, t)) {
                    let got = format!("two, in {} and {}", shards[other].name, shard.name);
                    return Err(Error::tensor(&shard.path, name, "one tensor of this name", got));
                }
            }
        }
        Ok(Self { shards, index_metadata, listing, places })
    }

    /// The shard that holds a tensor, and the tensor's header entry.
    pub fn get(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let &(shard, tensor) = self.places.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.tensors[tensor].1))
    }

    /// Every tensor's name.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().flat_map(|shard| shard.tensors.iter().map(|(name, _)| name.as_str()))
    }
}

/// The content of `model.safetensors.index.json`.
#[derive(Debug)]
struct Index {
    metadata: Map<String, Value>,
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn parse(file: &Path, text: &str) -> Result<Self> {
        let mut raw = object(file, text)?;
        let metadata = match raw.remove("metadata") {
            Some(Value::Object(metadata)) => metadata,
            None | Some(Value::Null) => Map::new(),
            Some(_) => return Err(Error::file(file, "`metadata` must be an object")),
        };
        let weight_map: BTreeMap<String, String> = match raw.remove("weight_map") {
            Some(map) => serde_json::from_value(map)
                .map_err(|e| Error::file(file, format!("`weight_map`: {e}")))?,
            None => return Err(Error::file(file, "the key `weight_map` is missing")),
        };
        for (tensor, shard) in &weight_map {
            let mut parts = Path::new(shard).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || !shard.ends_with(".safetensors") {
                let expected = "in a safetensors file of the same folder";
                return Err(Error::tensor(file, tensor, expected, format!("`{shard}`")));
            }
        }
        Ok(Self { metadata, weight_map })
    }

    fn shards(&self) -> Vec<&str> {
        let mut shards: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }
}

/// Opens a regular file, or a link to one: a pipe would block forever.
fn open_file(path: &Path) -> Result<File> {
    let metadata = path.metadata().map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "not a file"));
    }
    File::open(path).map_err(Error::io("read", path))
}

/// Reads a regular file as UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    std::io::read_to_string(open_file(path)?).map_err(Error::io("read", path))
}

fn missing_weights(folder: &Path) -> String {
    let missing = format!("holds neither {SINGLE} nor {INDEX}");
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    match pickled.into_iter().find(|name| folder.join(name).exists()) {
        Some(name) => format!(
            "{missing}, only {name}: save the model with transformers' \
             `save_pretrained(folder, safe_serialization=True)` first"
        ),
        None => missing,
    }
}
