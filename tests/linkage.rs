//! The command starts on machines without a GPU: it is linked to no library of CUDA.

use std::process::Command;

#[test]
fn the_command_needs_no_cuda_library() {
    let Ok(output) = Command::new("readelf").args(["-d", env!("CARGO_BIN_EXE_moefy")]).output()
    else {
        println!("SKIPPED no readelf");
        return;
    };
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).to_lowercase();
    let needed: Vec<&str> = text.lines().filter(|line| line.contains("(needed)")).collect();
    assert!(needed.iter().any(|line| line.contains("libc")), "{needed:?}");
    let cuda = ["cuda", "cublas", "nvrtc", "nvidia"];
    assert!(!needed.iter().any(|line| cuda.iter().any(|name| line.contains(name))), "{needed:?}");
}
