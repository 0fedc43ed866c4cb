//! Compiles `kernels/**/*.cu` into one fat binary per file and writes the table that `src/cuda/kernels.rs` embeds.
//! Without nvcc the table is empty and says where nvcc was looked for.

#[cfg(feature = "bindgen")]
#[path = "build/abi.rs"]
mod abi;
#[path = "build/compile.rs"]
mod compile;
#[path = "build/digest.rs"]
mod digest;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use nvcc::NotFound;

fn main() {
    for source in digest::SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let own = [
        "PATH",
        "MOEFY_REQUIRE_NVCC",
        "NVCC_CCBIN",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
        "DOCS_RS",
    ];
    for var in own.iter().chain(&nvcc::COMPILER_VARS).chain(&nvcc::TOOLKIT_VARS) {
        println!("cargo::rerun-if-env-changed={var}");
    }
    #[cfg(feature = "bindgen")]
    abi::generate();

    let digest = digest::digest(Path::new(".")).expect("the sources can be read");
    println!("cargo::rustc-env=MOEFY_SOURCE_DIGEST={digest}");

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let table = table(&out_dir).unwrap_or_else(|problem| {
        println!("cargo::error={}", problem.replace('\n', "\ncargo::error="));
        std::process::exit(1);
    });
    std::fs::write(out_dir.join("kernel_table.rs"), table).expect("OUT_DIR can be written");
}

/// The source text of `BUILD`, or what stops the build.
fn table(out_dir: &Path) -> Result<String, String> {
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(empty_table("the crate was built without its feature `cuda`"));
    }
    if env::var_os("DOCS_RS").is_some() {
        return Ok(empty_table("docs.rs compiles no kernels"));
    }
    let nvcc = match nvcc::find(|name| env::var_os(name)) {
        Ok(nvcc) => nvcc,
        Err(NotFound::Wrong(problem)) => return Err(problem),
        Err(NotFound::Nowhere(looked))
            if env::var_os("MOEFY_REQUIRE_NVCC").is_some_and(|v| v == "1") =>
        {
            return Err(format!("MOEFY_REQUIRE_NVCC=1, but there is no nvcc: {looked}"));
        }
        Err(NotFound::Nowhere(looked)) => {
            return Ok(empty_table(&format!("the build found no nvcc: {looked}")));
        }
    };
    let modules = compile::compile(&nvcc, Path::new("kernels"), out_dir)?;
    let ptx_isa = compile::ptx_isa(&nvcc, out_dir)?;
    let mut text = format!(
        "static BUILD: Build = Build {{ missing: None, toolkit: {:?}, ptx_isa: {ptx_isa:?}, modules: &[\n",
        nvcc.version
    );
    for module in &modules {
        let image = out_dir.join(format!("{module}.fatbin"));
        writeln!(text, "    Module {{ name: {module:?}, image: image!({image:?}) }},")
            .expect("a String takes anything");
    }
    text.push_str("] };\n");
    Ok(text)
}

fn empty_table(reason: &str) -> String {
    format!(
        "static BUILD: Build = Build {{ missing: Some({reason:?}), toolkit: \"\", ptx_isa: \"\", modules: &[] }};\n"
    )
}
