//! Host and device agree on every struct that crosses between them.

use moefy::cuda::{abi_probe, host_abi};

use crate::harness::Gpu;

pub fn tests() -> crate::Tests {
    vec![("abi::sizes_and_offsets", sizes_and_offsets)]
}

fn sizes_and_offsets(gpu: &Gpu) {
    assert_eq!(abi_probe(&gpu.device).expect("a launch"), host_abi());
}
