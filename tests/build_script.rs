//! How the build finds the CUDA compiler.

#[path = "../build/nvcc.rs"]
mod nvcc;

use std::ffi::OsString;
use std::path::Path;

use nvcc::{NotFound, find, parse_ptx_isa, parse_version};

fn with(vars: &[(&str, &str)]) -> Result<nvcc::Nvcc, NotFound> {
    let vars: Vec<(String, OsString)> =
        vars.iter().map(|(name, value)| (name.to_string(), value.into())).collect();
    find(|name| vars.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()))
}

/// What was found, or why nothing was.
fn found(vars: &[(&str, &str)]) -> nvcc::Nvcc {
    match with(vars) {
        Ok(nvcc) => nvcc,
        Err(NotFound::Wrong(why) | NotFound::Nowhere(why)) => panic!("not found: {why}"),
    }
}

#[test]
fn a_wrong_explicit_compiler_is_an_error() {
    for name in ["MOEFY_NVCC", "NVCC", "CUDA_HOME"] {
        let Err(NotFound::Wrong(problem)) = with(&[(name, "/does/not/exist")]) else {
            panic!("{name} was ignored")
        };
        assert!(problem.contains(name) && problem.contains("/does/not/exist"), "{problem}");
    }
    // It runs, but it is no nvcc.
    assert!(matches!(with(&[("NVCC", "/bin/true")]), Err(NotFound::Wrong(_))));
}

// The compiler is a file of the repository: a program that a test writes cannot be run ("text file busy") while a child
// that another thread has just forked still holds it open for writing.
#[cfg(unix)]
#[test]
fn variables_come_before_the_path_and_links_are_followed() {
    let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/toolkit/bin");
    let real = bin.join("nvcc").canonicalize().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let named = found(&[("MOEFY_NVCC", link.to_str().unwrap()), ("PATH", "/nowhere")]);
    assert_eq!((named.path, named.version.as_str()), (real.clone(), "13.0.88"));
    let on_path = found(&[("NVCC", ""), ("PATH", bin.to_str().unwrap())]);
    assert_eq!(on_path.path, real);
}

#[test]
fn says_where_it_looked() {
    // A machine may have a toolkit in a usual place.
    if let Err(NotFound::Nowhere(looked)) = with(&[("PATH", "/nowhere")]) {
        assert!(looked.contains("CUDA_HOME") && looked.contains("/usr/local/cuda"), "{looked}");
    }
}

#[test]
fn versions_are_read() {
    let said = "Cuda compilation tools, release 12.9, V12.9.41\nBuild x";
    assert_eq!(parse_version(said).as_deref(), Some("12.9.41"));
    assert_eq!(parse_version("gcc (Debian 12.2.0-14) 12.2.0"), None);
    assert_eq!(parse_ptx_isa("// a\n.version 9.0\n.target sm_80").as_deref(), Some("9.0"));
}
