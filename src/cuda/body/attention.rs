//! Softmax attention within packed sequences.

use super::{Arguments, PerDType, VECTOR_BYTES, View};
use crate::abi::moefy_attention_params;
use crate::cuda::driver::{Function, RawStream};
use crate::cuda::kernels::Modules;
use crate::cuda::{Device, Format};
use crate::dtype::DType;
use crate::error::Result;

const THREADS: u32 = 128;
/// Elements of a head that there are kernels for.
const HEADS: [usize; 4] = [32, 64, 96, 128];
/// Queries of a block of f32.
const QUERIES_F32: usize = 16;
/// Rows in shared memory beside the queries: two tiles of keys and two of values.
const KEYS_AND_VALUES: usize = 4 * 64;

pub(super) struct Kernels {
    portable: [PerDType; 4],
    /// On Hopper, of heads of 64 and of 128: f16, bf16.
    wide: Option<[[Function; 2]; 2]>,
}

const WIDE_MODULE: &str = "sm90_attention";
const WIDE_HEADS: [usize; 2] = [64, 128];
const WIDE_QUERIES: usize = 64;

/// Dynamic shared memory of the kernels for Hopper: queries, and two tiles of keys and two of values.
fn wide_shared_bytes(d_head: usize) -> usize {
    let keys = if d_head == 64 { 128 } else { 64 };
    (WIDE_QUERIES + 4 * keys) * 2 * d_head
}

macro_rules! names {
    ($d_head:literal) => {
        [
            concat!("moefy_attention_f32_", $d_head),
            concat!("moefy_attention_f16_", $d_head),
            concat!("moefy_attention_bf16_", $d_head),
        ]
    };
}

/// Queries of a block of the kernels for 16 bits.
fn queries(d_head: usize) -> usize {
    if d_head <= 64 { 128 } else { 64 }
}

/// Dynamic shared memory of the same.
fn shared_bytes(d_head: usize) -> usize {
    (queries(d_head) + KEYS_AND_VALUES) * (2 * d_head + 16)
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let names = [names!("32"), names!("64"), names!("96"), names!("128")];
        let mut loaded = Vec::with_capacity(HEADS.len());
        for (names, d_head) in names.into_iter().zip(HEADS) {
            loaded.push(modules.per_dtype("attention", names, shared_bytes(d_head))?);
        }
        let wide = || -> Result<[[Function; 2]; 2]> {
            let load =
                |d_head, name| modules.function(WIDE_MODULE, name, wide_shared_bytes(d_head));
            Ok([
                [
                    load(64, "moefy_attention_wide_f16_64")?,
                    load(64, "moefy_attention_wide_bf16_64")?,
                ],
                [
                    load(128, "moefy_attention_wide_f16_128")?,
                    load(128, "moefy_attention_wide_bf16_128")?,
                ],
            ])
        };
        Ok(Self {
            portable: loaded
                .try_into()
                .unwrap_or_else(|_| unreachable!("as many as there are heads")),
            wide: modules.module(WIDE_MODULE).map(|_| wide()).transpose()?,
        })
    }

    /// Kernel, queries of a block, and bytes of shared memory, for the head of this place among [`HEADS`].
    fn of(&self, dtype: DType, size: usize) -> (&Function, usize, usize) {
        let d_head = HEADS[size];
        let wide = WIDE_HEADS.iter().position(|&head| head == d_head);
        if let (Some(kernels), Some(wide)) = (&self.wide, wide)
            && dtype != DType::F32
        {
            let kernel = &kernels[wide][usize::from(dtype == DType::BF16)];
            return (kernel, WIDE_QUERIES, wide_shared_bytes(d_head));
        }
        let kernel = self.portable[size].get(dtype);
        match dtype {
            DType::F32 => (kernel, QUERIES_F32, 0),
            _ => (kernel, queries(d_head), shared_bytes(d_head)),
        }
    }
}

