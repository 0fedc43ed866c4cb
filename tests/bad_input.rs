//! Damaged folders: one sentence says what is wrong, and nothing panics.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{TinyBert, conversion, load, read_json, read_tensors, write_json, write_safetensors};
use moefy::DType;
use moefy::ffn::{Compensation, MlpKind, Router, Selection};
use moefy::model::{Conversion, Folder, Output, restore, write_moefied};
use moefy::tensor::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

static GO: AtomicBool = AtomicBool::new(false);
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The error must be one sentence that holds every fragment.
#[track_caller]
fn refused(folder: &Path, fragments: &[&str]) {
    let error = load(folder).expect_err("it loads").to_string();
    assert!(!error.contains('\n'), "more than one line: {error}");
    for fragment in fragments {
        assert!(error.contains(fragment), "no `{fragment}` in: {error}");
    }
}

fn dense() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(1, DType::F32).write(dir.path());
    load(dir.path()).unwrap();
    dir
}

fn sharded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(1, DType::F32).write_sharded(dir.path(), 3);
    load(dir.path()).unwrap();
    dir
}

/// Layer 1 MoEfied: 6 experts of 7 neurons, 6 shared, a two-layer router, a compensation.
fn converted() -> tempfile::TempDir {
    let source = dense();
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut layer = conversion::random_layer(&mut rng, 1);
    layer.partition = conversion::random_partition(&mut rng, 48, 6, 6);
    let ones = |shape: [usize; 2]| Tensor::matrix(vec![1.0f32; shape[0] * shape[1]], shape);
    let (w1, w2) = (ones([7, 32]).unwrap(), ones([6, 7]).unwrap());
    layer.router = Router::Mlp { kind: MlpKind::D2dMoe, w1, w2 };
    layer.selection = Selection::dynamic_k(0.5);
    layer.compensation = Some(Compensation::Mean { mean: ones([1, 48]).unwrap() });
    layer.statistics = Some(conversion::random_statistics(&mut rng, 6));
    let conversion = Conversion { layers: vec![layer], ..conversion::random(&mut rng) };
    let source = Folder::open(source.path()).unwrap();
    let output = Output { path: dir.path(), overwrite: false, interrupted: &GO };
    write_moefied(&source, &conversion, output).unwrap();
    load(dir.path()).unwrap();
    dir
}

fn edit_tensors(
    folder: &Path,
    edit: impl FnOnce(&mut std::collections::BTreeMap<String, common::Stored>),
) {
    let mut tensors = read_tensors(folder);
    edit(&mut tensors);
    write_safetensors(&folder.join(WEIGHTS), tensors.iter());
}

fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(file);
    edit(&mut value);
    write_json(file, &value);
}

#[test]
fn folders_that_are_none() {
    let dir = dense();
    refused(&dir.path().join("nowhere"), &["cannot open", "nowhere", "No such file"]);
    refused(&dir.path().join("README.md"), &["README.md", "not a folder"]);

    fs::rename(dir.path().join(WEIGHTS), dir.path().join("pytorch_model.bin")).unwrap();
    refused(dir.path(), &["only pytorch_model.bin", "safe_serialization"]);
    fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    refused(dir.path(), &["holds neither model.safetensors nor"]);
    fs::create_dir(dir.path().join(WEIGHTS)).unwrap();
    refused(dir.path(), &[WEIGHTS, "not a file"]);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["cannot read", "config.json"]);
    fs::create_dir(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["config.json", "not a file"]);
}

#[test]
fn weight_files_that_are_damaged() {
    let dir = dense();
    let file = dir.path().join(WEIGHTS);
    let good = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let refused_as = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        refused(dir.path(), &[WEIGHTS, "not a valid safetensors file", &bytes.len().to_string()]);
    };
    for len in [0, 1, 7, 8, 9, 8 + header / 2, 8 + header, 9 + header, good.len() - 1] {
        refused_as(&good[..len]);
    }
    refused_as(&[&good[..], b"x"].concat());
    for lie in [0, header as u64 - 1, header as u64 + 8, 1 << 40, u64::MAX - 7, u64::MAX] {
        refused_as(&[&lie.to_le_bytes(), &good[8..]].concat());
    }
    let text = std::str::from_utf8(&good[8..8 + header]).unwrap();
    for (from, to) in [
        ("[30,32]", "[31,32]"),
        ("[30,32]", "[99999999999999999,99999999999999]"),
        ("[30,32]", "[-1,32]"),
        ("\"F32\"", "\"F64\""),
        ("\"F32\"", "\"F99\""),
        ("data_offsets", "data_offset"),
        ("\"data_offsets\":[0,", "\"data_offsets\":[8,"),
        ("{", "["),
    ] {
        assert!(text.contains(from), "{from}");
        let lie = text.replacen(from, to, 1);
        let len = (lie.len() as u64).to_le_bytes();
        refused_as(&[&len, lie.as_bytes(), &good[8 + header..]].concat());
    }
    let mut not_text = good.clone();
    not_text[20] = 0xff;
    refused_as(&not_text);
}

