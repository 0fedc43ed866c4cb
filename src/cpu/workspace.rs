use super::buffer::Buffer;
use super::index::TokenIndex;
use super::neurons::Pieces;
use crate::ffn::ExpertMask;

/// Memory that calls reuse: it grows to what the largest call needed, and from then on nothing is
/// allocated. One workspace serves any number of layers, one call at a time.
#[derive(Debug)]
pub struct Workspace {
    pub(super) hidden: Buffer,
    pub(super) router_hidden: Buffer,
    pub(super) scores: Buffer,
    pub(super) gates: Vec<f32>,
    pub(super) norms: Vec<(f32, f32)>,
    pub(super) order: Vec<u32>,
    pub(super) mask: ExpertMask,
    pub(super) index: TokenIndex,
    pub(super) pieces: Pieces,
}

impl Default for Workspace {
    fn default() -> Self {
        Self {
            hidden: Buffer::default(),
            router_hidden: Buffer::default(),
            scores: Buffer::default(),
            gates: Vec::new(),
            norms: Vec::new(),
            order: Vec::new(),
            mask: ExpertMask::none(0, 0),
            index: TokenIndex::default(),
            pieces: Pieces::default(),
        }
    }
}
