//! Finds the CUDA compiler and asks what it is.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables that name the compiler itself.
pub const COMPILER_VARS: [&str; 2] = ["MOEFY_NVCC", "NVCC"];
/// Variables that name a toolkit, which holds `bin/nvcc`.
pub const TOOLKIT_VARS: [&str; 4] = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_PATH"];
const USUAL_TOOLKITS: [&str; 2] = ["/usr/local/cuda", "/opt/cuda"];

/// A compiler that runs.
pub struct Nvcc {
    /// With symlinks resolved: nvcc finds its own parts relative to where it lies.
    pub path: PathBuf,
    /// "13.0.88"
    pub version: String,
}

/// Why there is no compiler.
pub enum NotFound {
    /// A variable names one that does not work; falling back in silence would build something else
    /// than was asked for.
    Wrong(String),
    /// None of these places has one.
    Nowhere(String),
}

/// Looks at the variables, then on the PATH, then in the usual places.
pub fn find(var: impl Fn(&str) -> Option<OsString>) -> Result<Nvcc, NotFound> {
    let set = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let named = COMPILER_VARS.iter().filter_map(|name| Some((name, set(name)?)));
    let toolkits = TOOLKIT_VARS.iter().filter_map(|name| Some((name, set(name)?.join("bin/nvcc"))));
    if let Some((name, path)) = named.chain(toolkits).next() {
        let wrong =
            |problem| NotFound::Wrong(format!("{name} leads to {}: {problem}", path.display()));
        return ask(&path).map_err(wrong);
    }
    let mut looked = String::from("MOEFY_NVCC, NVCC and ");
    write!(looked, "{} are not set", TOOLKIT_VARS.join(", ")).expect("a String takes anything");
    let on_path = var("PATH").map(|dirs| std::env::split_paths(&dirs).collect::<Vec<_>>());
    let on_path = on_path.unwrap_or_default().into_iter().map(|dir| dir.join("nvcc"));
    let usual = USUAL_TOOLKITS.iter().map(|dir| Path::new(dir).join("bin/nvcc"));
    for path in on_path.chain(usual) {
        match ask(&path) {
            Ok(nvcc) => return Ok(nvcc),
            Err(problem) if path.exists() => {
                write!(looked, "; {}: {problem}", path.display()).expect("a String takes anything");
            }
            Err(_) => {}
        }
    }
    write!(looked, "; no nvcc on the PATH, nor in {}", USUAL_TOOLKITS.join(", "))
        .expect("a String takes anything");
    Err(NotFound::Nowhere(looked))
}

fn ask(path: &Path) -> Result<Nvcc, String> {
    let path = path.canonicalize().map_err(|error| error.to_string())?;
    let output =
        Command::new(&path).arg("--version").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    match parse_version(&text) {
        Some(version) if output.status.success() => Ok(Nvcc { path, version }),
        _ => Err(format!("`--version` said {text:?}")),
    }
}

/// "… release 13.0, V13.0.88" → "13.0.88"
pub fn parse_version(text: &str) -> Option<String> {
    let version = text.split(", V").nth(1)?.split_whitespace().next()?;
    let numeric = version.split('.').all(|part| part.parse::<u32>().is_ok());
    (numeric && version.contains('.')).then(|| version.to_owned())
}

/// ".version 9.0" → "9.0"
pub fn parse_ptx_isa(ptx: &str) -> Option<String> {
    let line = ptx.lines().find_map(|line| line.strip_prefix(".version "))?;
    Some(line.trim().to_owned())
}