#[test]
fn tensors_that_are_missing_or_wrong() {
    let names: Vec<String> = read_tensors(dense().path()).into_keys().collect();
    for name in names.iter().filter(|name| !name.ends_with("position_ids")) {
        let dir = dense();
        edit_tensors(dir.path(), |tensors| drop(tensors.remove(name)));
        refused(dir.path(), &[WEIGHTS, "tensor `", "no such tensor"]);
        edit_tensors(dir.path(), |tensors| {
            let len = 33 * if name.ends_with("bias") { 1 } else { 2 };
            let shape = if name.ends_with("bias") { vec![33] } else { vec![2, 33] };
            tensors.insert(name.clone(), common::stored(DType::F32, &shape, &vec![0.5; len]));
        });
        refused(dir.path(), &[name, "expected F32 or F16 or BF16 of shape", "got F32 of shape"]);
    }
    for (name, at) in [
        ("embeddings.word_embeddings.weight", "at [29, 31]"),
        ("encoder.layer.1.attention.self.key.bias", "at [0, 31]"),
        ("encoder.layer.0.intermediate.dense.weight", "at [47, 31]"),
        ("encoder.layer.1.output.dense.weight", "at [31, 47]"),
        ("encoder.layer.1.output.LayerNorm.weight", "at [0, 31]"),
    ] {
        for (value, shown) in
            [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")]
        {
            let dir = dense();
            edit_tensors(dir.path(), |tensors| {
                let bytes = &mut tensors.get_mut(name).unwrap().bytes;
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&value.to_le_bytes());
            });
            refused(dir.path(), &[WEIGHTS, name, "expected finite values", shown, at]);
        }
    }
    let dir = dense();
    edit_tensors(dir.path(), |tensors| {
        let tensor = tensors.get_mut("encoder.layer.0.output.dense.bias").unwrap();
        (tensor.dtype, tensor.shape) = (Dtype::F64, vec![16]);
    });
    refused(dir.path(), &["encoder.layer.0.output.dense.bias", "got F64 of shape [16]"]);

    let dir = dense();
    edit_tensors(dir.path(), |tensors| {
        let half = common::stored(DType::F16, &[48], &[0.0; 48]);
        tensors.insert("encoder.layer.0.intermediate.dense.bias".into(), half);
    });
    refused(dir.path(), &["layer.0.intermediate.dense.bias`: expected f32, as the input weight"]);
}

