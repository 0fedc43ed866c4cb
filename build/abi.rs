//! Generates `src/abi.rs` from the header that the kernels include.

use bindgen::callbacks::{DeriveInfo, ParseCallbacks};

const HEADER: &str = "kernels/include/moefy_abi.h";
const GENERATED: &str = "src/abi.rs";

#[derive(Debug)]
struct PlainOldData;

impl ParseCallbacks for PlainOldData {
    /// Pod has no meaning for a struct with padding: it then does not compile.
    fn add_derives(&self, _: &DeriveInfo<'_>) -> Vec<String> {
        vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()]
    }
}

pub fn generate() {
    let text = bindgen::builder()
        .header(HEADER)
        .raw_line("//! Generated from kernels/include/moefy_abi.h by `make abi`: do not edit.")
        .raw_line("#![allow(missing_docs, non_camel_case_types)]")
        .allowlist_item("(moefy|MOEFY)_.*")
        .blocklist_item("MOEFY_ABI_H")
        .default_enum_style(bindgen::EnumVariation::NewType {
            is_bitfield: false,
            is_global: false,
        })
        .translate_enum_integer_types(true)
        .prepend_enum_name(false)
        .disable_header_comment()
        .generate_comments(false)
        .parse_callbacks(Box::new(PlainOldData))
        .generate()
        .unwrap_or_else(|error| panic!("{HEADER}: {error}"))
        .to_string();
    // Writing the same text again would make cargo build the crate again.
    if std::fs::read_to_string(GENERATED).ok().as_deref() != Some(&text) {
        std::fs::write(GENERATED, text).unwrap_or_else(|error| panic!("{GENERATED}: {error}"));
    }
}
