//! Converting, retuning and restoring of folders.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::conversion::{self, random_partition, random_statistics};
use common::{HIDDEN, INTERMEDIATE, LAYERS, TinyBert, read_json, read_tensors};
use half::{bf16, f16};
use moefy::ffn::{Activation, DenseFfn, FfnTensors, MoeFfn, Router, Selection};
use moefy::model::{Conversion, Ffn, Folder, Output, restore, retune, write_moefied};
use moefy::{DType, Error, Tensor};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

static GO: AtomicBool = AtomicBool::new(false);
static STOP: AtomicBool = AtomicBool::new(true);

fn to(path: &Path) -> Output<'_> {
    Output { path, overwrite: false, interrupted: &GO }
}

fn over(path: &Path) -> Output<'_> {
    Output { overwrite: true, ..to(path) }
}

/// Every file below a folder, by its path.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Replaces the FFN weights by arbitrary finite bit patterns: subnormal, huge, −0.
fn with_arbitrary_bits(model: &mut TinyBert, dtype: DType, rng: &mut ChaCha8Rng) {
    let ffns = model.tensors.iter_mut().filter(|(name, _)| name.contains(".dense."));
    for (_, tensor) in ffns {
        rng.fill(&mut tensor.bytes[..]);
        match dtype {
            DType::F32 => tensor.bytes.as_chunks_mut().0.iter_mut().for_each(|b: &mut [u8; 4]| {
                b[3] &= if f32::from_le_bytes(*b).is_finite() { 0xff } else { 0xbf };
            }),
            DType::F16 => tensor.bytes.as_chunks_mut().0.iter_mut().for_each(|b: &mut [u8; 2]| {
                b[1] &= if f16::from_le_bytes(*b).is_finite() { 0xff } else { 0xbf };
            }),
            DType::BF16 => tensor.bytes.as_chunks_mut().0.iter_mut().for_each(|b: &mut [u8; 2]| {
                b[1] &= if bf16::from_le_bytes(*b).is_finite() { 0xff } else { 0xbf };
            }),
        }
    }
}

fn check_converted(source: &Folder, moefied: &Folder, conversion: &Conversion) {
    let moefy = moefied.moefy().unwrap();
    assert_eq!(moefy.method, conversion.method);
    assert_eq!(moefy.layers.len(), conversion.layers.len());
    for layer in 0..LAYERS {
        let Ffn::Dense(dense) = source.ffn(layer).unwrap() else { panic!("a dense source") };
        let converted = conversion.layers.iter().find(|converted| converted.layer == layer);
        let Some(converted) = converted else {
            assert_eq!(moefied.ffn(layer).unwrap(), Ffn::Dense(dense));
            continue;
        };
        let (partition, router) = (converted.partition.clone(), converted.router.clone());
        let expected = MoeFfn::new(&dense, partition, router, converted.selection).unwrap();
        let expected = expected.with_gate(converted.gate);
        let expected = match converted.compensation.clone() {
            Some(compensation) => expected.with_compensation(compensation).unwrap(),
            None => expected,
        };
        let expected = match &converted.statistics {
            Some(statistics) => expected.with_calibrated_density(statistics.density),
            None => expected,
        };
        assert_eq!(moefied.ffn(layer).unwrap(), Ffn::Moe(expected));
        let record = moefy.layer(layer).unwrap();
        assert_eq!(record.statistics, converted.statistics);
        assert_eq!(record.router_training, converted.router_training);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is converted reads as what was converted; what is restored is the same folder again,
    /// every byte of every file.
    #[test]
    fn converted_and_restored_is_the_source(
        seed: u64,
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        shards in 1usize..5,
        prefix in prop::sample::select(vec!["", "bert.", "roberta."]),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let [dense, moe, again] = ["dense", "moe", "again"].map(|name| dir.path().join(name));
        let mut model = TinyBert::with_prefix(seed, dtype, prefix);
        with_arbitrary_bits(&mut model, dtype, &mut rng);
        match shards {
            1 => model.write(&dense),
            _ => model.write_sharded(&dense, shards),
        }
        let conversion = conversion::random(&mut rng);

        let source = Folder::open(&dense).unwrap();
        write_moefied(&source, &conversion, to(&moe)).unwrap();
        let moefied = Folder::open(&moe).unwrap();
        check_converted(&source, &moefied, &conversion);
        let (before, after) = (read_tensors(&dense), read_tensors(&moe));
        for (name, tensor) in before.iter().filter(|(name, _)| after.contains_key(*name)) {
            prop_assert_eq!(&after[name], tensor, "{}", name);
        }
        prop_assert_eq!(
            before.len() - after.keys().filter(|name| before.contains_key(*name)).count(),
            4 * conversion.layers.len()
        );

        restore(&moefied, to(&again)).unwrap();
        let (before, after) = (files(&dense), files(&again));
        prop_assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, bytes) in before {
            let json = name.ends_with(".json");
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let same = match json {
                true => text(&bytes).trim_end() == text(&after[&name]).trim_end(),
                false => bytes == after[&name],
            };
            prop_assert!(same, "{} differs", name);
        }
        prop_assert_eq!(names(dir.path()), ["again", "dense", "moe"]);
    }

    /// The order of experts loses no bit of any FFN, gated or not, with or without biases.
    #[test]
    fn expert_order_is_reversible(
        seed: u64,
        glu: bool,
        biases: bool,
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        (num_experts, expert_width, shared) in (1usize..7, 1usize..9, 0usize..5),
        d_model in 1usize..20,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let d_ff = num_experts * expert_width + shared;
        let mut tensor = |shape: [usize; 2]| {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.random()).collect();
            Tensor::matrix(values, shape).unwrap().to_dtype(dtype)
        };
        let [gate, input] = [tensor([d_ff, d_model]), tensor([d_ff, d_model])];
        let output = tensor([d_model, d_ff]);
        let [b_gate, b_in] = [tensor([1, d_ff]), tensor([1, d_ff])];
        let b_out = tensor([1, d_model]);
        let router = Router::Linear { w: tensor([num_experts, d_model]) };
        let tensors = FfnTensors {
            gate: glu.then_some(gate.view()),
            gate_bias: (glu && biases).then_some(b_gate.view()),
            input_bias: biases.then_some(b_in.view()),
            output_bias: biases.then_some(b_out.view()),
            ..FfnTensors::plain(input.view(), output.view())
        };
        let dense = DenseFfn::new(Activation::Silu, tensors).unwrap();
        let partition = random_partition(&mut rng, d_ff, num_experts, shared);
        let moe =
            MoeFfn::new(&dense, partition.clone(), router.clone(), Selection::top_k(1)).unwrap();
        prop_assert_eq!(&moe.to_dense(), &dense);
        let stored = moe.neurons().clone();
        let read =
            MoeFfn::from_expert_order(stored, partition, router, Selection::top_k(1)).unwrap();
        prop_assert_eq!(&read, &moe);
    }
}

