//! Random damage to valid folders: whatever the bytes, reading them ends in a value or in an error
//! of one sentence, and soon. A panic is a failure, and bolero prints the damage that led to it;
//! what takes too long is one too, and `fuzz` prints that.
//!
//! `MOEFY_FUZZ_SECONDS` is the time of all harnesses together.

mod common;

use std::fs;
use std::io::{Write, stderr};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use bolero::TypeGenerator;
use common::{TinyBert, conversion, load};
use moefy::DType;
use moefy::model::{Config, ConvertedLayer, Folder, MoefyConfig, Output, restore, write_moefied};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

static GO: AtomicBool = AtomicBool::new(false);
const NUM_HARNESSES: f64 = 4.0;

fn time() -> Duration {
    let seconds = std::env::var("MOEFY_FUZZ_SECONDS").map_or(2.0, |text| {
        text.parse::<f64>().expect("MOEFY_FUZZ_SECONDS is a number of seconds")
    });
    Duration::from_secs_f64(seconds / NUM_HARNESSES)
}

/// Damage to bytes; positions wrap around.
#[derive(Clone, Debug, TypeGenerator)]
enum ByteEdit {
    Flip { at: u32, bit: u8 },
    Set { at: u32, value: u8 },
    Truncate { at: u32 },
    Insert { at: u32, value: u8 },
    Repeat { at: u32, len: u8 },
}

/// Damage to JSON that stays JSON; positions wrap around.
#[derive(Clone, Debug, TypeGenerator)]
enum JsonEdit {
    Replace { at: u16, by: u8 },
    Shift { at: u16, by: i8 },
    Remove { at: u16 },
    Rename { at: u16, to: u8 },
    Copy { from: u16, to: u16 },
}

/// Little at a time, so that most of what is read stays valid.
#[derive(Clone, Debug, TypeGenerator)]
enum Damage {
    Json(JsonEdit),
    Twice([JsonEdit; 2]),
    Bytes(ByteEdit),
    Both(JsonEdit, ByteEdit),
}

impl Damage {
    fn of_json(&self, text: &[u8]) -> Vec<u8> {
        let (json, bytes): (&[JsonEdit], Option<&ByteEdit>) = match self {
            Self::Json(edit) => (std::slice::from_ref(edit), None),
            Self::Twice(edits) => (edits, None),
            Self::Bytes(edit) => (&[], Some(edit)),
            Self::Both(json, bytes) => (std::slice::from_ref(json), Some(bytes)),
        };
        let mut value: Value = serde_json::from_slice(text).unwrap();
        json.iter().for_each(|edit| edit.apply(&mut value));
        let mut text = value.to_string().into_bytes();
        bytes.into_iter().for_each(|edit| edit.apply(&mut text));
        text
    }

    /// Damages the header as JSON, under a length that fits, or else any byte of the file.
    fn of_safetensors(&self, file: &[u8]) -> Vec<u8> {
        let mut file = file.to_vec();
        if let Self::Bytes(edit) = self {
            edit.apply(&mut file);
            return file;
        }
        let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = self.of_json(&file[8..end]);
        [&(header.len() as u64).to_le_bytes(), &header[..], &file[end..]].concat()
    }
}

