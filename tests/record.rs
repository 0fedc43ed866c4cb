//! The records of runs on real GPUs are those of the code that is here.

#[path = "../build/digest.rs"]
mod digest;

use std::path::Path;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

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
    record["bench"].as_array().is_none().then(|| "`bench` is missing".into())
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
    let good = serde_json::json!({
        "date": "2026-01-01", "device": "a GPU", "driver": "580", "toolkit": "13.0", "digest": "d",
        "tests": [{"name": "a", "result": "passed"}],
        "sanitizers": {"memcheck": 0, "racecheck": 0, "initcheck": 0, "synccheck": 0}, "bench": [],
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
}
