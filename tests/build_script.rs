//! How the build finds the CUDA compiler.

#[path = "../build/nvcc.rs"]
mod nvcc;

use std::ffi::OsString;

use nvcc::{NotFound, find, parse_ptx_isa, parse_version};

fn with(vars: &[(&str, &str)]) -> Result<nvcc::Nvcc, NotFound> {
    let vars: Vec<(String, OsString)> =
        vars.iter().map(|(name, value)| (name.to_string(), value.into())).collect();
    find(|name| vars.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()))
}

#[cfg(unix)]
fn fake_toolkit() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let nvcc = folder.path().join("bin/nvcc");
    std::fs::create_dir(folder.path().join("bin")).unwrap();
    std::fs::write(&nvcc, "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        .unwrap();
    std::fs::set_permissions(&nvcc, std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
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

#[cfg(unix)]
#[test]
fn variables_come_before_the_path_and_links_are_followed() {
    let toolkit = fake_toolkit();
    let real = toolkit.path().join("bin/nvcc").canonicalize().unwrap();
    let link = toolkit.path().join("link");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let found = with(&[("MOEFY_NVCC", link.to_str().unwrap()), ("PATH", "/nowhere")]);
    let Ok(found) = found else { panic!("not found") };
    assert_eq!((found.path, found.version.as_str()), (real.clone(), "13.0.88"));
    let bin = toolkit.path().join("bin");
    let Ok(found) = with(&[("NVCC", ""), ("PATH", bin.to_str().unwrap())]) else {
        panic!("not found on the PATH")
    };
    assert_eq!(found.path, real);
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