impl ByteEdit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match *self {
            Self::Flip { at, bit } => bytes[at as usize % len] ^= 1 << (bit % 8),
            Self::Set { at, value } => bytes[at as usize % len] = value,
            Self::Truncate { at } => bytes.truncate(at as usize % len),
            Self::Insert { at, value } => bytes.insert(at as usize % len, value),
            Self::Repeat { at, len: count } => {
                let at = at as usize % len;
                let piece = bytes[at..len.min(at + usize::from(count))].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

impl JsonEdit {
    fn apply(&self, value: &mut Value) {
        let paths = paths(value);
        let path = |at: u16| &paths[usize::from(at) % paths.len()];
        match *self {
            Self::Replace { at, by } => *value.pointer_mut(path(at)).unwrap() = odd_value(by),
            Self::Shift { at, by } => {
                let number = value.pointer_mut(path(at)).unwrap();
                if let Some(old) = number.as_i64() {
                    *number = json!(old.saturating_add(by.into()));
                }
            }
            Self::Remove { at } => {
                let Some((parent, key)) = path(at).rsplit_once('/') else { return };
                match value.pointer_mut(parent).unwrap() {
                    Value::Object(map) => drop(map.shift_remove(&unescaped(key))),
                    Value::Array(list) => drop(list.remove(key.parse().unwrap())),
                    _ => unreachable!("only these have children"),
                }
            }
            Self::Rename { at, to } => {
                let Some((parent, key)) = path(at).rsplit_once('/') else { return };
                let Value::Object(map) = value.pointer_mut(parent).unwrap() else { return };
                let moved = map.shift_remove(&unescaped(key)).unwrap();
                let names: Vec<String> = map.keys().cloned().collect();
                let new = names.get(usize::from(to) % (names.len() + 1));
                map.insert(new.cloned().unwrap_or_default(), moved);
            }
            Self::Copy { from, to } => {
                let copy = value.pointer(path(from)).unwrap().clone();
                *value.pointer_mut(path(to)).unwrap() = copy;
            }
        }
    }
}

/// JSON pointers to every value.
fn paths(value: &Value) -> Vec<String> {
    let mut paths = vec![String::new()];
    let mut next = 0;
    while next < paths.len() {
        let path = paths[next].clone();
        match value.pointer(&path).unwrap() {
            Value::Object(map) => paths.extend(
                map.keys()
                    .map(|key| format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"))),
            ),
            Value::Array(list) => paths.extend((0..list.len()).map(|i| format!("{path}/{i}"))),
            _ => {}
        }
        next += 1;
    }
    paths
}

fn unescaped(key: &str) -> String {
    key.replace("~1", "/").replace("~0", "~")
}

fn odd_value(which: u8) -> Value {
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(47),
        json!(0.5),
        json!(1e300),
        json!(u32::MAX),
        json!(1_u64 << 62),
        json!(u64::MAX),
        json!(""),
        json!("relu"),
        json!("../x.safetensors"),
        json!("model.safetensors"),
        json!([]),
        json!([[0, 1]]),
        json!({}),
        json!({ "dynamic_k": { "rel_threshold": 0.5 } }),
        json!({ "kind": "linear", "rank": 3 }),
    ];
    values[usize::from(which) % values.len()].clone()
}

/// A converted folder.
fn fixture(dir: &Path, shards: usize) -> std::path::PathBuf {
    let (dense, moe) = (dir.join("dense"), dir.join("moe"));
    let model = TinyBert::new(1, DType::F16);
    match shards {
        1 => model.write(&dense),
        _ => model.write_sharded(&dense, shards),
    }
    let source = Folder::open(&dense).unwrap();
    // Few experts: long lists of statistics would draw most of the damage.
    let mut conversions =
        (0..).map(|seed| conversion::random(&mut ChaCha8Rng::seed_from_u64(seed)));
    let small =
        |layer: &ConvertedLayer| layer.statistics.is_some() && layer.partition.num_experts() == 6;
    let conversion = conversions.find(|conversion| conversion.layers.iter().all(small)).unwrap();
    let output = Output { path: &moe, overwrite: false, interrupted: &GO };
    write_moefied(&source, &conversion, output).unwrap();
    moe
}

fn one_sentence<T>(result: moefy::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
            None
        }
    }
}

/// Reads a damaged folder, and restores it if it reads.
fn read_and_restore(folder: &Path) {
    if one_sentence(load(folder)).is_some() {
        let out = folder.with_extension("restored");
        let output = Output { path: &out, overwrite: true, interrupted: &GO };
        one_sentence(Folder::open(folder).and_then(|folder| restore(&folder, output)));
    }
}

/// Tries damage for a while, and ends the process when one reading does not end: nothing but its
/// end stops a loop.
fn fuzz(read: impl Fn(&Damage) + std::panic::RefUnwindSafe) {
    const LONGEST: Duration = Duration::from_secs(60);
    let (sender, receiver) = mpsc::channel::<Damage>();
    let watch = std::thread::spawn(move || {
        let mut last = None;
        loop {
            match receiver.recv_timeout(LONGEST) {
                Ok(damage) => last = Some(damage),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    // Not `eprintln`, whose text a test keeps until its end.
                    let mut stderr = stderr();
                    writeln!(stderr, "reading took over {LONGEST:?} with {last:?}").unwrap();
                    std::process::abort();
                }
            }
        }
    });
    bolero::check!().with_type::<Damage>().with_test_time(time()).for_each(|damage| {
        sender.send(damage.clone()).unwrap();
        read(damage);
    });
    drop(sender);
    watch.join().unwrap();
}

fn damage_file(name: &str, shards: usize, damage: fn(&Damage, &[u8]) -> Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let folder = fixture(dir.path(), shards);
    let file = folder.join(name);
    let good = fs::read(&file).unwrap();
    fuzz(|with| {
        fs::write(&file, damage(with, &good)).unwrap();
        read_and_restore(&folder);
    });
}

#[test]
fn config() {
    let dir = tempfile::tempdir().unwrap();
    let folder = fixture(dir.path(), 1);
    let good = fs::read(folder.join("config.json")).unwrap();
    fuzz(|damage| {
        let text = damage.of_json(&good);
        let file = Path::new("config.json");
        let text = String::from_utf8_lossy(&text);
        let Some(config) = one_sentence(Config::parse(file, &text)) else { return };
        let moefy = one_sentence(MoefyConfig::parse(file, config.raw())).flatten();
        let Some(moefy) = moefy else { return };
        let (layers, neurons) = (config.num_hidden_layers, config.intermediate_size);
        one_sentence(moefy.check(file, layers, neurons));
    });
}

#[test]
fn folder_with_a_damaged_config() {
    damage_file("config.json", 1, Damage::of_json);
}

#[test]
fn folder_with_a_damaged_index() {
    damage_file("model.safetensors.index.json", 3, Damage::of_json);
}

#[test]
fn folder_with_damaged_weights() {
    damage_file("model.safetensors", 1, Damage::of_safetensors);
}