/// A dense and a converted folder.
fn fixture(seed: u64, shards: usize) -> (tempfile::TempDir, Folder, Folder) {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyBert::new(seed, DType::F32);
    match shards {
        1 => model.write(&dir.path().join("dense")),
        _ => model.write_sharded(&dir.path().join("dense"), shards),
    }
    let source = Folder::open(&dir.path().join("dense")).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let layers = (0..LAYERS).map(|layer| conversion::random_layer(&mut rng, layer)).collect();
    let conversion = Conversion { layers, ..conversion::random(&mut rng) };
    write_moefied(&source, &conversion, to(&dir.path().join("moe"))).unwrap();
    let moefied = Folder::open(&dir.path().join("moe")).unwrap();
    (dir, source, moefied)
}

#[test]
fn config_keeps_every_key_and_gains_one() {
    let (dir, ..) = fixture(1, 1);
    let [before, after] =
        ["dense", "moe"].map(|name| read_json(&dir.path().join(name).join("config.json")));
    let (before, after) = (before.as_object().unwrap(), after.as_object().unwrap());
    let mut keys: Vec<_> = after.keys().collect();
    assert_eq!(keys.pop().unwrap(), "moefy");
    assert_eq!(keys, before.keys().collect::<Vec<_>>());
    assert!(before.iter().all(|(key, value)| after[key] == *value));
}

#[test]
fn retuning_changes_nothing_but_the_config() {
    for shards in [1, 3] {
        let (dir, _, moefied) = fixture(2, shards);
        let mut moefy = moefied.moefy().unwrap().clone();
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        moefy.method.density_target = Some(0.125);
        let record = &mut moefy.layers[1];
        record.selection = Selection::dynamic_k(0.1);
        record.statistics = Some(random_statistics(&mut rng, record.num_experts));

        let out = dir.path().join("retuned");
        retune(&moefied, &moefy, to(&out)).unwrap();
        assert_eq!(Folder::open(&out).unwrap().moefy(), Some(&moefy));
        let (mut before, mut after) = (files(moefied.path()), files(&out));
        assert_ne!(before.remove("config.json"), after.remove("config.json"));
        assert!(before == after, "other files differ");

        moefy.layers[1].shared += moefy.layers[1].num_experts;
        let error = retune(&moefied, &moefy, to(&dir.path().join("no"))).unwrap_err();
        assert!(!dir.path().join("no").exists(), "{error}");
    }
}

