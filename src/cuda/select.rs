//! Selection from given scores.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::view::{Arguments, Format, View, Workspace};
use crate::abi::{MOEFY_MAX_EXPERTS, moefy_rule, moefy_select_params, moefy_selection};
use crate::error::Result;
use crate::ffn::{Selection, SelectionRule};

/// Of a block, as long as their rows fit.
const MAX_WARPS: usize = 8;
/// What every supported device gives to a block.
const MAX_SHARED_BYTES: usize = 96 << 10;

pub(super) struct Kernels {
    select: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self { select: modules.function("select", "moefy_select", MAX_SHARED_BYTES)? })
    }
}

/// What [`select`] writes.
#[derive(Clone, Copy, Debug)]
pub struct SelectOutputs {
    /// S(t) as u32 \[num_tokens, ⌈num_experts/32⌉\], the layout of [`ExpertMask`](crate::ffn::ExpertMask).
    pub mask: View,
    /// k of each token, u32 \[1, num_tokens\].
    pub counts: Option<View>,
    /// One u32 that gains the bit `MOEFY_STATUS_ROW_WITHOUT_SCORE` when a row has no finite score. It
    /// is never cleared here.
    pub status: Option<View>,
}

/// Bytes of workspace that [`select`] needs.
pub fn select_workspace_bytes() -> usize {
    0
}

/// S(t) from scores f32 \[num_tokens, num_experts\], whose rows may lie apart: bit for bit what
/// [`reference::select`](crate::reference::select) gives. Rows at and beyond the device-side
/// `num_valid_tokens` (u32 \[1, 1\]) select nothing.
///
/// # Errors
/// For more than 4096 experts, and on any argument that does not fit; nothing was launched then.
///
/// # Safety
/// The views must lead to memory of their shapes that stays valid and unshared until the stream has
/// run the kernel, and `stream` must be a stream of the device's primary context.
pub unsafe fn select(
    device: &Device,
    stream: RawStream,
    outputs: &SelectOutputs,
    scores: View,
    num_valid_tokens: Option<View>,
    selection: &Selection,
    workspace: Workspace,
) -> Result<()> {
    let [num_tokens, num_experts] = scores.shape;
    let check = Arguments { device, op: "select" };
    let row_words = check_num_experts(&check, num_experts)?;
    check.workspace(workspace, select_workspace_bytes())?;
    let params = moefy_select_params {
        scores: check.strided("scores", scores, Format::F32, scores.shape, 4)?,
        mask: check.dense("mask", outputs.mask, Format::Word, [num_tokens, row_words])?,
        counts: check.optional_words("counts", outputs.counts, num_tokens)?,
        status: check.optional_words("status", outputs.status, 1)?,
        num_valid_tokens: check.optional_words("num_valid_tokens", num_valid_tokens, 1)?,
        score_stride: scores.row_stride as u64,
        selection: abi_selection(selection, num_experts)?,
        num_tokens: check.size("num_tokens", num_tokens)?,
        num_experts: num_experts as u32,
        ..bytemuck::Zeroable::zeroed()
    };
    if num_tokens == 0 {
        return Ok(());
    }
    device.context.bind()?;
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { launch_select(device, stream, &params) }
}

/// # Safety
/// The addresses must lead to what the parameters say, of at least one token.
pub(super) unsafe fn launch_select(
    device: &Device,
    stream: RawStream,
    params: &moefy_select_params,
) -> Result<()> {
    let words = selection_words(&params.selection, params.num_experts as usize);
    let warps = (MAX_SHARED_BYTES / (4 * words)).clamp(1, MAX_WARPS);
    let params = moefy_select_params { words_per_warp: words as u32, ..*params };
    let grid = [params.num_tokens.div_ceil(warps as u32), 1, 1];
    let shared_bytes = warps * words * 4;
    unsafe { device.select.select.launch(stream, grid, 32 * warps as u32, shared_bytes, &params) }
}

/// Words of shared memory for the selection of one token: its keys, and as many again to sort.
pub(super) fn selection_words(selection: &moefy_selection, num_experts: usize) -> usize {
    let sorted = match selection.rule {
        moefy_rule::MOEFY_RULE_CUMULATIVE_SHARE => num_experts.next_power_of_two(),
        _ => 0,
    };
    num_experts.next_multiple_of(32) + sorted.next_multiple_of(32)
}

/// Words per row of the mask.
pub(super) fn check_num_experts(check: &Arguments<'_>, num_experts: usize) -> Result<usize> {
    if (1..=MOEFY_MAX_EXPERTS as usize).contains(&num_experts) {
        return Ok(num_experts.div_ceil(32));
    }
    let expected = format!("between 1 and {MOEFY_MAX_EXPERTS}");
    Err(check.error("num_experts", expected, num_experts))
}

pub(super) fn abi_selection(selection: &Selection, num_experts: usize) -> Result<moefy_selection> {
    selection.check(num_experts)?;
    let (rule, k, threshold) = match selection.rule {
        SelectionRule::TopK { k } => (moefy_rule::MOEFY_RULE_TOP_K, k as u32, 0.0),
        SelectionRule::DynamicK { rel_threshold } => {
            (moefy_rule::MOEFY_RULE_DYNAMIC_K, 0, rel_threshold)
        }
        SelectionRule::CumulativeShare { share } => {
            (moefy_rule::MOEFY_RULE_CUMULATIVE_SHARE, 0, share)
        }
    };
    let max_experts = selection.max_experts.unwrap_or(num_experts).min(num_experts) as u32;
    Ok(moefy_selection { rule, k, threshold, max_experts })
}
