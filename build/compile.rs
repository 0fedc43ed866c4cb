//! Runs nvcc, several files at a time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::nvcc::{Nvcc, parse_ptx_isa};

const FLAGS: [&str; 9] = [
    "-O3",
    "-std=c++17",
    "-Ikernels/include",
    "--Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra,-Werror",
    "-Xcudafe",
    "--display_error_number",
];
/// PTX for what comes after the cards we know, and machine code for those.
const PORTABLE: [&str; 2] = ["-gencode=arch=compute_80,code=[compute_80,sm_80]", HOPPER[0]];
/// `kernels/sm90`: uses instructions that no other generation has.
const HOPPER: [&str; 1] = ["-gencode=arch=compute_90a,code=sm_90a"];

/// Compiles every `.cu` file under `kernels` to `out_dir/<module>.fatbin`; returns the modules, sorted: `select` for
/// `select.cu`, `sm90_experts` for `sm90/experts.cu`.
pub fn compile(nvcc: &Nvcc, kernels: &Path, out_dir: &Path) -> Result<Vec<String>, String> {
    let sources = |dir: PathBuf| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| path.extension().is_some_and(|ext| ext == "cu")).collect::<Vec<_>>()
    };
    let job = |path: PathBuf, prefix: &str, arch: &'static [&'static str]| {
        let stem = path.file_stem().expect("it has an extension").to_string_lossy();
        Job { module: format!("{prefix}{stem}"), path: path.clone(), arch }
    };
    let portable = sources(kernels.into()).into_iter().map(|path| job(path, "", &PORTABLE));
    let hopper = sources(kernels.join("sm90")).into_iter().map(|path| job(path, "sm90_", &HOPPER));
    let mut jobs: Vec<Job> = portable.chain(hopper).collect();
    jobs.sort_by(|a, b| a.module.cmp(&b.module));

    let headers = headers(&kernels.join("include"));
    let threads = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let problems = Mutex::new(String::new());
    std::thread::scope(|scope| {
        for _ in 0..usize::min(threads, jobs.len()) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(problem) = job.run(nvcc, &headers, out_dir) {
                        problems.lock().expect("nobody panics while holding it").push_str(&problem);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("nobody panics while holding it");
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(jobs.into_iter().map(|job| job.module).collect())
}

/// The PTX version that this compiler writes, from a file that it wrote.
pub fn ptx_isa(nvcc: &Nvcc, out_dir: &Path) -> Result<String, String> {
    let (source, ptx) = (out_dir.join("empty.cu"), out_dir.join("empty.ptx"));
    fs::write(&source, "").map_err(|error| format!("{}: {error}", source.display()))?;
    run(Command::new(&nvcc.path).args(["-ptx", "-arch=compute_80", "-o"]).arg(&ptx).arg(&source))?;
    let text = fs::read_to_string(&ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
    parse_ptx_isa(&text).ok_or_else(|| format!("{} has no .version line", ptx.display()))
}

struct Job {
    module: String,
    path: PathBuf,
    arch: &'static [&'static str],
}

impl Job {
    /// Compiles, unless the last fat binary came from the very same text, flags and compiler.
    fn run(&self, nvcc: &Nvcc, headers: &str, out_dir: &Path) -> Result<(), String> {
        let fatbin = out_dir.join(format!("{}.fatbin", self.module));
        let stamp_file = fatbin.with_extension("stamp");
        let source = fs::read_to_string(&self.path)
            .map_err(|error| format!("{}: {error}", self.path.display()))?;
        let settings =
            ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"].map(std::env::var_os);
        let stamp = format!(
            "{:?} {} {FLAGS:?} {:?} {settings:?}\n{headers}{source}",
            nvcc.path, nvcc.version, self.arch
        );
        if fatbin.exists() && fs::read_to_string(&stamp_file).is_ok_and(|last| last == stamp) {
            return Ok(());
        }
        // A stamp without its fat binary is harmless, the reverse is not.
        let _ = fs::remove_file(&fatbin);
        fs::write(&stamp_file, stamp)
            .map_err(|error| format!("{}: {error}", stamp_file.display()))?;
        run(Command::new(&nvcc.path)
            .arg("-fatbin")
            .args(FLAGS)
            .args(self.arch)
            .arg("-o")
            .arg(&fatbin)
            .arg(&self.path))
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}\n"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // glibc 2.41 declares functions in a way that CUDA's headers before 13.0 contradict.
    let advice = if said.contains("exception specification") {
        "this C library needs CUDA 13.0 or newer\n"
    } else {
        ""
    };
    Err(format!("{command:?} failed:\n{said}{advice}"))
}

/// All headers, one after another.
fn headers(dir: &Path) -> String {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read_to_string(path).ok()).collect()
}
