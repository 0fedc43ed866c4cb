//! How a plan divides its workspace.

use super::dense::dense_workspace_bytes;
use super::path::MAX_FEW_TOKENS;
use super::token_tiles::{MAX_TOKENS, TILE_TOKENS, TILE_WORDS};
use super::view::{Arguments, Format, View};
use super::workspace::Layout;
use super::{
    ExpertLists, MoeFfn, Path, PlanOptions, TokenTiles, experts_workspace_bytes,
    route_index_workspace_bytes, router_select_workspace_bytes, token_tiles_workspace_bytes,
};
use crate::error::Result;

/// Tokens that go through the layer together; more go in turns, so that the workspace is bounded.
pub(super) const MAX_CHUNK: usize = 8192;
const _: () = assert!(MAX_CHUNK <= MAX_TOKENS);
/// Bytes of h of the experts that a chunk may have.
const MAX_HIDDEN_BYTES: usize = 512 << 20;

/// Places in the workspace, of one chunk but for `valid`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// Tokens of a chunk.
    pub(super) chunk: usize,
    /// Experts that a token can have at most.
    pub(super) max_k: usize,
    /// Of the experts' neurons, the share that a token is expected to execute.
    pub(super) density: f64,
    /// Whether a choice may go expert by expert.
    pub(super) many: bool,
    pub(super) valid: u64,
    pub(super) mask: u64,
    pub(super) scores: u64,
    pub(super) counts: u64,
    pub(super) offsets: u64,
    pub(super) token_ids: u64,
    pub(super) expert_masks: u64,
    pub(super) word_offsets: u64,
    pub(super) union_ids: u64,
    pub(super) num_union: u64,
    /// Of a router that runs beside the first dense product.
    pub(super) beside: u64,
    /// Whether tokens go in tiles.
    pub(super) tiled: bool,
    pub(super) tile_counts: u64,
    pub(super) tile_expert_ids: u64,
    pub(super) tile_masks: u64,
    /// Of whatever runs: one after another.
    pub(super) op: u64,
    pub(super) bytes: usize,
}

impl MoeFfn {
    /// Places for at most `max_tokens` tokens.
    pub(super) fn places(&self, max_tokens: usize, options: &PlanOptions) -> Result<Places> {
        let check = Arguments { device: self.device(), op: "plan" };
        let neurons = self.neurons();
        let num_experts = neurons.num_experts;
        check.size("max_tokens", max_tokens)?;
        let max_k = self.selection().most_experts(num_experts);
        let mut chunk = max_tokens.min(MAX_CHUNK);
        let tiled = options.path == Some(Path::TokenTile);
        // In tiles a token has room for every neuron: 235 MB of f16 at most where there are 14,336.
        let hidden_row = if tiled {
            neurons.w_out.shape[0] * self.dtype().bytes()
        } else {
            neurons.expert_width.next_multiple_of(8) * self.dtype().bytes() * max_k
        };
        while chunk > 1024 && chunk * hidden_row > MAX_HIDDEN_BYTES {
            chunk /= 2;
        }
        let mut places = Places {
            chunk,
            max_k,
            density: self.routed_density(options),
            many: self.path(max_tokens, options, true) == Path::ExpertMajor,
            valid: 0,
            mask: 0,
            scores: 0,
            counts: 0,
            offsets: 0,
            token_ids: 0,
            expert_masks: 0,
            word_offsets: 0,
            union_ids: 0,
            num_union: 0,
            beside: 0,
            tiled,
            tile_counts: 0,
            tile_expert_ids: 0,
            tile_masks: 0,
            op: 0,
            bytes: 0,
        };
        let op = self.op_bytes(&places, max_tokens, options)?;
        let mut layout = Layout::default();
        let mut place = |count: usize| layout.place(count, 4);
        let mut fill = || {
            places.valid = place(max_tokens.div_ceil(chunk.max(1)))?;
            places.mask = place(chunk * num_experts.div_ceil(32))?;
            places.scores = place(chunk.checked_mul(num_experts)?)?;
            if places.many {
                places.counts = place(num_experts)?;
                places.offsets = place(num_experts + 1)?;
                places.token_ids = place(list_entries(chunk, max_k)?)?;
                places.expert_masks = place(num_experts.checked_mul(chunk.div_ceil(32))?)?;
                places.word_offsets = place(num_experts.checked_mul(chunk.div_ceil(32))?)?;
                places.union_ids = place(num_experts)?;
                places.num_union = place(1)?;
            }
            if tiled {
                let tiles = chunk.div_ceil(TILE_TOKENS);
                places.token_ids = place(chunk)?;
                places.tile_counts = place(tiles)?;
                places.tile_expert_ids = place(tiles.checked_mul(num_experts)?)?;
                places.tile_masks = place(tiles.checked_mul(num_experts * TILE_WORDS)?)?;
            }
            if self.may_be_masked(options) {
                let bytes = router_select_workspace_bytes(chunk, &self.router().view());
                places.beside = place(bytes.div_ceil(4))?;
            }
            places.op = place(op?.div_ceil(4))?;
            Some(())
        };
        fill().ok_or_else(|| {
            check.error("max_tokens", "such that the workspace can exist", max_tokens)
        })?;
        places.bytes = layout.bytes();
        Ok(places)
    }

