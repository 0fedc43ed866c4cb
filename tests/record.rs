//! The records of runs on real GPUs are those of the code that is here.

#[path = "../build/digest.rs"]
mod digest;

use std::path::Path;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Of a row, in order.
const BENCH_KEYS: [&str; 24] = [
    "d_model",
    "d_ff",
    "glu",
    "activation",
    "num_experts",
    "shared",
    "dtype",
    "router",
    "tokens",
    "routing",
    "density",
    "fallback",
    "path",
    "path_forced",
    "us",
    "dense_us",
    "speedup",
    "spread",
    "bound_us",
    "share_of_bound",
    "executed_bytes",
    "router_select_us",
    "index_us",
    "experts_us",
];

/// Of a row of whole models, in order.
const MODEL_KEYS: [&str; 13] = [
    "model",
    "dtype",
    "batch",
    "length",
    "density",
    "fallback",
    "tokens_per_s",
    "dense_tokens_per_s",
    "torch_tokens_per_s",
    "us",
    "dense_us",
    "share_ffn",
    "dense_share_ffn",
];

/// What is wrong with a record, if anything.
fn problem(record: &Value, digest: &str) -> Option<String> {
    for key in ["date", "device", "driver", "toolkit"] {
        if record[key].as_str().is_none_or(str::is_empty) {
            return Some(format!("`{key}` is missing"));
        }
    }
    if record["digest"] != digest {
        return Some(format!("it is of the sources {}, and these are {digest}", record["digest"]));
    }
    let empty = Vec::new();
    let tests = record["tests"].as_array().unwrap_or(&empty);
    if tests.is_empty() {
        return Some("it has no tests".into());
    }
    if let Some(test) = tests.iter().find(|test| test["result"] != "passed") {
        return Some(format!("{} {}", test["name"], test["result"]));
    }
    for tool in ["memcheck", "racecheck", "initcheck", "synccheck"] {
        if record["sanitizers"][tool] != 0 {
            return Some(format!("{tool} found {} errors", record["sanitizers"][tool]));
        }
    }
    if !tests
        .iter()
        .any(|test| test["name"].as_str().is_some_and(|name| name.starts_with("model: ")))
    {
        return Some("it has no checks of a model".into());
    }
    if !tests.iter().any(|test| test["name"].as_str().is_some_and(|name| name.contains("Spearman")))
    {
        return Some("no pairs were ranked: make the bundle with MOEFY_STS".into());
    }
    let keys = |row: &Value| row.as_object().map(|row| row.keys().cloned().collect::<Vec<_>>());
    for (list, expected) in [("bench", &BENCH_KEYS[..]), ("model_bench", &MODEL_KEYS)] {
        let rows = record[list].as_array().unwrap_or(&empty);
        if rows.is_empty() {
            return Some(format!("`{list}` has no rows"));
        }
        let wrong = rows.iter().find(|row| keys(row).is_none_or(|keys| keys != expected));
        if let Some(row) = wrong {
            return Some(format!("a row of `{list}` has other keys: {row}"));
        }
    }
    None
}

#[test]
fn records_are_current() {
    let folder = root().join("verification");
    let stale = std::fs::read_to_string(folder.join("STALE")).unwrap_or_default();
    if !stale.trim().is_empty() {
        println!("the records are allowed to be old: {}", stale.trim());
        return;
    }
    let digest = digest::digest(root()).unwrap();
    let entries =
        std::fs::read_dir(&folder).expect("verification/").map(|entry| entry.unwrap().path());
    let mut records =
        entries.filter(|path| path.extension().is_some_and(|ext| ext == "json")).peekable();
    assert!(records.peek().is_some(), "{} holds no record", folder.display());
    for path in records {
        let record = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let problem = problem(&record, &digest);
        assert_eq!(
            problem,
            None,
            "{}: run `make gpu-bundle`, then run.sh of gpu-bundle/ on a GPU machine, and commit its \
             record.json; or say in one line of verification/STALE why that cannot be done yet",
            path.display()
        );
    }
}

#[test]
fn wrong_records_are_found() {
    let row = |keys: &[&str]| keys.iter().map(|key| (key.to_string(), Value::from(1))).collect();
    let (row, model_row): (Value, Value) = (row(&BENCH_KEYS), row(&MODEL_KEYS));
    let good = serde_json::json!({
        "date": "2026-01-01", "device": "a GPU", "driver": "580", "toolkit": "13.0", "digest": "d",
        "tests": [{"name": "model: Spearman", "result": "passed"}],
        "sanitizers": {"memcheck": 0, "racecheck": 0, "initcheck": 0, "synccheck": 0}, "bench": [row],
        "model_bench": [model_row],
    });
    assert_eq!(problem(&good, "d"), None);
    let with = |key: &str, value: Value| {
        let mut record = good.clone();
        record[key] = value;
        problem(&record, "d").unwrap()
    };
    assert!(problem(&good, "other").unwrap().contains("other"));
    assert!(with("driver", Value::Null).contains("driver"));
    assert!(with("tests", serde_json::json!([])).contains("no tests"));
    assert!(
        with("tests", serde_json::json!([{"name": "a", "result": "skipped"}])).contains("skipped")
    );
    assert!(with("sanitizers", serde_json::json!({"memcheck": 1})).contains("memcheck"));
    assert!(with("bench", serde_json::json!([])).contains("no rows"));
    assert!(with("bench", serde_json::json!([{"us": 1}])).contains("other keys"));
    assert!(with("model_bench", serde_json::json!([])).contains("no rows"));
    assert!(with("model_bench", serde_json::json!([{"us": 1}])).contains("other keys"));
    let others = serde_json::json!([{"name": "a", "result": "passed"}]);
    assert!(with("tests", others).contains("no checks of a model"));
}

#[test]
fn the_digest_is_of_sources_not_of_notes() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let write = |file: &str, text: &str| {
        let file = root.join(file);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
        digest::digest(root)
    };
    for file in ["build/compile.rs", "build.rs", "src/abi.rs", "src/cuda/plan.rs"] {
        let _ = write(file, "");
    }
    let before = write("kernels/sm90/a.cu", "").unwrap();
    assert_eq!(write("kernels/NOTES.md", "measured").unwrap(), before);
    assert_eq!(write("src/cpu/mod.rs", "elsewhere").unwrap(), before);
    for file in ["kernels/sm90/a.cu", "kernels/include/a.cuh", "src/cuda/bench/mod.rs", "build.rs"]
    {
        assert_ne!(write(file, "changed").unwrap(), before, "{file}");
    }
}