#[test]
fn configs_that_cannot_work() {
    let dir = dense();
    let file = dir.path().join("config.json");
    let good = read_json(&file);
    for text in ["", "{", "[]", "nonsense", "{\"hidden_size\": 1e999}", "\u{feff}{}"] {
        fs::write(&file, text).unwrap();
        refused(dir.path(), &["config.json: not a JSON object"]);
    }
    fs::write(&file, [0xff, 0xfe]).unwrap();
    refused(dir.path(), &["cannot read", "config.json", "UTF-8"]);
    fs::write(&file, "[".repeat(100_000)).unwrap();
    refused(dir.path(), &["config.json: not a JSON object"]);

    let required = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ];
    let with = |key: &str, value: Value, fragments: &[&str]| {
        let mut config = good.clone();
        config[key] = value;
        write_json(&file, &config);
        refused(dir.path(), &[&["config.json", key], fragments].concat());
    };
    for key in required {
        with(key, json!(null), &["is missing"]);
        with(key, json!(0), &["must be at least 1, got 0"]);
        with(key, json!(-1), &["-1"]);
        with(key, json!("64"), &["invalid type: string"]);
        with(key, json!(1.5), &["1.5"]);
    }
    with("num_attention_heads", json!(5), &["a divisor of `hidden_size` = 32", "got 5"]);
    with("hidden_act", json!("softplus"), &["one of relu, gelu", "`softplus`"]);
    with("model_type", json!("llama"), &["one of bert, roberta", "got \"llama\""]);
    with("model_type", json!("x".repeat(1 << 20)), &["…"]);
    with("layer_norm_eps", json!(-1.0), &["at least 0", "got -1.0"]);
    with("pad_token_id", json!(30), &["below `vocab_size` = 30", "got 30"]);
    with("position_embedding_type", json!("relative_key"), &["\"absolute\"", "relative_key"]);
    with("is_decoder", json!(true), &["must be false", "got true"]);

    let absurd = |key: &str, value: u64, tensor: &str| {
        let mut config = good.clone();
        config[key] = json!(value);
        write_json(&file, &config);
        refused(dir.path(), &[WEIGHTS, tensor, &value.to_string(), "got F32 of shape"]);
    };
    absurd("hidden_size", 1 << 62, "word_embeddings");
    absurd("vocab_size", u64::MAX, "word_embeddings");
    absurd("intermediate_size", u64::MAX, "layer.0.intermediate.dense.weight");
    absurd("max_position_embeddings", 1 << 40, "position_embeddings");
    let mut config = good.clone();
    config["num_hidden_layers"] = json!(u64::MAX);
    write_json(&file, &config);
    refused(dir.path(), &["encoder.layer.2.", "no such tensor"]);
    let mut config = good.clone();
    config.as_object_mut().unwrap().remove("model_type");
    config["architectures"] = json!(["BertGenerationEncoder", "GPT2Model"]);
    write_json(&file, &config);
    refused(dir.path(), &["config.json", "`model_type` must be one of bert", "got nothing"]);
    config["model_type"] = json!("roberta");
    config["pad_token_id"] = json!(29);
    config["max_position_embeddings"] = json!(30);
    write_json(&file, &config);
    refused(dir.path(), &["config.json", "`max_position_embeddings`", "got 30"]);
}

#[test]
fn indices_that_lie() {
    let shard = "model-00002-of-00003.safetensors";
    let query = "encoder.layer.0.attention.self.query.weight";
    let edited = |edit: fn(&mut Value)| {
        let dir = sharded();
        edit_json(&dir.path().join(INDEX), edit);
        dir
    };
    for bad in ["../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", ""] {
        let dir = sharded();
        edit_json(&dir.path().join(INDEX), |index| index["weight_map"][query] = json!(bad));
        refused(dir.path(), &[INDEX, query, "in a safetensors file of the same folder", bad]);
    }
    let dir = sharded();
    fs::remove_file(dir.path().join(shard)).unwrap();
    refused(dir.path(), &["cannot read", shard]);
    let dir =
        edited(|index| index["weight_map"]["absent"] = json!("model-00002-of-00003.safetensors"));
    refused(dir.path(), &[INDEX, "`absent`", &format!("expected in {shard}, got in no file")]);
    let dir = sharded();
    edit_json(&dir.path().join(INDEX), |index| {
        let map = index["weight_map"].as_object_mut().unwrap();
        let other = map.values().find(|name| **name != map[query]).unwrap().clone();
        map.insert(query.to_string(), other);
    });
    refused(dir.path(), &[INDEX, query, "expected in model-", "got in model-"]);
    let dir = edited(|index| index["weight_map"] = json!({}));
    refused(dir.path(), &[INDEX, "no such tensor"]);
    let dir = edited(|index| index["weight_map"] = json!(["a"]));
    refused(dir.path(), &[INDEX, "`weight_map`: invalid type"]);
    let dir = edited(|index| drop(index.as_object_mut().unwrap().remove("weight_map")));
    refused(dir.path(), &[INDEX, "the key `weight_map` is missing"]);
    let dir = edited(|index| index["metadata"] = json!(1));
    refused(dir.path(), &[INDEX, "`metadata` must be an object"]);
    let dir = sharded();
    fs::write(dir.path().join(INDEX), "{").unwrap();
    refused(dir.path(), &[INDEX, "not a JSON object"]);
    let dir = sharded();
    fs::copy(dir.path().join("model-00001-of-00003.safetensors"), dir.path().join(shard)).unwrap();
    refused(dir.path(), &[shard, "one tensor of this name", "got two, in model-00001"]);
}