    /// Workspace of the operations of a chunk.
    fn op_bytes(
        &self,
        places: &Places,
        max_tokens: usize,
        options: &PlanOptions,
    ) -> Result<Option<usize>> {
        let neurons = self.neurons();
        let router = self.router().view();
        let routing = router_select_workspace_bytes(places.chunk, &router);
        let lists = route_index_workspace_bytes(places.chunk, neurons.num_experts);
        let mut bytes = Some(routing.max(lists));
        let mut include = |other: Option<usize>| bytes = bytes.zip(other).map(|(a, b)| a.max(b));
        let sparse = |tokens, lists, tiles| {
            experts_workspace_bytes(self.device(), neurons, tokens, lists, tiles)
        };
        if let Some(layer) = self.dense_layer_of(max_tokens, options)? {
            include(dense_workspace_bytes(&layer, places.chunk));
        }
        let runs = |path| options.path.is_none_or(|forced| forced == path);
        for shape in self.few_fused_shapes(max_tokens, options).iter().flatten() {
            include(Some(shape.bytes));
        }
        if places.many {
            let lists = places.lists(0, neurons.num_experts, places.chunk);
            include(Some(sparse(places.chunk, Some(lists), None)?));
        }
        if places.tiled {
            let tiles = places.tiles(0, neurons.num_experts, places.chunk);
            include(token_tiles_workspace_bytes(places.chunk, neurons.num_experts));
            include(Some(sparse(places.chunk, None, Some(tiles))?));
        }
        if runs(Path::Few) {
            let tokens = if options.path.is_none() { MAX_FEW_TOKENS } else { places.chunk };
            include(Some(sparse(tokens.min(places.chunk), None, None)?));
        }
        Ok(bytes)
    }
}

/// Entries of the lists of so many tokens. One is spare: lists that are full may end early as far as kernels know, which look
/// each pair up then, and those of top-k always were.
fn list_entries(tokens: usize, max_k: usize) -> Option<usize> {
    tokens.checked_mul(max_k)?.checked_add(1)
}

impl Places {
    /// The lists of so many tokens at `base`.
    pub(super) fn token_ids(&self, base: u64, tokens: usize) -> View {
        let entries = list_entries(tokens, self.max_k).expect("a chunk has no more tokens");
        View::words(base + self.token_ids, entries)
    }

    /// A word for each expert and every 32 tokens.
    pub(super) fn by_words(&self, address: u64, num_experts: usize, tokens: usize) -> View {
        View::matrix(address, Format::Word, [num_experts, tokens.div_ceil(32)])
    }

    /// What [`experts`](super::experts) needs of the lists at `base`.
    pub(super) fn lists(&self, base: u64, num_experts: usize, tokens: usize) -> ExpertLists {
        ExpertLists {
            offsets: View::words(base + self.offsets, num_experts + 1),
            token_ids: self.token_ids(base, tokens),
            word_offsets: self.by_words(base + self.word_offsets, num_experts, tokens),
            expected_pairs: Some(((tokens * num_experts) as f64 * self.density) as usize),
        }
    }

    /// What [`token_tiles`](super::token_tiles) writes at `base`.
    pub(super) fn tiles(&self, base: u64, num_experts: usize, tokens: usize) -> TokenTiles {
        let num_tiles = tokens.div_ceil(TILE_TOKENS);
        let rows = |place: u64, width| View::matrix(base + place, Format::Word, [num_tiles, width]);
        TokenTiles {
            token_ids: View::words(base + self.token_ids, tokens),
            counts: View::words(base + self.tile_counts, num_tiles),
            expert_ids: rows(self.tile_expert_ids, num_experts),
            masks: rows(self.tile_masks, num_experts * TILE_WORDS),
        }
    }
}
