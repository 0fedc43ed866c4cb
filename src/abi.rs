//! Generated from kernels/include/moefy_abi.h by `make abi`: do not edit.
#![allow(missing_docs, non_camel_case_types)]

pub const MOEFY_STATUS_ROW_WITHOUT_SCORE: u32 = 1;
pub const MOEFY_STATUS_MASK_BEYOND_EXPERTS: u32 = 2;
pub const MOEFY_STATUS_TOO_MANY_PAIRS: u32 = 4;
pub const MOEFY_MAX_EXPERTS: u32 = 4096;
pub const MOEFY_ROUTE_INDEX_WARP_BLOCKS: u32 = 8;
pub const MOEFY_ROUTE_INDEX_DIRECT_WORDS: u32 = 16;
pub const MOEFY_EXPERTS_ONE_ROWS: u32 = 24;
pub const MOEFY_EXPERTS_MANY_SLAB: u32 = 256;
pub const MOEFY_EXPERTS_MANY_SUM_COLUMNS: u32 = 256;
pub const MOEFY_EXPERTS_RESIDENT_SLOTS: u32 = 6;
pub const MOEFY_EXPERTS_RESIDENT_MAX_STAGES: u32 = 16;
pub const MOEFY_EXPERTS_SUMS_THREADS: u32 = 640;
pub const MOEFY_EXPERTS_SUMS_COLUMNS: u32 = 64;
pub const MOEFY_EXPERTS_SUMS_HIDDEN_SLOTS: u32 = 6;
pub const MOEFY_EXPERTS_SUMS_WEIGHT_SLOTS: u32 = 4;
pub const MOEFY_EXPERTS_SUMS_MORE_HIDDEN_SLOTS: u32 = 8;
pub const MOEFY_EXPERTS_SUMS_MORE_WEIGHT_SLOTS: u32 = 6;
pub const MOEFY_FFN_FEW_EXPERTS: u32 = 512;
pub const MOEFY_FFN_FEW_STAGES: u32 = 8;
pub const MOEFY_FFN_FEW_TILE: u32 = 8;
pub const MOEFY_FFN_FEW_THREADS: u32 = 256;
pub const MOEFY_FFN_FEW_ROUTER_ROWS: u32 = 8;
pub const MOEFY_FFN_FEW_WHOLE_STAGES: u32 = 4;
pub const MOEFY_ROUTE_INDEX_CHUNK: u32 = 8;
pub const MOEFY_ROUTE_INDEX_BLOCKS: u32 = 128;
pub const MOEFY_ROUTER_SELECT_BLOCKS: u32 = 16;
pub const MOEFY_FFN_FEW_CLUSTER_STEPS: u32 = 4;
pub const MOEFY_TILE_TOKENS: u32 = 128;
pub const MOEFY_TILE_CHUNK: u32 = 256;
pub const MOEFY_TILE_MAX_TOKENS: u32 = 8192;
pub const MOEFY_ROUTER_TILE: u32 = 64;
pub const MOEFY_ROUTER_BLOCK_THREADS: u32 = 384;
pub const MOEFY_ROUTER_BLOCK_OUTPUTS: u32 = 128;
pub const MOEFY_ROUTER_BLOCK_STAGES: u32 = 8;
pub const MOEFY_ROUTER_MANY_TOKENS: u32 = 64;
pub const MOEFY_ROUTER_MANY_THREADS: u32 = 384;
pub const MOEFY_ROUTER_MANY_STAGES: u32 = 8;
pub const MOEFY_ROUTER_MANY_PIECES: u32 = 4;
pub const MOEFY_ACTIVATE_THREADS: u32 = 128;
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
    pub words_per_warp: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_select_params"][::std::mem::size_of::<moefy_select_params>() - 80usize];
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
    ["Offset of field: moefy_select_params::words_per_warp"]
        [::std::mem::offset_of!(moefy_select_params, words_per_warp) - 72usize];
    ["Offset of field: moefy_select_params::reserved"]
        [::std::mem::offset_of!(moefy_select_params, reserved) - 76usize];
};
impl moefy_router_kind {
    pub const MOEFY_ROUTER_LINEAR: moefy_router_kind = moefy_router_kind(0);
    pub const MOEFY_ROUTER_D2DMOE: moefy_router_kind = moefy_router_kind(1);
    pub const MOEFY_ROUTER_MOEFICATION: moefy_router_kind = moefy_router_kind(2);
    pub const MOEFY_ROUTER_CENTROID: moefy_router_kind = moefy_router_kind(3);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_kind(pub u32);
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_select_params {
    pub x: u64,
    pub w1: u64,
    pub w2: u64,
    pub w1_scale: u64,
    pub first: u64,
    pub scores: u64,
    pub imposed: u64,
    pub mask: u64,
    pub counts: u64,
    pub status: u64,
    pub num_valid_tokens: u64,
    pub x_stride: u64,
    pub selection: moefy_selection,
    pub kind: moefy_router_kind,
    pub d_model: u32,
    pub hidden: u32,
    pub num_experts: u32,
    pub num_tokens: u32,
    pub w2_in_shared: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_router_select_params"]
        [::std::mem::size_of::<moefy_router_select_params>() - 136usize];
    ["Alignment of moefy_router_select_params"]
        [::std::mem::align_of::<moefy_router_select_params>() - 8usize];
    ["Offset of field: moefy_router_select_params::x"]
        [::std::mem::offset_of!(moefy_router_select_params, x) - 0usize];
    ["Offset of field: moefy_router_select_params::w1"]
        [::std::mem::offset_of!(moefy_router_select_params, w1) - 8usize];
    ["Offset of field: moefy_router_select_params::w2"]
        [::std::mem::offset_of!(moefy_router_select_params, w2) - 16usize];
    ["Offset of field: moefy_router_select_params::w1_scale"]
        [::std::mem::offset_of!(moefy_router_select_params, w1_scale) - 24usize];
    ["Offset of field: moefy_router_select_params::first"]
        [::std::mem::offset_of!(moefy_router_select_params, first) - 32usize];
    ["Offset of field: moefy_router_select_params::scores"]
        [::std::mem::offset_of!(moefy_router_select_params, scores) - 40usize];
    ["Offset of field: moefy_router_select_params::imposed"]
        [::std::mem::offset_of!(moefy_router_select_params, imposed) - 48usize];
    ["Offset of field: moefy_router_select_params::mask"]
        [::std::mem::offset_of!(moefy_router_select_params, mask) - 56usize];
    ["Offset of field: moefy_router_select_params::counts"]
        [::std::mem::offset_of!(moefy_router_select_params, counts) - 64usize];
    ["Offset of field: moefy_router_select_params::status"]
        [::std::mem::offset_of!(moefy_router_select_params, status) - 72usize];
    ["Offset of field: moefy_router_select_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_router_select_params, num_valid_tokens) - 80usize];
    ["Offset of field: moefy_router_select_params::x_stride"]
        [::std::mem::offset_of!(moefy_router_select_params, x_stride) - 88usize];
    ["Offset of field: moefy_router_select_params::selection"]
        [::std::mem::offset_of!(moefy_router_select_params, selection) - 96usize];
    ["Offset of field: moefy_router_select_params::kind"]
        [::std::mem::offset_of!(moefy_router_select_params, kind) - 112usize];
    ["Offset of field: moefy_router_select_params::d_model"]
        [::std::mem::offset_of!(moefy_router_select_params, d_model) - 116usize];
    ["Offset of field: moefy_router_select_params::hidden"]
        [::std::mem::offset_of!(moefy_router_select_params, hidden) - 120usize];
    ["Offset of field: moefy_router_select_params::num_experts"]
        [::std::mem::offset_of!(moefy_router_select_params, num_experts) - 124usize];
    ["Offset of field: moefy_router_select_params::num_tokens"]
        [::std::mem::offset_of!(moefy_router_select_params, num_tokens) - 128usize];
    ["Offset of field: moefy_router_select_params::w2_in_shared"]
        [::std::mem::offset_of!(moefy_router_select_params, w2_in_shared) - 132usize];
};
impl moefy_router_activation {
    pub const MOEFY_ROUTER_ACTIVATION_ABS: moefy_router_activation = moefy_router_activation(0);
    pub const MOEFY_ROUTER_ACTIVATION_RELU: moefy_router_activation = moefy_router_activation(1);
    pub const MOEFY_ROUTER_ACTIVATION_TANH: moefy_router_activation = moefy_router_activation(2);
    pub const MOEFY_ROUTER_ACTIVATION_SIGMOID: moefy_router_activation = moefy_router_activation(3);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_activation(pub u32);
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_layer_params {
    pub in_: u64,
    pub w: u64,
    pub w_scale: u64,
    pub out: u64,
    pub num_valid_tokens: u64,
    pub in_stride: u64,
    pub activation: moefy_router_activation,
    pub unit_norm: u32,
    pub num_tokens: u32,
    pub in_width: u32,
    pub out_width: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_router_layer_params"]
        [::std::mem::size_of::<moefy_router_layer_params>() - 72usize];
    ["Alignment of moefy_router_layer_params"]
        [::std::mem::align_of::<moefy_router_layer_params>() - 8usize];
    ["Offset of field: moefy_router_layer_params::in_"]
        [::std::mem::offset_of!(moefy_router_layer_params, in_) - 0usize];
    ["Offset of field: moefy_router_layer_params::w"]
        [::std::mem::offset_of!(moefy_router_layer_params, w) - 8usize];
    ["Offset of field: moefy_router_layer_params::w_scale"]
        [::std::mem::offset_of!(moefy_router_layer_params, w_scale) - 16usize];
    ["Offset of field: moefy_router_layer_params::out"]
        [::std::mem::offset_of!(moefy_router_layer_params, out) - 24usize];
    ["Offset of field: moefy_router_layer_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_router_layer_params, num_valid_tokens) - 32usize];
    ["Offset of field: moefy_router_layer_params::in_stride"]
        [::std::mem::offset_of!(moefy_router_layer_params, in_stride) - 40usize];
    ["Offset of field: moefy_router_layer_params::activation"]
        [::std::mem::offset_of!(moefy_router_layer_params, activation) - 48usize];
    ["Offset of field: moefy_router_layer_params::unit_norm"]
        [::std::mem::offset_of!(moefy_router_layer_params, unit_norm) - 52usize];
    ["Offset of field: moefy_router_layer_params::num_tokens"]
        [::std::mem::offset_of!(moefy_router_layer_params, num_tokens) - 56usize];
    ["Offset of field: moefy_router_layer_params::in_width"]
        [::std::mem::offset_of!(moefy_router_layer_params, in_width) - 60usize];
    ["Offset of field: moefy_router_layer_params::out_width"]
        [::std::mem::offset_of!(moefy_router_layer_params, out_width) - 64usize];
    ["Offset of field: moefy_router_layer_params::reserved"]
        [::std::mem::offset_of!(moefy_router_layer_params, reserved) - 68usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_tensor_map {
    pub opaque: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_tensor_map"][::std::mem::size_of::<moefy_tensor_map>() - 128usize];
    ["Alignment of moefy_tensor_map"][::std::mem::align_of::<moefy_tensor_map>() - 64usize];
    ["Offset of field: moefy_tensor_map::opaque"]
        [::std::mem::offset_of!(moefy_tensor_map, opaque) - 0usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_many_params {
    pub x: moefy_tensor_map,
    pub w1: moefy_tensor_map,
    pub w2: moefy_tensor_map,
    pub router: moefy_router_select_params,
    pub num_blocks: u32,
    pub num_stages: u32,
    pub num_pieces: u32,
    pub parts_offset: u32,
    pub pieces_offset: u32,
    pub rows_offset: u32,
    pub reserved: [u32; 8usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_router_many_params"]
        [::std::mem::size_of::<moefy_router_many_params>() - 576usize];
    ["Alignment of moefy_router_many_params"]
        [::std::mem::align_of::<moefy_router_many_params>() - 64usize];
    ["Offset of field: moefy_router_many_params::x"]
        [::std::mem::offset_of!(moefy_router_many_params, x) - 0usize];
    ["Offset of field: moefy_router_many_params::w1"]
        [::std::mem::offset_of!(moefy_router_many_params, w1) - 128usize];
    ["Offset of field: moefy_router_many_params::w2"]
        [::std::mem::offset_of!(moefy_router_many_params, w2) - 256usize];
    ["Offset of field: moefy_router_many_params::router"]
        [::std::mem::offset_of!(moefy_router_many_params, router) - 384usize];
    ["Offset of field: moefy_router_many_params::num_blocks"]
        [::std::mem::offset_of!(moefy_router_many_params, num_blocks) - 520usize];
    ["Offset of field: moefy_router_many_params::num_stages"]
        [::std::mem::offset_of!(moefy_router_many_params, num_stages) - 524usize];
    ["Offset of field: moefy_router_many_params::num_pieces"]
        [::std::mem::offset_of!(moefy_router_many_params, num_pieces) - 528usize];
    ["Offset of field: moefy_router_many_params::parts_offset"]
        [::std::mem::offset_of!(moefy_router_many_params, parts_offset) - 532usize];
    ["Offset of field: moefy_router_many_params::pieces_offset"]
        [::std::mem::offset_of!(moefy_router_many_params, pieces_offset) - 536usize];
    ["Offset of field: moefy_router_many_params::rows_offset"]
        [::std::mem::offset_of!(moefy_router_many_params, rows_offset) - 540usize];
    ["Offset of field: moefy_router_many_params::reserved"]
        [::std::mem::offset_of!(moefy_router_many_params, reserved) - 544usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_router_block_params {
    pub x: moefy_tensor_map,
    pub w1: moefy_tensor_map,
    pub w2: moefy_tensor_map,
    pub router: moefy_router_select_params,
    pub num_stages: u32,
    pub w2_offset: u32,
    pub parts_offset: u32,
    pub rows_offset: u32,
    pub reserved: [u32; 10usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_router_block_params"]
        [::std::mem::size_of::<moefy_router_block_params>() - 576usize];
    ["Alignment of moefy_router_block_params"]
        [::std::mem::align_of::<moefy_router_block_params>() - 64usize];
    ["Offset of field: moefy_router_block_params::x"]
        [::std::mem::offset_of!(moefy_router_block_params, x) - 0usize];
    ["Offset of field: moefy_router_block_params::w1"]
        [::std::mem::offset_of!(moefy_router_block_params, w1) - 128usize];
    ["Offset of field: moefy_router_block_params::w2"]
        [::std::mem::offset_of!(moefy_router_block_params, w2) - 256usize];
    ["Offset of field: moefy_router_block_params::router"]
        [::std::mem::offset_of!(moefy_router_block_params, router) - 384usize];
    ["Offset of field: moefy_router_block_params::num_stages"]
        [::std::mem::offset_of!(moefy_router_block_params, num_stages) - 520usize];
    ["Offset of field: moefy_router_block_params::w2_offset"]
        [::std::mem::offset_of!(moefy_router_block_params, w2_offset) - 524usize];
    ["Offset of field: moefy_router_block_params::parts_offset"]
        [::std::mem::offset_of!(moefy_router_block_params, parts_offset) - 528usize];
    ["Offset of field: moefy_router_block_params::rows_offset"]
        [::std::mem::offset_of!(moefy_router_block_params, rows_offset) - 532usize];
    ["Offset of field: moefy_router_block_params::reserved"]
        [::std::mem::offset_of!(moefy_router_block_params, reserved) - 536usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_route_index_params {
    pub mask: u64,
    pub num_valid_tokens: u64,
    pub counts: u64,
    pub offsets: u64,
    pub token_ids: u64,
    pub expert_masks: u64,
    pub word_offsets: u64,
    pub union_ids: u64,
    pub num_union: u64,
    pub status: u64,
    pub chunk_counts: u64,
    pub capacity: u64,
    pub num_chunks: u32,
    pub num_tokens: u32,
    pub num_experts: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_route_index_params"]
        [::std::mem::size_of::<moefy_route_index_params>() - 112usize];
    ["Alignment of moefy_route_index_params"]
        [::std::mem::align_of::<moefy_route_index_params>() - 8usize];
    ["Offset of field: moefy_route_index_params::mask"]
        [::std::mem::offset_of!(moefy_route_index_params, mask) - 0usize];
    ["Offset of field: moefy_route_index_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_route_index_params, num_valid_tokens) - 8usize];
    ["Offset of field: moefy_route_index_params::counts"]
        [::std::mem::offset_of!(moefy_route_index_params, counts) - 16usize];
    ["Offset of field: moefy_route_index_params::offsets"]
        [::std::mem::offset_of!(moefy_route_index_params, offsets) - 24usize];
    ["Offset of field: moefy_route_index_params::token_ids"]
        [::std::mem::offset_of!(moefy_route_index_params, token_ids) - 32usize];
    ["Offset of field: moefy_route_index_params::expert_masks"]
        [::std::mem::offset_of!(moefy_route_index_params, expert_masks) - 40usize];
    ["Offset of field: moefy_route_index_params::word_offsets"]
        [::std::mem::offset_of!(moefy_route_index_params, word_offsets) - 48usize];
    ["Offset of field: moefy_route_index_params::union_ids"]
        [::std::mem::offset_of!(moefy_route_index_params, union_ids) - 56usize];
    ["Offset of field: moefy_route_index_params::num_union"]
        [::std::mem::offset_of!(moefy_route_index_params, num_union) - 64usize];
    ["Offset of field: moefy_route_index_params::status"]
        [::std::mem::offset_of!(moefy_route_index_params, status) - 72usize];
    ["Offset of field: moefy_route_index_params::chunk_counts"]
        [::std::mem::offset_of!(moefy_route_index_params, chunk_counts) - 80usize];
    ["Offset of field: moefy_route_index_params::capacity"]
        [::std::mem::offset_of!(moefy_route_index_params, capacity) - 88usize];
    ["Offset of field: moefy_route_index_params::num_chunks"]
        [::std::mem::offset_of!(moefy_route_index_params, num_chunks) - 96usize];
    ["Offset of field: moefy_route_index_params::num_tokens"]
        [::std::mem::offset_of!(moefy_route_index_params, num_tokens) - 100usize];
    ["Offset of field: moefy_route_index_params::num_experts"]
        [::std::mem::offset_of!(moefy_route_index_params, num_experts) - 104usize];
    ["Offset of field: moefy_route_index_params::reserved"]
        [::std::mem::offset_of!(moefy_route_index_params, reserved) - 108usize];
};
impl moefy_activation {
    pub const MOEFY_RELU: moefy_activation = moefy_activation(0);
    pub const MOEFY_GELU: moefy_activation = moefy_activation(1);
    pub const MOEFY_GELU_TANH: moefy_activation = moefy_activation(2);
    pub const MOEFY_SILU: moefy_activation = moefy_activation(3);
    pub const MOEFY_IDENTITY: moefy_activation = moefy_activation(4);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_activation(pub u32);
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_neurons {
    pub w_in: u64,
    pub w_out: u64,
    pub b_in: u64,
    pub b_out: u64,
    pub mean: u64,
    pub d_model: u64,
    pub d_ff: u32,
    pub num_experts: u32,
    pub expert_width: u32,
    pub shared: u32,
    pub rank: u32,
    pub glu: u32,
    pub activation: moefy_activation,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_neurons"][::std::mem::size_of::<moefy_neurons>() - 80usize];
    ["Alignment of moefy_neurons"][::std::mem::align_of::<moefy_neurons>() - 8usize];
    ["Offset of field: moefy_neurons::w_in"][::std::mem::offset_of!(moefy_neurons, w_in) - 0usize];
    ["Offset of field: moefy_neurons::w_out"]
        [::std::mem::offset_of!(moefy_neurons, w_out) - 8usize];
    ["Offset of field: moefy_neurons::b_in"][::std::mem::offset_of!(moefy_neurons, b_in) - 16usize];
    ["Offset of field: moefy_neurons::b_out"]
        [::std::mem::offset_of!(moefy_neurons, b_out) - 24usize];
    ["Offset of field: moefy_neurons::mean"][::std::mem::offset_of!(moefy_neurons, mean) - 32usize];
    ["Offset of field: moefy_neurons::d_model"]
        [::std::mem::offset_of!(moefy_neurons, d_model) - 40usize];
    ["Offset of field: moefy_neurons::d_ff"][::std::mem::offset_of!(moefy_neurons, d_ff) - 48usize];
    ["Offset of field: moefy_neurons::num_experts"]
        [::std::mem::offset_of!(moefy_neurons, num_experts) - 52usize];
    ["Offset of field: moefy_neurons::expert_width"]
        [::std::mem::offset_of!(moefy_neurons, expert_width) - 56usize];
    ["Offset of field: moefy_neurons::shared"]
        [::std::mem::offset_of!(moefy_neurons, shared) - 60usize];
    ["Offset of field: moefy_neurons::rank"][::std::mem::offset_of!(moefy_neurons, rank) - 64usize];
    ["Offset of field: moefy_neurons::glu"][::std::mem::offset_of!(moefy_neurons, glu) - 68usize];
    ["Offset of field: moefy_neurons::activation"]
        [::std::mem::offset_of!(moefy_neurons, activation) - 72usize];
    ["Offset of field: moefy_neurons::reserved"]
        [::std::mem::offset_of!(moefy_neurons, reserved) - 76usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_params {
    pub neurons: moefy_neurons,
    pub x: u64,
    pub y: u64,
    pub mask: u64,
    pub gates: u64,
    pub num_valid_tokens: u64,
    pub expert_offsets: u64,
    pub token_ids: u64,
    pub word_offsets: u64,
    pub hidden: u64,
    pub hidden_stride: u64,
    pub hidden_shared: u64,
    pub hidden_linear: u64,
    pub partials: u64,
    pub rows: u64,
    pub rows_bytes: u64,
    pub pair_rows: u64,
    pub num_tokens: u32,
    pub max_pairs: u32,
    pub num_splits: u32,
    pub slab: u32,
    pub min_token_pairs: u32,
    pub fused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_params"][::std::mem::size_of::<moefy_experts_params>() - 232usize];
    ["Alignment of moefy_experts_params"][::std::mem::align_of::<moefy_experts_params>() - 8usize];
    ["Offset of field: moefy_experts_params::neurons"]
        [::std::mem::offset_of!(moefy_experts_params, neurons) - 0usize];
    ["Offset of field: moefy_experts_params::x"]
        [::std::mem::offset_of!(moefy_experts_params, x) - 80usize];
    ["Offset of field: moefy_experts_params::y"]
        [::std::mem::offset_of!(moefy_experts_params, y) - 88usize];
    ["Offset of field: moefy_experts_params::mask"]
        [::std::mem::offset_of!(moefy_experts_params, mask) - 96usize];
    ["Offset of field: moefy_experts_params::gates"]
        [::std::mem::offset_of!(moefy_experts_params, gates) - 104usize];
    ["Offset of field: moefy_experts_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_experts_params, num_valid_tokens) - 112usize];
    ["Offset of field: moefy_experts_params::expert_offsets"]
        [::std::mem::offset_of!(moefy_experts_params, expert_offsets) - 120usize];
    ["Offset of field: moefy_experts_params::token_ids"]
        [::std::mem::offset_of!(moefy_experts_params, token_ids) - 128usize];
    ["Offset of field: moefy_experts_params::word_offsets"]
        [::std::mem::offset_of!(moefy_experts_params, word_offsets) - 136usize];
    ["Offset of field: moefy_experts_params::hidden"]
        [::std::mem::offset_of!(moefy_experts_params, hidden) - 144usize];
    ["Offset of field: moefy_experts_params::hidden_stride"]
        [::std::mem::offset_of!(moefy_experts_params, hidden_stride) - 152usize];
    ["Offset of field: moefy_experts_params::hidden_shared"]
        [::std::mem::offset_of!(moefy_experts_params, hidden_shared) - 160usize];
    ["Offset of field: moefy_experts_params::hidden_linear"]
        [::std::mem::offset_of!(moefy_experts_params, hidden_linear) - 168usize];
    ["Offset of field: moefy_experts_params::partials"]
        [::std::mem::offset_of!(moefy_experts_params, partials) - 176usize];
    ["Offset of field: moefy_experts_params::rows"]
        [::std::mem::offset_of!(moefy_experts_params, rows) - 184usize];
    ["Offset of field: moefy_experts_params::rows_bytes"]
        [::std::mem::offset_of!(moefy_experts_params, rows_bytes) - 192usize];
    ["Offset of field: moefy_experts_params::pair_rows"]
        [::std::mem::offset_of!(moefy_experts_params, pair_rows) - 200usize];
    ["Offset of field: moefy_experts_params::num_tokens"]
        [::std::mem::offset_of!(moefy_experts_params, num_tokens) - 208usize];
    ["Offset of field: moefy_experts_params::max_pairs"]
        [::std::mem::offset_of!(moefy_experts_params, max_pairs) - 212usize];
    ["Offset of field: moefy_experts_params::num_splits"]
        [::std::mem::offset_of!(moefy_experts_params, num_splits) - 216usize];
    ["Offset of field: moefy_experts_params::slab"]
        [::std::mem::offset_of!(moefy_experts_params, slab) - 220usize];
    ["Offset of field: moefy_experts_params::min_token_pairs"]
        [::std::mem::offset_of!(moefy_experts_params, min_token_pairs) - 224usize];
    ["Offset of field: moefy_experts_params::fused"]
        [::std::mem::offset_of!(moefy_experts_params, fused) - 228usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_engine_params {
    pub weights: moefy_tensor_map,
    pub experts: moefy_experts_params,
    pub reserved: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_engine_params"]
        [::std::mem::size_of::<moefy_experts_engine_params>() - 384usize];
    ["Alignment of moefy_experts_engine_params"]
        [::std::mem::align_of::<moefy_experts_engine_params>() - 64usize];
    ["Offset of field: moefy_experts_engine_params::weights"]
        [::std::mem::offset_of!(moefy_experts_engine_params, weights) - 0usize];
    ["Offset of field: moefy_experts_engine_params::experts"]
        [::std::mem::offset_of!(moefy_experts_engine_params, experts) - 128usize];
    ["Offset of field: moefy_experts_engine_params::reserved"]
        [::std::mem::offset_of!(moefy_experts_engine_params, reserved) - 360usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_fused_params {
    pub w_in: moefy_tensor_map,
    pub w_out: moefy_tensor_map,
    pub experts: moefy_experts_params,
    pub reserved: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_fused_params"]
        [::std::mem::size_of::<moefy_experts_fused_params>() - 512usize];
    ["Alignment of moefy_experts_fused_params"]
        [::std::mem::align_of::<moefy_experts_fused_params>() - 64usize];
    ["Offset of field: moefy_experts_fused_params::w_in"]
        [::std::mem::offset_of!(moefy_experts_fused_params, w_in) - 0usize];
    ["Offset of field: moefy_experts_fused_params::w_out"]
        [::std::mem::offset_of!(moefy_experts_fused_params, w_out) - 128usize];
    ["Offset of field: moefy_experts_fused_params::experts"]
        [::std::mem::offset_of!(moefy_experts_fused_params, experts) - 256usize];
    ["Offset of field: moefy_experts_fused_params::reserved"]
        [::std::mem::offset_of!(moefy_experts_fused_params, reserved) - 488usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_sums_params {
    pub hidden: [moefy_tensor_map; 8usize],
    pub hidden_shared: moefy_tensor_map,
    pub hidden_linear: moefy_tensor_map,
    pub w_out: moefy_tensor_map,
    pub experts: moefy_experts_params,
    pub block_tokens: u32,
    pub num_across: u32,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_sums_params"]
        [::std::mem::size_of::<moefy_experts_sums_params>() - 1664usize];
    ["Alignment of moefy_experts_sums_params"]
        [::std::mem::align_of::<moefy_experts_sums_params>() - 64usize];
    ["Offset of field: moefy_experts_sums_params::hidden"]
        [::std::mem::offset_of!(moefy_experts_sums_params, hidden) - 0usize];
    ["Offset of field: moefy_experts_sums_params::hidden_shared"]
        [::std::mem::offset_of!(moefy_experts_sums_params, hidden_shared) - 1024usize];
    ["Offset of field: moefy_experts_sums_params::hidden_linear"]
        [::std::mem::offset_of!(moefy_experts_sums_params, hidden_linear) - 1152usize];
    ["Offset of field: moefy_experts_sums_params::w_out"]
        [::std::mem::offset_of!(moefy_experts_sums_params, w_out) - 1280usize];
    ["Offset of field: moefy_experts_sums_params::experts"]
        [::std::mem::offset_of!(moefy_experts_sums_params, experts) - 1408usize];
    ["Offset of field: moefy_experts_sums_params::block_tokens"]
        [::std::mem::offset_of!(moefy_experts_sums_params, block_tokens) - 1640usize];
    ["Offset of field: moefy_experts_sums_params::num_across"]
        [::std::mem::offset_of!(moefy_experts_sums_params, num_across) - 1644usize];
    ["Offset of field: moefy_experts_sums_params::reserved"]
        [::std::mem::offset_of!(moefy_experts_sums_params, reserved) - 1648usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_masked_params {
    pub rows: moefy_tensor_map,
    pub weights: moefy_tensor_map,
    pub experts: moefy_experts_params,
    pub reserved: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_masked_params"]
        [::std::mem::size_of::<moefy_experts_masked_params>() - 512usize];
    ["Alignment of moefy_experts_masked_params"]
        [::std::mem::align_of::<moefy_experts_masked_params>() - 64usize];
    ["Offset of field: moefy_experts_masked_params::rows"]
        [::std::mem::offset_of!(moefy_experts_masked_params, rows) - 0usize];
    ["Offset of field: moefy_experts_masked_params::weights"]
        [::std::mem::offset_of!(moefy_experts_masked_params, weights) - 128usize];
    ["Offset of field: moefy_experts_masked_params::experts"]
        [::std::mem::offset_of!(moefy_experts_masked_params, experts) - 256usize];
    ["Offset of field: moefy_experts_masked_params::reserved"]
        [::std::mem::offset_of!(moefy_experts_masked_params, reserved) - 488usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_token_tiles_params {
    pub mask: u64,
    pub num_valid_tokens: u64,
    pub chunk_counts: u64,
    pub sorted: u64,
    pub token_ids: u64,
    pub tile_counts: u64,
    pub tile_expert_ids: u64,
    pub tile_masks: u64,
    pub num_chunks: u32,
    pub num_tokens: u32,
    pub num_experts: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_token_tiles_params"]
        [::std::mem::size_of::<moefy_token_tiles_params>() - 80usize];
    ["Alignment of moefy_token_tiles_params"]
        [::std::mem::align_of::<moefy_token_tiles_params>() - 8usize];
    ["Offset of field: moefy_token_tiles_params::mask"]
        [::std::mem::offset_of!(moefy_token_tiles_params, mask) - 0usize];
    ["Offset of field: moefy_token_tiles_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_token_tiles_params, num_valid_tokens) - 8usize];
    ["Offset of field: moefy_token_tiles_params::chunk_counts"]
        [::std::mem::offset_of!(moefy_token_tiles_params, chunk_counts) - 16usize];
    ["Offset of field: moefy_token_tiles_params::sorted"]
        [::std::mem::offset_of!(moefy_token_tiles_params, sorted) - 24usize];
    ["Offset of field: moefy_token_tiles_params::token_ids"]
        [::std::mem::offset_of!(moefy_token_tiles_params, token_ids) - 32usize];
    ["Offset of field: moefy_token_tiles_params::tile_counts"]
        [::std::mem::offset_of!(moefy_token_tiles_params, tile_counts) - 40usize];
    ["Offset of field: moefy_token_tiles_params::tile_expert_ids"]
        [::std::mem::offset_of!(moefy_token_tiles_params, tile_expert_ids) - 48usize];
    ["Offset of field: moefy_token_tiles_params::tile_masks"]
        [::std::mem::offset_of!(moefy_token_tiles_params, tile_masks) - 56usize];
    ["Offset of field: moefy_token_tiles_params::num_chunks"]
        [::std::mem::offset_of!(moefy_token_tiles_params, num_chunks) - 64usize];
    ["Offset of field: moefy_token_tiles_params::num_tokens"]
        [::std::mem::offset_of!(moefy_token_tiles_params, num_tokens) - 68usize];
    ["Offset of field: moefy_token_tiles_params::num_experts"]
        [::std::mem::offset_of!(moefy_token_tiles_params, num_experts) - 72usize];
    ["Offset of field: moefy_token_tiles_params::reserved"]
        [::std::mem::offset_of!(moefy_token_tiles_params, reserved) - 76usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_tiled_params {
    pub neurons: moefy_neurons,
    pub x: u64,
    pub y: u64,
    pub gates: u64,
    pub num_valid_tokens: u64,
    pub token_ids: u64,
    pub tile_counts: u64,
    pub tile_expert_ids: u64,
    pub tile_masks: u64,
    pub hidden: u64,
    pub hidden_stride: u64,
    pub num_tokens: u32,
    pub inverse_width: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_tiled_params"]
        [::std::mem::size_of::<moefy_experts_tiled_params>() - 168usize];
    ["Alignment of moefy_experts_tiled_params"]
        [::std::mem::align_of::<moefy_experts_tiled_params>() - 8usize];
    ["Offset of field: moefy_experts_tiled_params::neurons"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, neurons) - 0usize];
    ["Offset of field: moefy_experts_tiled_params::x"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, x) - 80usize];
    ["Offset of field: moefy_experts_tiled_params::y"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, y) - 88usize];
    ["Offset of field: moefy_experts_tiled_params::gates"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, gates) - 96usize];
    ["Offset of field: moefy_experts_tiled_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, num_valid_tokens) - 104usize];
    ["Offset of field: moefy_experts_tiled_params::token_ids"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, token_ids) - 112usize];
    ["Offset of field: moefy_experts_tiled_params::tile_counts"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, tile_counts) - 120usize];
    ["Offset of field: moefy_experts_tiled_params::tile_expert_ids"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, tile_expert_ids) - 128usize];
    ["Offset of field: moefy_experts_tiled_params::tile_masks"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, tile_masks) - 136usize];
    ["Offset of field: moefy_experts_tiled_params::hidden"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, hidden) - 144usize];
    ["Offset of field: moefy_experts_tiled_params::hidden_stride"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, hidden_stride) - 152usize];
    ["Offset of field: moefy_experts_tiled_params::num_tokens"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, num_tokens) - 160usize];
    ["Offset of field: moefy_experts_tiled_params::inverse_width"]
        [::std::mem::offset_of!(moefy_experts_tiled_params, inverse_width) - 164usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_experts_tiled_engine_params {
    pub weights: moefy_tensor_map,
    pub hidden: moefy_tensor_map,
    pub experts: moefy_experts_tiled_params,
    pub box_neurons: u32,
    pub reserved: [u32; 5usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_experts_tiled_engine_params"]
        [::std::mem::size_of::<moefy_experts_tiled_engine_params>() - 448usize];
    ["Alignment of moefy_experts_tiled_engine_params"]
        [::std::mem::align_of::<moefy_experts_tiled_engine_params>() - 64usize];
    ["Offset of field: moefy_experts_tiled_engine_params::weights"]
        [::std::mem::offset_of!(moefy_experts_tiled_engine_params, weights) - 0usize];
    ["Offset of field: moefy_experts_tiled_engine_params::hidden"]
        [::std::mem::offset_of!(moefy_experts_tiled_engine_params, hidden) - 128usize];
    ["Offset of field: moefy_experts_tiled_engine_params::experts"]
        [::std::mem::offset_of!(moefy_experts_tiled_engine_params, experts) - 256usize];
    ["Offset of field: moefy_experts_tiled_engine_params::box_neurons"]
        [::std::mem::offset_of!(moefy_experts_tiled_engine_params, box_neurons) - 424usize];
    ["Offset of field: moefy_experts_tiled_engine_params::reserved"]
        [::std::mem::offset_of!(moefy_experts_tiled_engine_params, reserved) - 428usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_add_shares_params {
    pub shares: u64,
    pub b_out: u64,
    pub num_valid_tokens: u64,
    pub y: u64,
    pub d_model: u64,
    pub num_shares: u32,
    pub num_tokens: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_add_shares_params"][::std::mem::size_of::<moefy_add_shares_params>() - 48usize];
    ["Alignment of moefy_add_shares_params"]
        [::std::mem::align_of::<moefy_add_shares_params>() - 8usize];
    ["Offset of field: moefy_add_shares_params::shares"]
        [::std::mem::offset_of!(moefy_add_shares_params, shares) - 0usize];
    ["Offset of field: moefy_add_shares_params::b_out"]
        [::std::mem::offset_of!(moefy_add_shares_params, b_out) - 8usize];
    ["Offset of field: moefy_add_shares_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_add_shares_params, num_valid_tokens) - 16usize];
    ["Offset of field: moefy_add_shares_params::y"]
        [::std::mem::offset_of!(moefy_add_shares_params, y) - 24usize];
    ["Offset of field: moefy_add_shares_params::d_model"]
        [::std::mem::offset_of!(moefy_add_shares_params, d_model) - 32usize];
    ["Offset of field: moefy_add_shares_params::num_shares"]
        [::std::mem::offset_of!(moefy_add_shares_params, num_shares) - 40usize];
    ["Offset of field: moefy_add_shares_params::num_tokens"]
        [::std::mem::offset_of!(moefy_add_shares_params, num_tokens) - 44usize];
};
impl moefy_gate {
    pub const MOEFY_GATE_ONE: moefy_gate = moefy_gate(0);
    pub const MOEFY_GATE_SCORE: moefy_gate = moefy_gate(1);
    pub const MOEFY_GATE_SOFTMAX: moefy_gate = moefy_gate(2);
    pub const MOEFY_GATE_RENORMALISED: moefy_gate = moefy_gate(3);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_gate(pub u32);
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_ffn_few_params {
    pub neurons: moefy_neurons,
    pub router: moefy_router_select_params,
    pub w2: u64,
    pub y: u64,
    pub partials: u64,
    pub gate: moefy_gate,
    pub num_w2: u32,
    pub num_stages: u32,
    pub inverse_width: f32,
    pub inverse_blocks: f32,
    pub log_stage_neurons: u32,
    pub block_neurons: u32,
    pub routing_bytes: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_ffn_few_params"][::std::mem::size_of::<moefy_ffn_few_params>() - 272usize];
    ["Alignment of moefy_ffn_few_params"][::std::mem::align_of::<moefy_ffn_few_params>() - 8usize];
    ["Offset of field: moefy_ffn_few_params::neurons"]
        [::std::mem::offset_of!(moefy_ffn_few_params, neurons) - 0usize];
    ["Offset of field: moefy_ffn_few_params::router"]
        [::std::mem::offset_of!(moefy_ffn_few_params, router) - 80usize];
    ["Offset of field: moefy_ffn_few_params::w2"]
        [::std::mem::offset_of!(moefy_ffn_few_params, w2) - 216usize];
    ["Offset of field: moefy_ffn_few_params::y"]
        [::std::mem::offset_of!(moefy_ffn_few_params, y) - 224usize];
    ["Offset of field: moefy_ffn_few_params::partials"]
        [::std::mem::offset_of!(moefy_ffn_few_params, partials) - 232usize];
    ["Offset of field: moefy_ffn_few_params::gate"]
        [::std::mem::offset_of!(moefy_ffn_few_params, gate) - 240usize];
    ["Offset of field: moefy_ffn_few_params::num_w2"]
        [::std::mem::offset_of!(moefy_ffn_few_params, num_w2) - 244usize];
    ["Offset of field: moefy_ffn_few_params::num_stages"]
        [::std::mem::offset_of!(moefy_ffn_few_params, num_stages) - 248usize];
    ["Offset of field: moefy_ffn_few_params::inverse_width"]
        [::std::mem::offset_of!(moefy_ffn_few_params, inverse_width) - 252usize];
    ["Offset of field: moefy_ffn_few_params::inverse_blocks"]
        [::std::mem::offset_of!(moefy_ffn_few_params, inverse_blocks) - 256usize];
    ["Offset of field: moefy_ffn_few_params::log_stage_neurons"]
        [::std::mem::offset_of!(moefy_ffn_few_params, log_stage_neurons) - 260usize];
    ["Offset of field: moefy_ffn_few_params::block_neurons"]
        [::std::mem::offset_of!(moefy_ffn_few_params, block_neurons) - 264usize];
    ["Offset of field: moefy_ffn_few_params::routing_bytes"]
        [::std::mem::offset_of!(moefy_ffn_few_params, routing_bytes) - 268usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_gates_params {
    pub scores: u64,
    pub mask: u64,
    pub gates: u64,
    pub num_tokens: u32,
    pub num_experts: u32,
    pub renormalise: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_gates_params"][::std::mem::size_of::<moefy_gates_params>() - 40usize];
    ["Alignment of moefy_gates_params"][::std::mem::align_of::<moefy_gates_params>() - 8usize];
    ["Offset of field: moefy_gates_params::scores"]
        [::std::mem::offset_of!(moefy_gates_params, scores) - 0usize];
    ["Offset of field: moefy_gates_params::mask"]
        [::std::mem::offset_of!(moefy_gates_params, mask) - 8usize];
    ["Offset of field: moefy_gates_params::gates"]
        [::std::mem::offset_of!(moefy_gates_params, gates) - 16usize];
    ["Offset of field: moefy_gates_params::num_tokens"]
        [::std::mem::offset_of!(moefy_gates_params, num_tokens) - 24usize];
    ["Offset of field: moefy_gates_params::num_experts"]
        [::std::mem::offset_of!(moefy_gates_params, num_experts) - 28usize];
    ["Offset of field: moefy_gates_params::renormalise"]
        [::std::mem::offset_of!(moefy_gates_params, renormalise) - 32usize];
    ["Offset of field: moefy_gates_params::reserved"]
        [::std::mem::offset_of!(moefy_gates_params, reserved) - 36usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_embed_tokens_params {
    pub token_ids: u64,
    pub position_ids: u64,
    pub words: u64,
    pub positions: u64,
    pub token_type: u64,
    pub y: u64,
    pub num_tokens: u32,
    pub d_model: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_embed_tokens_params"]
        [::std::mem::size_of::<moefy_embed_tokens_params>() - 56usize];
    ["Alignment of moefy_embed_tokens_params"]
        [::std::mem::align_of::<moefy_embed_tokens_params>() - 8usize];
    ["Offset of field: moefy_embed_tokens_params::token_ids"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, token_ids) - 0usize];
    ["Offset of field: moefy_embed_tokens_params::position_ids"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, position_ids) - 8usize];
    ["Offset of field: moefy_embed_tokens_params::words"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, words) - 16usize];
    ["Offset of field: moefy_embed_tokens_params::positions"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, positions) - 24usize];
    ["Offset of field: moefy_embed_tokens_params::token_type"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, token_type) - 32usize];
    ["Offset of field: moefy_embed_tokens_params::y"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, y) - 40usize];
    ["Offset of field: moefy_embed_tokens_params::num_tokens"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, num_tokens) - 48usize];
    ["Offset of field: moefy_embed_tokens_params::d_model"]
        [::std::mem::offset_of!(moefy_embed_tokens_params, d_model) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_norm_params {
    pub x: u64,
    pub branch: u64,
    pub residual: u64,
    pub weight: u64,
    pub bias: u64,
    pub num_tokens: u32,
    pub d_model: u32,
    pub epsilon: f32,
    pub is_rms: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_norm_params"][::std::mem::size_of::<moefy_norm_params>() - 56usize];
    ["Alignment of moefy_norm_params"][::std::mem::align_of::<moefy_norm_params>() - 8usize];
    ["Offset of field: moefy_norm_params::x"]
        [::std::mem::offset_of!(moefy_norm_params, x) - 0usize];
    ["Offset of field: moefy_norm_params::branch"]
        [::std::mem::offset_of!(moefy_norm_params, branch) - 8usize];
    ["Offset of field: moefy_norm_params::residual"]
        [::std::mem::offset_of!(moefy_norm_params, residual) - 16usize];
    ["Offset of field: moefy_norm_params::weight"]
        [::std::mem::offset_of!(moefy_norm_params, weight) - 24usize];
    ["Offset of field: moefy_norm_params::bias"]
        [::std::mem::offset_of!(moefy_norm_params, bias) - 32usize];
    ["Offset of field: moefy_norm_params::num_tokens"]
        [::std::mem::offset_of!(moefy_norm_params, num_tokens) - 40usize];
    ["Offset of field: moefy_norm_params::d_model"]
        [::std::mem::offset_of!(moefy_norm_params, d_model) - 44usize];
    ["Offset of field: moefy_norm_params::epsilon"]
        [::std::mem::offset_of!(moefy_norm_params, epsilon) - 48usize];
    ["Offset of field: moefy_norm_params::is_rms"]
        [::std::mem::offset_of!(moefy_norm_params, is_rms) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_attention_params {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub y: u64,
    pub sequence_offsets: u64,
    pub stride: u64,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub scale: f32,
    pub is_causal: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_attention_params"][::std::mem::size_of::<moefy_attention_params>() - 64usize];
    ["Alignment of moefy_attention_params"]
        [::std::mem::align_of::<moefy_attention_params>() - 8usize];
    ["Offset of field: moefy_attention_params::q"]
        [::std::mem::offset_of!(moefy_attention_params, q) - 0usize];
    ["Offset of field: moefy_attention_params::k"]
        [::std::mem::offset_of!(moefy_attention_params, k) - 8usize];
    ["Offset of field: moefy_attention_params::v"]
        [::std::mem::offset_of!(moefy_attention_params, v) - 16usize];
    ["Offset of field: moefy_attention_params::y"]
        [::std::mem::offset_of!(moefy_attention_params, y) - 24usize];
    ["Offset of field: moefy_attention_params::sequence_offsets"]
        [::std::mem::offset_of!(moefy_attention_params, sequence_offsets) - 32usize];
    ["Offset of field: moefy_attention_params::stride"]
        [::std::mem::offset_of!(moefy_attention_params, stride) - 40usize];
    ["Offset of field: moefy_attention_params::num_heads"]
        [::std::mem::offset_of!(moefy_attention_params, num_heads) - 48usize];
    ["Offset of field: moefy_attention_params::num_kv_heads"]
        [::std::mem::offset_of!(moefy_attention_params, num_kv_heads) - 52usize];
    ["Offset of field: moefy_attention_params::scale"]
        [::std::mem::offset_of!(moefy_attention_params, scale) - 56usize];
    ["Offset of field: moefy_attention_params::is_causal"]
        [::std::mem::offset_of!(moefy_attention_params, is_causal) - 60usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_rotary_params {
    pub x: u64,
    pub position_ids: u64,
    pub stride: u64,
    pub log2_base: f64,
    pub num_tokens: u32,
    pub num_heads: u32,
    pub d_head: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_rotary_params"][::std::mem::size_of::<moefy_rotary_params>() - 48usize];
    ["Alignment of moefy_rotary_params"][::std::mem::align_of::<moefy_rotary_params>() - 8usize];
    ["Offset of field: moefy_rotary_params::x"]
        [::std::mem::offset_of!(moefy_rotary_params, x) - 0usize];
    ["Offset of field: moefy_rotary_params::position_ids"]
        [::std::mem::offset_of!(moefy_rotary_params, position_ids) - 8usize];
    ["Offset of field: moefy_rotary_params::stride"]
        [::std::mem::offset_of!(moefy_rotary_params, stride) - 16usize];
    ["Offset of field: moefy_rotary_params::log2_base"]
        [::std::mem::offset_of!(moefy_rotary_params, log2_base) - 24usize];
    ["Offset of field: moefy_rotary_params::num_tokens"]
        [::std::mem::offset_of!(moefy_rotary_params, num_tokens) - 32usize];
    ["Offset of field: moefy_rotary_params::num_heads"]
        [::std::mem::offset_of!(moefy_rotary_params, num_heads) - 36usize];
    ["Offset of field: moefy_rotary_params::d_head"]
        [::std::mem::offset_of!(moefy_rotary_params, d_head) - 40usize];
    ["Offset of field: moefy_rotary_params::reserved"]
        [::std::mem::offset_of!(moefy_rotary_params, reserved) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_pool_params {
    pub x: u64,
    pub sequence_offsets: u64,
    pub y: u64,
    pub num_sequences: u32,
    pub d_model: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_pool_params"][::std::mem::size_of::<moefy_pool_params>() - 32usize];
    ["Alignment of moefy_pool_params"][::std::mem::align_of::<moefy_pool_params>() - 8usize];
    ["Offset of field: moefy_pool_params::x"]
        [::std::mem::offset_of!(moefy_pool_params, x) - 0usize];
    ["Offset of field: moefy_pool_params::sequence_offsets"]
        [::std::mem::offset_of!(moefy_pool_params, sequence_offsets) - 8usize];
    ["Offset of field: moefy_pool_params::y"]
        [::std::mem::offset_of!(moefy_pool_params, y) - 16usize];
    ["Offset of field: moefy_pool_params::num_sequences"]
        [::std::mem::offset_of!(moefy_pool_params, num_sequences) - 24usize];
    ["Offset of field: moefy_pool_params::d_model"]
        [::std::mem::offset_of!(moefy_pool_params, d_model) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_activate_params {
    pub neurons: moefy_neurons,
    pub pre: u64,
    pub hidden: u64,
    pub mask: u64,
    pub gates: u64,
    pub num_tokens: u32,
    pub element_bytes: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_activate_params"][::std::mem::size_of::<moefy_activate_params>() - 120usize];
    ["Alignment of moefy_activate_params"]
        [::std::mem::align_of::<moefy_activate_params>() - 8usize];
    ["Offset of field: moefy_activate_params::neurons"]
        [::std::mem::offset_of!(moefy_activate_params, neurons) - 0usize];
    ["Offset of field: moefy_activate_params::pre"]
        [::std::mem::offset_of!(moefy_activate_params, pre) - 80usize];
    ["Offset of field: moefy_activate_params::hidden"]
        [::std::mem::offset_of!(moefy_activate_params, hidden) - 88usize];
    ["Offset of field: moefy_activate_params::mask"]
        [::std::mem::offset_of!(moefy_activate_params, mask) - 96usize];
    ["Offset of field: moefy_activate_params::gates"]
        [::std::mem::offset_of!(moefy_activate_params, gates) - 104usize];
    ["Offset of field: moefy_activate_params::num_tokens"]
        [::std::mem::offset_of!(moefy_activate_params, num_tokens) - 112usize];
    ["Offset of field: moefy_activate_params::element_bytes"]
        [::std::mem::offset_of!(moefy_activate_params, element_bytes) - 116usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_clear_invalid_params {
    pub y: u64,
    pub num_valid_tokens: u64,
    pub row_bytes: u64,
    pub num_tokens: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_clear_invalid_params"]
        [::std::mem::size_of::<moefy_clear_invalid_params>() - 32usize];
    ["Alignment of moefy_clear_invalid_params"]
        [::std::mem::align_of::<moefy_clear_invalid_params>() - 8usize];
    ["Offset of field: moefy_clear_invalid_params::y"]
        [::std::mem::offset_of!(moefy_clear_invalid_params, y) - 0usize];
    ["Offset of field: moefy_clear_invalid_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_clear_invalid_params, num_valid_tokens) - 8usize];
    ["Offset of field: moefy_clear_invalid_params::row_bytes"]
        [::std::mem::offset_of!(moefy_clear_invalid_params, row_bytes) - 16usize];
    ["Offset of field: moefy_clear_invalid_params::num_tokens"]
        [::std::mem::offset_of!(moefy_clear_invalid_params, num_tokens) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_split_valid_params {
    pub num_valid_tokens: u64,
    pub of_chunk: u64,
    pub chunk_tokens: u32,
    pub num_chunks: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_split_valid_params"]
        [::std::mem::size_of::<moefy_split_valid_params>() - 24usize];
    ["Alignment of moefy_split_valid_params"]
        [::std::mem::align_of::<moefy_split_valid_params>() - 8usize];
    ["Offset of field: moefy_split_valid_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_split_valid_params, num_valid_tokens) - 0usize];
    ["Offset of field: moefy_split_valid_params::of_chunk"]
        [::std::mem::offset_of!(moefy_split_valid_params, of_chunk) - 8usize];
    ["Offset of field: moefy_split_valid_params::chunk_tokens"]
        [::std::mem::offset_of!(moefy_split_valid_params, chunk_tokens) - 16usize];
    ["Offset of field: moefy_split_valid_params::num_chunks"]
        [::std::mem::offset_of!(moefy_split_valid_params, num_chunks) - 20usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_statistics_params {
    pub mask: u64,
    pub num_valid_tokens: u64,
    pub k_histogram: u64,
    pub expert_counts: u64,
    pub num_tokens: u32,
    pub num_experts: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_statistics_params"][::std::mem::size_of::<moefy_statistics_params>() - 40usize];
    ["Alignment of moefy_statistics_params"]
        [::std::mem::align_of::<moefy_statistics_params>() - 8usize];
    ["Offset of field: moefy_statistics_params::mask"]
        [::std::mem::offset_of!(moefy_statistics_params, mask) - 0usize];
    ["Offset of field: moefy_statistics_params::num_valid_tokens"]
        [::std::mem::offset_of!(moefy_statistics_params, num_valid_tokens) - 8usize];
    ["Offset of field: moefy_statistics_params::k_histogram"]
        [::std::mem::offset_of!(moefy_statistics_params, k_histogram) - 16usize];
    ["Offset of field: moefy_statistics_params::expert_counts"]
        [::std::mem::offset_of!(moefy_statistics_params, expert_counts) - 24usize];
    ["Offset of field: moefy_statistics_params::num_tokens"]
        [::std::mem::offset_of!(moefy_statistics_params, num_tokens) - 32usize];
    ["Offset of field: moefy_statistics_params::num_experts"]
        [::std::mem::offset_of!(moefy_statistics_params, num_experts) - 36usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct moefy_read_bandwidth_params {
    pub data: u64,
    pub folded: u64,
    pub data_bytes: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of moefy_read_bandwidth_params"]
        [::std::mem::size_of::<moefy_read_bandwidth_params>() - 24usize];
    ["Alignment of moefy_read_bandwidth_params"]
        [::std::mem::align_of::<moefy_read_bandwidth_params>() - 8usize];
    ["Offset of field: moefy_read_bandwidth_params::data"]
        [::std::mem::offset_of!(moefy_read_bandwidth_params, data) - 0usize];
    ["Offset of field: moefy_read_bandwidth_params::folded"]
        [::std::mem::offset_of!(moefy_read_bandwidth_params, folded) - 8usize];
    ["Offset of field: moefy_read_bandwidth_params::data_bytes"]
        [::std::mem::offset_of!(moefy_read_bandwidth_params, data_bytes) - 16usize];
};