#[test]
fn moefy_objects_that_cannot_work() {
    let dir = converted();
    let file = dir.path().join("config.json");
    let good = read_json(&file);
    let with = |edit: &dyn Fn(&mut Value), fragments: &[&str]| {
        let mut config = good.clone();
        edit(&mut config["moefy"]);
        write_json(&file, &config);
        refused(dir.path(), &[&["config.json", "`moefy`"], fragments].concat());
    };
    with(&|m| m["format_version"] = json!(2), &["format_version 2", "up to 1: update moefy"]);
    with(&|m| m["format_version"] = json!("1"), &["without format_version"]);
    with(&|m| *m = json!([]), &["without format_version"]);
    with(&|m| m["surprise"] = json!(1), &["unknown field `surprise`"]);
    with(&|m| m["layers"] = json!(null), &["invalid type: null"]);
    with(&|m| m["layers"][0]["layer"] = json!(2), &["layer 2", "ascending order, below 2"]);
    with(&|m| m["layers"][0]["num_experts"] = json!(0), &["layer 1", "num_experts", "got 0"]);
    with(&|m| m["layers"][0]["num_experts"] = json!(5), &["a divisor of the 42 routed", "got 5"]);
    with(&|m| m["layers"][0]["shared"] = json!(48), &["less than d_ff = 48", "got 48"]);
    let threshold = |value: Value| {
        move |m: &mut Value| {
            m["layers"][0]["selection"]["dynamic_k"]["rel_threshold"] = value.clone()
        }
    };
    for (value, shown) in [(json!(1.5), "1.5"), (json!(-0.1), "-0.1"), (json!(1e300), "inf")] {
        with(&threshold(value), &["rel_threshold must be between 0 and 1", shown]);
    }
    with(&threshold(json!(null)), &["invalid type: null"]);
    with(&|m| m["layers"][0]["selection"] = json!({"top_k": {"k": 7}}), &["k must be", "got 7"]);
    with(&|m| m["layers"][0]["selection"] = json!({"best": 1}), &["unknown variant `best`"]);
    with(&|m| m["layers"][0]["selection"]["max_expert"] = json!(1), &["`moefy`", "single key"]);
    with(&|m| m["layers"][0]["selection"]["top_k"] = json!({"k": 1}), &["`moefy`", "single key"]);
    with(&|m| m["layers"][0]["selection"]["max_experts"] = json!("two"), &["invalid type", "two"]);
    with(
        &|m| m["layers"][0]["selection"]["dynamic_k"]["tau"] = json!(0.5),
        &["unknown field `tau`"],
    );
    with(&|m| m["layers"][0]["statistics"]["mean"] = json!(1), &["unknown field `mean`"]);
    with(
        &|m| m["layers"][0]["statistics"]["density"] = json!(-5),
        &["layer 1", "density must be between 0 and 1, got -5"],
    );
    with(&|m| m["layers"][0]["router"]["kind"] = json!("oracle"), &["unknown variant `oracle`"]);
    with(&|m| m["layers"][0]["router"]["hidden"] = json!(0), &["hidden", "at least 1"]);
    with(&|m| m["layers"][0]["statistics"]["hotness"] = json!([0.5]), &["6 experts", "got 1"]);
    with(
        &|m| m["layers"][0]["compensation"] = json!({"kind": "linear", "rank": 0}),
        &["rank must be at least 1"],
    );
    with(
        &|m| {
            let twice = m["layers"][0].clone();
            m["layers"].as_array_mut().unwrap().push(twice);
        },
        &["layer 1", "ascending order"],
    );
    let tensors = |edit: &dyn Fn(&mut Value), fragments: &[&str]| {
        let mut config = good.clone();
        edit(config.as_object_mut().unwrap().get_mut("moefy").unwrap());
        write_json(&file, &config);
        refused(dir.path(), &[&[WEIGHTS, "encoder.layer."], fragments].concat());
    };
    tensors(&|m| m["layers"][0]["layer"] = json!(0), &["layer.0.moefy.w_in", "no such tensor"]);
    tensors(&|m| m["layers"] = json!([]), &["layer.1.intermediate", "no such tensor"]);
    tensors(&|m| m["layers"][0]["router"]["hidden"] = json!(8), &["router.w1", "[8, 32]"]);
    tensors(
        &|m| m["layers"][0]["router"] = json!({"kind": "linear"}),
        &["router.weight", "no such tensor"],
    );
    tensors(&|m| m["layers"][0]["compensation"] = json!(null), &["compensation.mean", "only the"]);
    tensors(
        &|m| {
            m["layers"][0]["shared"] = json!(0);
        },
        &["layer.1.moefy.labels", "0 shared neurons", "got 6"],
    );
    tensors(
        &|m| {
            m["layers"][0]["num_experts"] = json!(7);
            m["layers"][0]["statistics"] = json!(null);
        },
        &["router.w2", "[7, 7]"],
    );
    let mut config = good.clone();
    config.as_object_mut().unwrap().remove("moefy");
    write_json(&file, &config);
    refused(dir.path(), &[WEIGHTS, "layer.1.intermediate.dense.weight", "no such tensor"]);
}

