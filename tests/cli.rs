//! The command as scripts use it: exit codes, JSON, one-sentence errors, no partial output.
#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use assert_cmd::Command;
use common::{TinyBert, VOCAB, read_tensors};
use moefy::DType;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with a tiny model `dense`, calibration text `text`, and sentence pairs `sts`.
struct Scene(TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Self(TempDir::new().unwrap());
        TinyBert::new(1, DType::F32).write(&scene.path("dense"));
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut sentence = || {
            let words = rng.random_range(4..20);
            let word = |_| VOCAB[rng.random_range(5..26)];
            (0..words).map(word).collect::<Vec<_>>().join(" ")
        };
        let text: String = (0..400).map(|_| sentence() + "\n").collect();
        let sts: String =
            (0..20).map(|i| format!("\"{}\",\"{}\",{i}\n", sentence(), sentence())).collect();
        fs::write(scene.path("text"), text).unwrap();
        fs::write(scene.path("sts"), sts).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn moefy(&self, arguments: &str) -> Command {
        let mut command = Command::cargo_bin("moefy").unwrap();
        command.current_dir(self.0.path()).args(arguments.split_whitespace());
        command
    }

    fn json(&self, arguments: &str) -> Value {
        let output = self.moefy(arguments).assert().success().get_output().stdout.clone();
        serde_json::from_slice(&output).unwrap()
    }

    /// Exit code 1, nothing on standard output, and one sentence that holds all of `words`.
    fn refuses(&self, arguments: &str, words: &[&str]) {
        let before = self.listing();
        let output = self.moefy(arguments).assert().code(1).get_output().clone();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.stdout.is_empty(), "{arguments}");
        assert_eq!(error.lines().count(), 1, "{arguments}: {error}");
        assert!(error.starts_with("error: "), "{error}");
        for word in words {
            assert!(error.contains(word), "{arguments}: no `{word}` in: {error}");
        }
        assert_eq!(self.listing(), before, "{arguments} left something behind");
    }

    fn listing(&self) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Options in `more` override those of [`CONVERT`].
    fn convert(&self, out: &str, more: &str) {
        let arguments = CONVERT.replacen("OUT", out, 1);
        self.moefy(&format!("{arguments} --calibration text {more}")).assert().success();
    }
}

const CONVERT: &str = "convert dense OUT --experts 8 --partition kmeans --router d2dmoe \
                       --density 0.4 --seed 0";

