//! Token ids → the first layer's input.

use super::{Arguments, PerDType, View};
use crate::abi::moefy_embed_tokens_params;
use crate::cuda::driver::RawStream;
use crate::cuda::kernels::Modules;
use crate::cuda::{Device, Format};
use crate::error::Result;

/// Tokens of a block, a warp each.
const TOKENS: u32 = 8;

pub(super) fn load(modules: &Modules) -> Result<PerDType> {
    let names = ["moefy_embed_tokens_f32", "moefy_embed_tokens_f16", "moefy_embed_tokens_bf16"];
    modules.per_dtype("embed_tokens", names, 0)
}

/// The tables that turn ids into vectors, all of one element type.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingTables {
    /// \[vocab, d_model\].
    pub words: View,
    /// \[max_positions, d_model\].
    pub positions: Option<View>,
    /// The row of token type 0, \[1, d_model\].
    pub token_type: Option<View>,
}

/// `y[t] = words[token_ids[t]] + positions[position_ids[t]] + token_type`, y \[num_tokens, d_model\]: what
/// [`reference::embed_tokens`](crate::reference::embed_tokens) gives, with the sum in f32. `token_ids` and
/// `position_ids` are u32 \[1, num_tokens\]; the latter only where there are positions.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](crate::cuda::select); every id must be a row of its table.
pub unsafe fn embed_tokens(
    device: &Device,
    stream: RawStream,
    y: View,
    token_ids: View,
    position_ids: Option<View>,
    tables: &EmbeddingTables,
) -> Result<()> {
    let check = Arguments { device, op: "embed_tokens" };
    let dtype = check.float("y", y)?;
    let [num_tokens, d_model] = y.shape;
    let table = |name, view: View| check.rows(name, view, dtype, [view.shape[0], d_model]);
    let positions = match (tables.positions, position_ids) {
        (None, _) => [0; 2],
        (Some(table_of), Some(ids)) => [
            table("positions", table_of)?,
            check.dense("position_ids", ids, Format::Word, [1, num_tokens])?,
        ],
        (Some(_), None) => {
            return Err(check.error("position_ids", "given, as there are positions", "none"));
        }
    };
    let params = moefy_embed_tokens_params {
        token_ids: check.dense("token_ids", token_ids, Format::Word, [1, num_tokens])?,
        position_ids: positions[1],
        words: table("words", tables.words)?,
        positions: positions[0],
        token_type: tables.token_type.map_or(Ok(0), |view| table("token_type", view))?,
        y: check.rows("y", y, dtype, y.shape)?,
        num_tokens: check.size("num_tokens", num_tokens)?,
        d_model: check.width("d_model", d_model, 1 << 20)?,
    };
    if num_tokens == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let grid = [params.num_tokens.div_ceil(TOKENS), 1, 1];
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { device.body.embed_tokens.get(dtype).launch(stream, grid, 32 * TOKENS, 0, &params) }
}