#[test]
fn everything_else_in_the_folder_comes_along() {
    let dir = tempfile::tempdir().unwrap();
    let dense = dir.path().join("dense");
    TinyBert::new(3, DType::F32).write(&dense);
    let write = |name: &str| {
        let path = dense.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    };
    let kept = ["vocab.txt", "modules.json", "2_Dense/pytorch_model.bin", "2_Dense/a/b.onnx"];
    let left = [
        ".gitattributes",
        ".cache/x",
        "notes.tmp",
        "README.md~",
        "pytorch_model.bin",
        "model.onnx",
        "tf_model.h5",
        "onnx/model.json",
        "1_Pooling/.hidden",
    ];
    kept.into_iter().chain(left).for_each(write);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("../dense", dense.join("circle")).unwrap();
        std::os::unix::fs::symlink("vocab.txt", dense.join("linked.txt")).unwrap();
    }
    let source = Folder::open(&dense).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let out = dir.path().join("moe");
    write_moefied(&source, &conversion::random(&mut rng), to(&out)).unwrap();
    let found: Vec<String> = files(&out).into_keys().collect();
    let mut expected: Vec<&str> = kept.to_vec();
    expected.extend(["1_Pooling/config.json", "LICENSE", "README.md", "config.json"]);
    expected.extend(["model.safetensors", "tokenizer.json"]);
    if cfg!(unix) {
        expected.push("linked.txt");
    }
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn an_existing_folder_is_replaced_only_when_asked() {
    let (dir, source, moefied) = fixture(4, 1);
    let out = dir.path().join("out");
    let refused = |output: Output<'_>, because: &str| {
        let before = output.path.is_dir().then(|| files(output.path));
        let error = restore(&moefied, output).unwrap_err().to_string();
        assert!(error.contains(because), "{error}");
        assert_eq!(output.check(moefied.path()).unwrap_err().to_string(), error);
        assert_eq!(output.path.is_dir().then(|| files(output.path)), before);
    };
    std::fs::create_dir(&out).unwrap();
    restore(&moefied, to(&out)).unwrap();
    refused(to(&out), "exists already");
    restore(&moefied, over(&out)).unwrap();
    assert!(read_tensors(&out) == read_tensors(source.path()));

    std::fs::remove_file(out.join("config.json")).unwrap();
    refused(over(&out), "holds no config.json");
    refused(over(&out.join("LICENSE")), "is not a folder");
    refused(to(&dir.path().join("moe/inside")), "apart from");
    refused(over(dir.path()), "no config.json");
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    refused(over(dir.path()), "apart from");
    refused(to(&dir.path().join("missing/out")), "cannot find");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();

    // In place: the source's mapping outlives its name.
    restore(&moefied, over(moefied.path())).unwrap();
    assert!(read_tensors(moefied.path()) == read_tensors(source.path()));
    assert_eq!(names(dir.path()), ["dense", "moe", "out"]);
}

#[cfg(unix)]
#[test]
fn a_new_folder_has_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, ..) = fixture(5, 1);
    let mode =
        |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("moe"), mode("dense"));
    assert_eq!(mode("moe/model.safetensors"), mode("dense/config.json"));
}

#[test]
fn an_interruption_leaves_nothing() {
    let (dir, source, moefied) = fixture(6, 2);
    let old = files(moefied.path());
    let stop = |path, overwrite| Output { path, overwrite, interrupted: &STOP };
    let out = dir.path().join("out");
    let moefy = moefied.moefy().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for result in [
        write_moefied(&source, &conversion::random(&mut rng), stop(&out, false)),
        restore(&moefied, stop(&out, false)),
        retune(&moefied, moefy, stop(&out, false)),
        retune(&moefied, moefy, stop(moefied.path(), true)),
    ] {
        assert!(matches!(result, Err(Error::Interrupted)));
    }
    assert_eq!(names(dir.path()), ["dense", "moe"]);
    assert!(files(moefied.path()) == old);
}

#[test]
fn conversions_that_do_not_fit_are_refused() {
    let (dir, source, moefied) = fixture(7, 1);
    let out = dir.path().join("out");
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let good = conversion::random(&mut rng);
    let refused = |source: &Folder, conversion: &Conversion, because: &str| {
        let error = write_moefied(source, conversion, to(&out)).unwrap_err().to_string();
        assert!(error.contains(because), "{error}");
        assert_eq!(names(dir.path()), ["dense", "moe"]);
    };
    refused(&moefied, &good, "is converted already");
    let mut conversion = good.clone();
    conversion.layers[0].layer = LAYERS;
    refused(&source, &conversion, "ascending order, below 2");
    let mut conversion = good.clone();
    conversion.layers = vec![good.layers[0].clone(), good.layers[0].clone()];
    refused(&source, &conversion, "ascending order");
    let mut conversion = good.clone();
    conversion.layers[0].partition = random_partition(&mut rng, 2 * INTERMEDIATE, 1, 0);
    conversion.layers[0].statistics = None;
    conversion.layers[0].selection = Selection::top_k(1);
    refused(&source, &conversion, "one for each of the 48 neurons");
    let mut conversion = good.clone();
    let wide = vec![0.0f32; conversion.layers[0].partition.num_experts() * (HIDDEN + 1)];
    let w = Tensor::matrix(wide, [conversion.layers[0].partition.num_experts(), HIDDEN + 1]);
    conversion.layers[0].router = Router::Linear { w: w.unwrap() };
    refused(&source, &conversion, "router: weight must be of shape");
    let mut conversion = good.clone();
    conversion.method.density_target = Some(f64::NAN);
    refused(&source, &conversion, "finite numbers");
    let mut statistics = random_statistics(&mut rng, good.layers[0].partition.num_experts());
    statistics.mean_k = f64::NAN;
    let mut conversion = good;
    conversion.layers[0].statistics = Some(statistics);
    refused(&source, &conversion, "finite numbers");

    let error = restore(&source, to(&out)).unwrap_err().to_string();
    assert!(error.contains("is not a converted model"), "{error}");
}
