//! Generated from kernels/include/moefy_abi.h by `make abi`: do not edit.
#![allow(missing_docs, non_camel_case_types)]

pub const MOEFY_STATUS_ROW_WITHOUT_SCORE: u32 = 1;
pub const MOEFY_STATUS_MASK_BEYOND_EXPERTS: u32 = 2;
pub const MOEFY_MAX_EXPERTS: u32 = 4096;
impl moefy_rule {
    pub const MOEFY_RULE_TOP_K: moefy_rule = moefy_rule(0);
    pub const MOEFY_RULE_DYNAMIC_K: moefy_rule = moefy_rule(1);
    pub const MOEFY_RULE_CUMULATIVE_SHARE: moefy_rule = moefy_rule(2);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_rule(pub u32);
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_selection {
    pub rule: moefy_rule,
    pub k: u32,
    pub threshold: f32,
    pub max_experts: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_selection"][::std::mem::size_of::<moefy_selection>() - 16usize];
    ["Alignment of moefy_selection"][::std::mem::align_of::<moefy_selection>() - 4usize];
    ["Offset of field: moefy_selection::rule"]
        [::std::mem::offset_of!(moefy_selection, rule) - 0usize];
    ["Offset of field: moefy_selection::k"][::std::mem::offset_of!(moefy_selection, k) - 4usize];
    ["Offset of field: moefy_selection::threshold"]
        [::std::mem::offset_of!(moefy_selection, threshold) - 8usize];
    ["Offset of field: moefy_selection::max_experts"]
        [::std::mem::offset_of!(moefy_selection, max_experts) - 12usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_abi_probe_params {
    pub words: u64,
    pub num_words: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_abi_probe_params"][::std::mem::size_of::<moefy_abi_probe_params>() - 16usize];
    ["Alignment of moefy_abi_probe_params"]
        [::std::mem::align_of::<moefy_abi_probe_params>() - 8usize];
    ["Offset of field: moefy_abi_probe_params::words"]
        [::std::mem::offset_of!(moefy_abi_probe_params, words) - 0usize];
    ["Offset of field: moefy_abi_probe_params::num_words"]
        [::std::mem::offset_of!(moefy_abi_probe_params, num_words) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_select_params {
    pub scores: u64,
    pub mask: u64,
    pub counts: u64,
    pub status: u64,
    pub num_valid_tokens: u64,
    pub score_stride: u64,
    pub selection: moefy_selection,
    pub num_tokens: u32,
    pub num_experts: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_select_params"][::std::mem::size_of::<moefy_select_params>() - 72usize];
    ["Alignment of moefy_select_params"][::std::mem::align_of::<moefy_select_params>() - 8usize];
    ["Offset of field: moefy_select_params::scores"]
        [::std::mem::offset_of!(moefy_select_params, scores) - 0usize];
    ["Offset of field: moefy_select_params::mask"]
        [::std::mem::offset_of!(moefy_select_params, mask) - 8usize];
    ["Offset of field: moefy_select_params::counts"]
        [::std::mem::offset_of!(moefy_select_params, counts) - 16usize];
    ["Offset of field: moefy_select_params::status"]
        [::std::mem::offset_of!(moefy_select_params, status) - 24usize];
    ["Offset of field: moefy_select_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_select_params, num_valid_tokens) - 32usize];
    ["Offset of field: moefy_select_params::score_stride"]
        [::std::mem::offset_of!(moefy_select_params, score_stride) - 40usize];
    ["Offset of field: moefy_select_params::selection"]
        [::std::mem::offset_of!(moefy_select_params, selection) - 48usize];
    ["Offset of field: moefy_select_params::num_tokens"]
        [::std::mem::offset_of!(moefy_select_params, num_tokens) - 64usize];
    ["Offset of field: moefy_select_params::num_experts"]
        [::std::mem::offset_of!(moefy_select_params, num_experts) - 68usize];
};