/// What [`attention`] reads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs {
    /// \[num_tokens, num_heads · d_head\].
    pub q: View,
    /// \[num_tokens, num_kv_heads · d_head\]; rows as far apart as those of q.
    pub k: View,
    /// The same.
    pub v: View,
    /// u32 \[1, num_sequences + 1\]: the first token of each sequence, and the end of the last. Tokens beyond
    /// it are padding, and their rows of y stay as they are.
    pub sequence_offsets: View,
    /// Tokens of the longest sequence, or more.
    pub max_length: usize,
    /// Heads of q.
    pub num_heads: usize,
    /// Heads of k and v, each for `num_heads / num_kv_heads` heads of q.
    pub num_kv_heads: usize,
    /// Whether a token sees only itself and those before it.
    pub is_causal: bool,
}

/// `y = softmax(Q Kᵀ / √d_head) V` of every head within each sequence, y \[num_tokens, num_heads · d_head\],
/// d_head of 32, 64, 96 or 128: what [`reference::attention`](crate::reference::attention) gives, with sums in
/// f32. An empty sequence is none.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](crate::cuda::select); the offsets must not decrease, nor a sequence be longer than
/// `max_length`, nor end beyond the tokens.
pub unsafe fn attention(
    device: &Device,
    stream: RawStream,
    y: View,
    inputs: &AttentionInputs,
) -> Result<()> {
    let AttentionInputs { q, k, v, num_heads, num_kv_heads, .. } = *inputs;
    let check = Arguments { device, op: "attention" };
    let dtype = check.float("q", q)?;
    let [num_tokens, width] = q.shape;
    let divides = |heads: usize, of: usize| heads > 0 && of.is_multiple_of(heads);
    if !divides(num_heads, width) {
        let expected = format!("a divisor of the width of q, {width}");
        return Err(check.error("num_heads", expected, num_heads));
    }
    if !divides(num_kv_heads, num_heads) {
        let expected = format!("a divisor of num_heads = {num_heads}");
        return Err(check.error("num_kv_heads", expected, num_kv_heads));
    }
    let d_head = width / num_heads;
    let Some(size) = HEADS.iter().position(|&head| head == d_head) else {
        return Err(check.error("d_head", "32, 64, 96 or 128", d_head));
    };
    let of_keys = [num_tokens, num_kv_heads * d_head];
    let rows = |name, view: View, shape| {
        if num_tokens > 1 && view.row_stride != q.row_stride {
            let expected = format!("with rows {} elements apart, as those of q", q.row_stride);
            return Err(check.error(name, expected, view.row_stride));
        }
        check.strided(name, view, Format::Float(dtype), shape, VECTOR_BYTES)
    };
    let num_sequences = inputs.sequence_offsets.shape[1].saturating_sub(1);
    let offsets = [1, num_sequences + 1];
    let params = moefy_attention_params {
        q: rows("q", q, q.shape)?,
        k: rows("k", k, of_keys)?,
        v: rows("v", v, of_keys)?,
        y: check.rows("y", y, dtype, q.shape)?,
        sequence_offsets: check.dense(
            "sequence_offsets",
            inputs.sequence_offsets,
            Format::Word,
            offsets,
        )?,
        stride: q.row_stride as u64,
        num_heads: check.size("num_heads", num_heads)?,
        num_kv_heads: num_kv_heads as u32,
        scale: 1.0 / (d_head as f32).sqrt(),
        is_causal: inputs.is_causal.into(),
    };
    check.size("num_tokens", num_tokens)?;
    // A grid's second and third dimension.
    if num_heads > 65_535 || num_sequences > 65_535 {
        let got = format!("{num_heads} heads, {num_sequences} sequences");
        return Err(check.error("sizes", "at most 65535 heads and as many sequences", got));
    }
    let max_length = inputs.max_length.min(num_tokens);
    if max_length == 0 || num_sequences == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let (kernel, queries, shared_bytes) = device.body.attention.of(dtype, size);
    let grid = [max_length.div_ceil(queries) as u32, params.num_heads, num_sequences as u32];
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { kernel.launch(stream, grid, THREADS, shared_bytes, &params) }
}
