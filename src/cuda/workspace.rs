//! How an operation divides its workspace.

/// Places of arrays in a workspace, each aligned to 256 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    bytes: usize,
}

impl Layout {
    /// The place of an array of `count` elements of `size` bytes; `None` when it cannot exist.
    pub(super) fn place(&mut self, count: usize, size: usize) -> Option<u64> {
        let place = self.bytes;
        let bytes = count.checked_mul(size)?.checked_next_multiple_of(256)?;
        self.bytes = self.bytes.checked_add(bytes)?;
        Some(place as u64)
    }

    /// Bytes of everything.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
