//! A fingerprint of everything that decides what runs on a GPU.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// Where it looks, relative to the project.
pub const SOURCES: [&str; 5] = ["build", "build.rs", "kernels", "src/abi.rs", "src/cuda"];
/// What counts there: no notes.
const EXTENSIONS: [&str; 4] = ["cu", "cuh", "h", "rs"];

/// FNV-1a with 128 bits over names, sizes and contents of all sources: a checksum, not a signature.
pub fn digest(root: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut hash = 0x6c62272e07bb014262b821756295c58d_u128;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000000001000000000000000000013b);
        }
    };
    for file in files {
        let name = file.strip_prefix(root).expect("it was found below the root");
        let content = fs::read(&file)?;
        add(name.to_string_lossy().replace('\\', "/").as_bytes());
        add(&(content.len() as u64).to_le_bytes());
        add(&content);
    }
    Ok(format!("{hash:032x}"))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        if path.extension().is_some_and(|ext| EXTENSIONS.iter().any(|known| ext == *known)) {
            files.push(path.into());
        }
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