#[test]
fn moefied_tensors_that_are_wrong() {
    let with = |part: &str, edit: &dyn Fn(&mut common::Stored), fragments: &[&str]| {
        let dir = converted();
        let name = format!("encoder.layer.1.moefy.{part}");
        edit_tensors(dir.path(), |tensors| edit(tensors.get_mut(&name).unwrap()));
        refused(dir.path(), &[&[WEIGHTS, name.as_str()], fragments].concat());
    };
    let label = |label: i32| {
        move |tensor: &mut common::Stored| tensor.bytes[8..12].copy_from_slice(&label.to_le_bytes())
    };
    with("labels", &label(7), &["labels of at most 6", "got 7 for neuron 2"]);
    with("labels", &label(-3), &["labels of at least 0", "got -3"]);
    with("labels", &|t| t.bytes.fill(0), &["experts of one width", "got 48 for expert 0"]);
    with("labels", &|t| t.dtype = Dtype::F32, &["expected I32 or U32 of shape [48]"]);
    with("w_out", &|t| t.shape = vec![32, 48], &["shape [48, 32]", "got F32 of shape [32, 48]"]);
    for part in ["w_in", "b_in", "w_out", "b_out", "router.w1", "router.w2", "compensation.mean"] {
        let nan = |tensor: &mut common::Stored| {
            tensor.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        };
        with(part, &nan, &["finite", "NaN", "[0, 0]"]);
    }
    let stray = |name: &str, fragment: &str| {
        let dir = converted();
        edit_tensors(dir.path(), |tensors| {
            tensors.insert(name.into(), common::stored(DType::F32, &[1], &[0.0]));
        });
        refused(dir.path(), &[WEIGHTS, name, fragment]);
    };
    stray("encoder.layer.1.moefy.surprise", "only the tensors that the `moefy` object");
    stray("encoder.layer.0.moefy.labels", "only the tensors that the `moefy` object");
    stray("encoder.layer.1.output.dense.bias", "says that the layer is MoEfied");
}

/// A pipe would block whoever opens it.
#[cfg(unix)]
#[test]
fn pipes_are_not_read() {
    let dir = dense();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(dir.path().join("config.json")).status();
    assert!(made.unwrap().success());
    refused(dir.path(), &["config.json", "not a file"]);
}

/// The system refuses to write beyond a limit, as on a full disk: nothing is left behind.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    const CHILD: &str = "MOEFY_TEST_FULL_DISK";
    if let Ok(dir) = std::env::var(CHILD) {
        let dir = Path::new(&dir);
        let source = Folder::open(&dir.join("moe")).unwrap();
        for (out, overwrite) in [("out", false), ("old", true)] {
            let output = Output { path: &dir.join(out), overwrite, interrupted: &GO };
            let error = restore(&source, output).unwrap_err().to_string();
            let file = dir.join(out).join(WEIGHTS);
            assert!(error.starts_with(&format!("cannot write {}: ", file.display())), "{error}");
        }
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::rename(converted().keep(), dir.path().join("moe")).unwrap();
    TinyBert::new(9, DType::F16).write(&dir.path().join("old"));
    let old = read_tensors(&dir.path().join("old"));
    // The limit counts blocks of 512 bytes or of 1 KiB; past it, a signal comes unless ignored.
    let script = "trap '' XFSZ; ulimit -f 32; exec \"$0\" --exact a_full_disk_leaves_nothing";
    let child = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["moe", "old"]);
    assert!(read_tensors(&dir.path().join("old")) == old);
}