#[test]
fn convert_inspect_eval_retune_restore() {
    let scene = Scene::new();
    scene.convert("moe", "");

    let inspected = scene.json("inspect moe --json");
    let layers = inspected["moefy"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), common::LAYERS);
    assert_eq!(layers[0]["num_experts"], 8);
    let densities = layers.iter().map(|l| l["statistics"]["density"].as_f64().unwrap());
    let calibrated = densities.sum::<f64>() / layers.len() as f64;
    assert!((calibrated - 0.4).abs() < 0.05, "calibrated to {calibrated}");

    let report = scene.json("eval moe --reference dense --text text --sts sts --sweep --json");
    for key in ["spearman", "sts_density", "density", "hidden_error", "embedding_cosine"] {
        assert!(report[key].is_number(), "{key}: {report}");
        assert!(report["points"].as_array().unwrap().iter().all(|point| point[key].is_number()));
    }
    for key in ["model", "ffn"] {
        assert!(report["flops_saved"][key].is_number() && report["tokens_per_s"][key].is_number());
    }
    assert!((report["density"].as_f64().unwrap() - 0.4).abs() < 0.08, "{report}");
    assert_eq!(report["layers"].as_array().unwrap().len(), common::LAYERS);
    // Everything selected is the dense model; hardly anything selected is far from it.
    let points = report["points"].as_array().unwrap();
    let error = |tau: f64| {
        let point =
            points.iter().find(|p| (p["rel_threshold"].as_f64().unwrap() - tau).abs() < 1e-6);
        point.unwrap()["hidden_error"].as_f64().unwrap()
    };
    assert!(error(0.0) < 1e-5, "{}", error(0.0));
    assert!(error(0.9) > 100.0 * error(0.0), "{}", error(0.9));
    assert!(report["zero_ffn"]["hidden_error"].as_f64().unwrap() > error(0.5));

    scene.moefy("retune moe all --rel-threshold 0").assert().success();
    let all = scene.json("eval all --text text --json");
    assert_eq!(all["density"], 1.0);
    assert!(all["hidden_error"].as_f64().unwrap() < 1e-5);
    assert_eq!(read_tensors(&scene.path("all")), read_tensors(&scene.path("moe")));

    scene.moefy("retune moe dense-ish --density 0.8 --calibration text").assert().success();
    let tuned = scene.json("eval dense-ish --text text --json")["density"].as_f64().unwrap();
    assert!((tuned - 0.8).abs() < 0.08, "{tuned}");

    scene.moefy("retune moe half --dtype f16").assert().success();
    let counted = scene.json("inspect moe --text text --json");
    let counted = counted["moefy"]["layers"].as_array().unwrap();
    for (layer, measured) in counted.iter().zip(report["layers"].as_array().unwrap()) {
        let of = |layer: &Value, key: &str| layer[key].as_f64().unwrap();
        let (got, expected) = (of(&layer["statistics"], "density"), of(measured, "density"));
        // Other batches round differently, and a close score may decide otherwise.
        assert!((got - expected).abs() < 1e-3, "{got} against {expected}");
    }
    let half = read_tensors(&scene.path("half"));
    for (name, tensor) in read_tensors(&scene.path("moe")) {
        let is_float = tensor.dtype == Dtype::F32;
        let expected = if is_float { Dtype::F16 } else { tensor.dtype };
        assert_eq!(half[&name].dtype, expected, "{name}");
        assert_eq!(half[&name].shape, tensor.shape, "{name}");
    }
    let rounded = scene.json("eval half --reference dense --text text --json");
    for (key, most) in [("density", 0.01), ("embedding_cosine", 0.01)] {
        let of = |report: &Value| report[key].as_f64().unwrap();
        assert!((of(&rounded) - of(&report)).abs() < most, "{key}: {rounded}");
    }

    let budget = 0.5 * report["hidden_error"].as_f64().unwrap();
    let retune = format!("--max-error {budget} --reference dense --calibration text");
    scene.moefy(&format!("retune moe close {retune}")).assert().success();
    let close = scene.json("eval close --reference dense --text text --json");
    assert!(close["hidden_error"].as_f64().unwrap() < 1.05 * budget, "{close} for {budget}");
    assert!(close["density"].as_f64().unwrap() < 1.0, "{close}");

    scene.moefy("restore moe restored").assert().success();
    assert_eq!(read_tensors(&scene.path("restored")), read_tensors(&scene.path("dense")));
    let config = |folder: &str| common::read_json(&scene.path(folder).join("config.json"));
    assert_eq!(config("restored"), config("dense"));
    for file in ["LICENSE", "README.md", "tokenizer.json", "1_Pooling/config.json"] {
        let read = |folder: &str| fs::read(scene.path(folder).join(file)).unwrap();
        assert_eq!(read("moe"), read("dense"), "{file}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_threads() {
    let scene = Scene::new();
    scene.convert("one", "--threads 1");
    scene.convert("three", "--threads 3");
    scene.convert("other", "--seed 1");
    let bytes = |folder: &str, file: &str| fs::read(scene.path(folder).join(file)).unwrap();
    for file in ["model.safetensors", "config.json"] {
        assert_eq!(bytes("one", file), bytes("three", file), "{file}");
        assert_ne!(bytes("one", file), bytes("other", file), "{file}");
    }
}

#[test]
fn every_method_converts() {
    let scene = Scene::new();
    for (index, (options, records)) in [
        ("--partition random --threshold-scope layer", ["partition", "random"]),
        ("--partition joint --compensation linear --rank 3", ["compensation", "linear"]),
        ("--router moefication --selection top-k --epochs 2", ["router", "moefication"]),
        ("--router centroid --selection cumulative-share", ["router", "centroid"]),
        ("--compensation mean --shared 8 --shared-by frequency", ["compensation", "mean"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("moe{index}");
        scene.convert(&out, options);
        let inspected = scene.json(&format!("inspect {out} --json"));
        let [key, value] = records;
        assert_eq!(inspected["moefy"]["method"][key], value, "{options}");
        let report = scene.json(&format!("eval {out} --text text --json"));
        let density = report["density"].as_f64().unwrap();
        assert!((density - 0.4).abs() < 0.1, "{options}: density {density}");
    }
}

#[test]
fn every_layer_can_have_a_rank_of_its_own() {
    let scene = Scene::new();
    scene.convert("moe", "--compensation linear --rank 3,5");
    let inspected = scene.json("inspect moe --json");
    let layers = inspected["moefy"]["layers"].as_array().unwrap();
    let ranks: Vec<&Value> = layers.iter().map(|layer| &layer["compensation"]["rank"]).collect();
    assert_eq!(ranks, [3, 5]);
    let arguments = CONVERT.replacen("OUT", "out", 1) + " --calibration text";
    for (options, words) in [
        ("--compensation linear --rank 3,5,7", ["ranks", "2 layers"]),
        ("--compensation linear --rank 3,0", ["rank", "between 1 and 32"]),
        ("--compensation linear --rank 33", ["rank", "between 1 and 32"]),
        ("--rank 3,5", ["--rank", "--compensation linear"]),
    ] {
        scene.refuses(&format!("{arguments} {options}"), &words);
    }
}

#[test]
fn pictures_and_words() {
    let scene = Scene::new();
    let arguments = CONVERT.replacen("OUT", "layered", 1) + " --calibration text --explain";
    let output = scene.moefy(&format!("{arguments} --threshold-scope layer")).assert().success();
    let words = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    for layer in 0..common::LAYERS {
        assert!(words.contains(&format!("\nLayer {layer}: a token runs every expert")), "{words}");
    }
    scene.convert("shared", "");
    let sweep = "eval layered shared --text text --sts sts --sweep --json --svg sweep.svg";
    let reports = scene.json(sweep);
    let points = |model: usize| reports[model]["points"].as_array().unwrap();
    assert!(points(0).iter().all(|point| point["rel_threshold"].is_null()));
    assert!(points(1).iter().all(|point| point["rel_threshold"].is_number()));
    let density = |point: &Value| point["density"].as_f64().unwrap();
    for model in 0..2 {
        let densities: Vec<f64> = points(model).iter().map(density).collect();
        assert!(densities.is_sorted() && densities[0] < 0.3, "{densities:?}");
        assert_eq!(densities.last(), Some(&1.0));
    }
    // As stored.
    let own = points(0).iter().find(|point| point["threshold_exponent"] == 1.0).unwrap();
    assert_eq!(own["hidden_error"], reports[0]["hidden_error"]);

    scene.moefy("inspect shared --svg use.svg").assert().success();
    for (file, words) in [
        ("sweep.svg", ["hidden error", "STS Spearman", "layered", "shared"]),
        ("use.svg", ["layer 0", "layer 1", "tokens that run it", "most used first"]),
    ] {
        let picture = fs::read_to_string(scene.path(file)).unwrap();
        words.iter().for_each(|word| assert!(picture.contains(word), "{file} lacks {word}"));
    }
}

#[test]
fn compensation_and_refinement_come_closer_to_the_dense_model() {
    let scene = Scene::new();
    let error_of = |out: &str, options: &str| {
        scene.convert(out, options);
        let report = scene.json(&format!("eval {out} --reference dense --text text --json"));
        report["hidden_error"].as_f64().unwrap()
    };
    let plain = error_of("plain", "--threshold-scope layer");
    let linear = "--threshold-scope layer --compensation linear --rank 8";
    let compensated = error_of("compensated", linear);
    assert!(compensated < 0.9 * plain, "{compensated} is not below {plain}");
    let refined = error_of("refined", &format!("{linear} --refine 150000"));
    assert!(refined < 0.95 * compensated, "{refined} is not below {compensated}");
    scene.refuses("eval refined --text text", &["refined", "reference"]);
    let budget = "retune refined out --max-error 1 --calibration text";
    scene.refuses(budget, &["refined", "reference"]);
    scene.refuses("restore refined dense-again", &["refined", "was converted from"]);
    let arguments = CONVERT.replacen("OUT", "mean", 1) + " --calibration text --refine 9";
    scene.refuses(&format!("{arguments} --compensation mean"), &["refine", "mean"]);
}

#[test]
fn a_dense_model_evaluates_as_itself() {
    let scene = Scene::new();
    let report = scene.json("eval dense --text text --sts sts --json");
    assert_eq!(report["density"], 1.0);
    assert_eq!(report["hidden_error"], 0.0);
    assert_eq!(report["spearman"], report["dense"]["spearman"]);
    assert!(report["zero_ffn"]["hidden_error"].as_f64().unwrap() > 0.0);
}

#[test]
fn embeddings_have_unit_length_and_keep_their_order() {
    let scene = Scene::new();
    fs::write(scene.path("three"), "the cat sat\n\nthe dog ran over the old mat\na bird\n")
        .unwrap();
    let rows = scene.json("embed dense --text three --json");
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let mut alone = scene.moefy("embed dense --json");
        let alone = alone.arg(text).assert().success().get_output().stdout.clone();
        let alone: Value = serde_json::from_slice(&alone).unwrap();
        // Matrix products of other sizes round differently.
        let values = |row: &Value| -> Vec<f64> {
            row["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let (alone, row) = (values(&alone[0]), values(row));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        assert!((dot(&row, &row) - 1.0).abs() < 1e-5);
        assert!((dot(&row, &alone) - 1.0).abs() < 1e-5);
    }
}

#[test]
fn bad_input_is_one_sentence_and_leaves_nothing() {
    let scene = Scene::new();
    fs::write(scene.path("empty"), "\n \n").unwrap();
    fs::write(scene.path("tiny"), "the cat\n").unwrap();
    fs::write(scene.path("binary"), [0xff, 0xfe, 0x00]).unwrap();
    let convert = |more: &str| format!("convert dense out --density 0.4 {more}");
    let text = "--calibration text";
    scene.refuses(&convert(&format!("{text} --experts 7")), &["num_experts", "48", "7"]);
    scene.refuses(&convert(&format!("{text} --experts 0")), &["num_experts", "0"]);
    scene.refuses(&convert(&format!("{text} --experts 8 --shared 48")), &["shared", "48"]);
    scene.refuses(&convert("--experts 8 --calibration empty"), &["empty", "blank"]);
    scene.refuses(&convert("--experts 8 --calibration tiny"), &["calibration", "tokens"]);
    scene.refuses(&convert("--experts 8 --calibration binary"), &["binary", "UTF-8"]);
    scene.refuses(&convert("--experts 8 --calibration missing"), &["missing", "No such file"]);
    let density = "convert dense out --experts 8 --calibration text --density 1.5";
    scene.refuses(density, &["density", "1.5"]);
    scene.refuses("convert missing out --experts 8 --density 0.4 --calibration text", &["missing"]);
    scene.refuses("convert text out --experts 8 --density 0.4 --calibration text", &["text"]);
    scene.refuses("convert dense text --experts 8 --density 0.4 --calibration text", &["text"]);
    scene.refuses("eval dense --text text --device cuda", &["no GPU can be used"]);
    scene.refuses("inspect dense --device cuda", &["--device", "--text"]);
    scene.refuses("check dense", &["no GPU can be used"]);
    scene.refuses("eval dense --text text --max-tokens 1", &["--max-tokens"]);
    scene.refuses("eval dense --sts text", &["line 1"]);
    scene.refuses("restore dense out", &["dense"]);
    scene.refuses("retune dense out --rel-threshold 0.5", &["dense"]);
    scene.convert("moe", "");
    scene.refuses("retune moe out --rel-threshold 1.5", &["rel_threshold", "1.5"]);
    let impossible = "retune moe out --max-error -1 --calibration text";
    scene.refuses(&impossible.replace(" -1", "=-1"), &["max_error", "at least 0."]);
    scene.refuses("retune moe dense --dtype f16", &["dense", "exists"]);
    scene.refuses("convert moe out --experts 8 --density 0.4 --calibration text", &["converted"]);
    scene.refuses("restore moe dense", &["dense", "exists"]);
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let scene = Scene::new();
    for arguments in ["", "frobnicate", "convert dense", "eval dense", "eval dense --threads 0"] {
        scene.moefy(arguments).assert().code(2);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn wrong_benchmarks_are_refused_before_a_gpu_is_looked_for() {
    let scene = Scene::new();
    let usage = [
        "",
        "--named d768-e7",
        "--named d768-e96 --path nowhere",
        "--named d768-e96 --tokens 0",
        "--named d768-e96 --density 1.1",
        "--named d768-e96 --routing trace:none",
        "--named d768-e96 --set b4",
        "--d-model 64 --d-ff 96",
    ];
    for arguments in usage {
        scene.moefy(&format!("bench ffn {arguments}")).assert().code(2);
    }
    let refuses = |arguments: &str, words: &[&str]| {
        scene.refuses(&format!("bench ffn {arguments}"), words);
    };
    refuses("--d-model 63 --d-ff 96 --experts 4", &["d_model", "63"]);
    refuses("--d-model 64 --d-ff 96 --experts 5", &["num_experts", "96", "5"]);
    refuses("--named d768-e96 --routing missing.npy", &["missing.npy", "No such file"]);
    refuses("--named d768-e96 --routing trace:minilm-e48-layer0", &["96", "[22213, 6]"]);
    fs::write(scene.path("text.npy"), "text").unwrap();
    refuses("--named d768-e96 --routing text.npy", &["text.npy", ".npy file"]);
}

/// The record of this repository as a picture.
#[cfg(feature = "cuda")]
#[test]
fn rows_that_were_measured_earlier() {
    let scene = Scene::new();
    let record = concat!(env!("CARGO_MANIFEST_DIR"), "/verification/h100.json");
    let plot = |rest: &str| format!("bench plot {record} --svg speedup.svg {rest}");
    scene.moefy(&plot("--tokens 1")).assert().success();
    let picture = fs::read_to_string(scene.path("speedup.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("d4096"), "{picture}");
    scene.refuses(&plot("--tokens 3"), &["h100.json", "no row", "tokens"]);
    fs::write(scene.path("rows.txt"), "{}").unwrap();
    scene
        .refuses("bench plot rows.txt --svg speedup.svg", &["rows.txt", "line 1", "missing field"]);
    scene.refuses("bench plot missing --svg speedup.svg", &["missing", "No such file"]);
}

/// What is wrong is said before a GPU is looked for, and nothing is written.
#[cfg(feature = "cuda")]
#[test]
fn wrong_tunings_are_refused() {
    let scene = Scene::new();
    for arguments in [
        "",
        "--named d768-e7",
        "--named d768-e96 --tokens 0",
        "--named d768-e96 --density 1.1",
        "--named d768-e96 --quick --tokens 1",
        "--named d768-e96 --model dense",
        "--model dense --router linear",
    ] {
        scene.moefy(&format!("tune {arguments}")).assert().code(2);
    }
    let refuses = |arguments: &str, words: &[&str]| {
        scene.refuses(&format!("tune {arguments}"), words);
    };
    refuses("--d-model 64 --d-ff 96 --experts 5", &["num_experts", "96", "5"]);
    refuses("--model missing", &["missing"]);
    refuses("--model dense", &["dense", "converted"]);
    refuses("--named d768-e96 --out text", &["text", "moefy tune"]);
    refuses("--named d768-e96 --out nowhere/tuning.json", &["nowhere", "make it first"]);
    assert!(fs::read_to_string(scene.path("text")).unwrap().lines().count() == 400);
}

/// What needs a GPU says so in one sentence where there is none.
#[cfg(feature = "cuda")]
#[test]
fn commands_without_a_gpu() {
    let scene = Scene::new();
    if let Err(error) = moefy::cuda::Device::open(0) {
        println!("SKIPPED no GPU: {error}");
        scene.refuses("check", &["no GPU can be used"]);
        scene.refuses("bench ffn --named d768-e96 --json", &["no GPU can be used"]);
        scene.refuses("tune --named d768-e96 --out tuning.json", &["no GPU can be used"]);
        scene.convert("moe", "");
        scene.refuses("tune --model moe --out tuning.json", &["no GPU can be used"]);
        return;
    }
    let checked = scene.json("check --json");
    assert_eq!(checked["failed"], 0, "{checked}");
    let run =
        "bench ffn --d-model 64 --d-ff 96 --experts 4 --tokens 1,9 --density 0.5 --quiet --json";
    let output = scene.moefy(run).assert().success().get_output().stdout.clone();
    let rows: Vec<Value> = String::from_utf8(output)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[1]["tokens"], &rows[1]["density"]), (&9.into(), &0.5.into()));
    scene.convert("moe", "");
    for layers in ["--model moe", "--d-model 64 --d-ff 96 --experts 4 --dtype f16"] {
        let tune = "tune --tokens 1,9 --density 0.1,0.5 --out tuning.json --json";
        let tuned = scene.json(&format!("{tune} {layers}"));
        assert!(tuned["changes"].is_array(), "{tuned}");
    }
    let tuning = moefy::cuda::Tuning::load(&scene.path("tuning.json")).unwrap();
    assert_eq!(tuning.layers.len(), 2);
    assert!(tuning.layers.iter().all(|layer| layer.times.iter().any(|time| time.tokens == 9)));
}

#[test]
fn an_old_output_survives_unless_it_is_replaced() {
    let scene = Scene::new();
    scene.convert("moe", "");
    let old = read_tensors(&scene.path("moe"));
    scene.refuses(&CONVERT.replacen("OUT", "moe --calibration text", 1), &["moe", "exists"]);
    assert_eq!(read_tensors(&scene.path("moe")), old);
    scene.convert("moe", "--overwrite --seed 5");
    assert_ne!(read_tensors(&scene.path("moe")), old);
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let scene = Scene::new();
    let before = scene.listing();
    // Enough text that the conversion is still under way when the signal comes.
    let text = fs::read_to_string(scene.path("text")).unwrap().repeat(200);
    fs::write(scene.path("text"), text).unwrap();
    let binary = assert_cmd::cargo::cargo_bin("moefy");
    let mut child = std::process::Command::new(binary)
        .current_dir(scene.0.path())
        .args(CONVERT.split_whitespace())
        .args(["--calibration", "text", "--calibration-tokens", "1000000"])
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let signalled =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(signalled.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(scene.listing(), before);
}

/// What a command would do in vain, or to no effect, is said before it begins.
#[test]
fn options_without_effect_are_refused() {
    let scene = Scene::new();
    scene.convert("moe", "");
    let convert = format!("{} --calibration text", CONVERT.replacen("OUT", "out", 1));
    for (more, words) in [
        ("--router centroid --router-hidden 8", ["--router-hidden", "--router d2dmoe"]),
        ("--explain --json", ["--explain", "without --json"]),
        ("--router-hidden 100000000", ["hidden units", "65536"]),
    ] {
        scene.refuses(&format!("{convert} {more}"), &words);
    }
    scene.refuses("inspect dense --text text", &["dense", "--text"]);
    scene.refuses("inspect dense --svg use.svg", &["dense", "--svg"]);
    scene.refuses("embed dense --dtype f32 word", &["--dtype", "--device cuda"]);
    scene.refuses("eval moe --text text --no-tuning", &["--no-tuning", "--device cuda"]);
    for wrong in [
        "retune moe out --rel-threshold 0.5 --threshold-scope layer",
        &format!("{convert} --shared-by frequency"),
    ] {
        scene.moefy(wrong).assert().code(2);
    }
    // Everything that is read later is looked at first.
    scene.refuses("eval moe missing --text text", &["missing"]);
    scene.refuses("eval moe --text text --sts missing", &["missing"]);
    scene.refuses("eval moe --text text --sweep --svg missing/x.svg", &["missing/x.svg"]);
}

/// A model that was refined is no dense original.
#[test]
fn a_refined_model_is_no_reference() {
    let scene = Scene::new();
    scene.convert("refined", "--refine 64");
    scene.refuses("eval refined --text text", &["refined", "the reference"]);
    for command in [
        "eval refined --reference refined --text text",
        "retune refined out --max-error 0.5 --calibration text --reference refined",
    ] {
        scene.refuses(command, &["refined", "no dense original"]);
    }
}

#[cfg(unix)]
#[test]
fn places_where_nothing_can_be_written() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let scene = Scene::new();
    scene.convert("moe", "");
    std::os::unix::fs::symlink("nowhere", scene.path("link")).unwrap();
    fs::create_dir(scene.path("empty")).unwrap();
    scene.refuses("retune moe link --rel-threshold 0.5", &["link", "leads nowhere"]);
    let here = |command: &str| {
        let mut command = scene.moefy(command);
        command.current_dir(scene.path("empty"));
        command.assert().code(1).get_output().stderr.clone()
    };
    let error = String::from_utf8(here("retune ../moe . --rel-threshold 0.5")).unwrap();
    assert!(error.contains("the current folder"), "{error}");
    assert_eq!(fs::read_dir(scene.path("empty")).unwrap().count(), 0);

    // What was printed into nothing is no success.
    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let program = assert_cmd::cargo::cargo_bin("moefy");
        let mut inspect = std::process::Command::new(program);
        inspect.args(["inspect", "moe"]).current_dir(scene.path("")).stdout(full);
        let output = inspect.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(error.starts_with("error: cannot write to standard output: "), "{error}");
    }

    // Names of files need not be UTF-8, but JSON is.
    let odd = scene.0.path().join(OsStr::from_bytes(b"m\xff"));
    fs::rename(scene.path("moe"), &odd).unwrap();
    for command in ["inspect", "eval --text text"] {
        let mut command = scene.moefy(command);
        let output = command.arg(&odd).arg("--json").assert().success().get_output().stdout.clone();
        let value: Value = serde_json::from_slice(&output).unwrap();
        assert!(value["model"].as_str().unwrap().ends_with("m\u{fffd}"), "{value}");
    }
}
