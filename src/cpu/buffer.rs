//! f32 memory that starts on a cache line, so that no vector load straddles two.

use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer that grows and never shrinks.
#[derive(Clone, Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    pub fn copy_of(values: &[f32]) -> Self {
        let mut buffer = Self::default();
        buffer.first(values.len()).copy_from_slice(values);
        buffer
    }

    /// The first `len` elements, with whatever values they have.
    pub fn first(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// All elements; the last line may hold more than was asked for.
    pub fn as_slice(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }
}
