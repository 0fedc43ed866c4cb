//! Arrays on the device that belong to someone else.

use super::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What the elements of a device array are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Floating point.
    Float(DType),
    /// Bit masks, ids, counts, offsets: u32.
    Word,
}

impl Format {
    /// f32.
    pub const F32: Self = Self::Float(DType::F32);

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.bytes(),
            Self::Word => 4,
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(f),
            Self::Word => f.write_str("u32"),
        }
    }
}

/// A row-major matrix on a device, by its address. A vector of n is a matrix of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Device address of the first element.
    pub address: u64,
    /// Element format.
    pub format: Format,
    /// \[rows, columns\].
    pub shape: [usize; 2],
    /// Elements from one row to the next.
    pub row_stride: usize,
}

impl View {
    /// A matrix without gaps.
    pub fn matrix(address: u64, format: Format, shape: [usize; 2]) -> Self {
        Self { address, format, shape, row_stride: shape[1] }
    }

    /// A vector.
    pub fn vector(address: u64, format: Format, len: usize) -> Self {
        Self::matrix(address, format, [1, len])
    }

    /// A vector of words.
    pub fn words(address: u64, len: usize) -> Self {
        Self::vector(address, Format::Word, len)
    }
}

/// Memory on a device that an operation may use while it runs, aligned to 256 bytes. Its content
/// before and after means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Device address; may be null when `bytes` is 0.
    pub address: u64,
    /// Size.
    pub bytes: usize,
}

impl Workspace {
    /// For an operation that needs none.
    pub const NONE: Self = Self { address: 0, bytes: 0 };
}

/// Checks the arguments of one operation before anything is launched.
pub(super) struct Arguments<'a> {
    pub(super) device: &'a Device,
    pub(super) op: &'static str,
}

impl Arguments<'_> {
    pub(super) fn error(
        &self,
        name: &str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Error {
        Error::argument(self.op, name, expected, got)
    }

    /// A size as the kernels count: 32 bits.
    pub(super) fn size(&self, name: &str, size: usize) -> Result<u32> {
        // One less bit, so that sums of two cannot overflow.
        let size = u32::try_from(size).ok().filter(|&size| size < 1 << 31);
        size.ok_or_else(|| self.error(name, "below 2^31", "more"))
    }

    /// The address of a matrix of this format and shape whose rows may lie apart, but begin at
    /// multiples of `alignment` bytes.
    pub(super) fn strided(
        &self,
        name: &str,
        view: View,
        format: Format,
        shape: [usize; 2],
        alignment: usize,
    ) -> Result<u64> {
        if view.format != format {
            return Err(self.error(name, format!("of type {format}"), view.format));
        }
        if view.shape != shape {
            return Err(self.error(
                name,
                format!("of shape {shape:?}"),
                format!("{:?}", view.shape),
            ));
        }
        let row_bytes = view.row_stride.checked_mul(format.bytes());
        let in_range = row_bytes.and_then(|bytes| bytes.checked_mul(shape[0])).is_some();
        if view.row_stride < shape[1] || !in_range {
            let expected = format!("with rows at least {} elements apart", shape[1]);
            return Err(self.error(name, expected, view.row_stride));
        }
        if shape[0] > 1 && row_bytes.is_some_and(|bytes| !bytes.is_multiple_of(alignment)) {
            let expected = format!("with rows that begin at multiples of {alignment} bytes");
            return Err(self.error(name, expected, format!("a stride of {}", view.row_stride)));
        }
        if shape.contains(&0) {
            return Ok(view.address);
        }
        self.address(name, view.address, alignment)
    }

    /// The same for a matrix without gaps.
    pub(super) fn dense(
        &self,
        name: &str,
        view: View,
        format: Format,
        shape: [usize; 2],
    ) -> Result<u64> {
        if shape[0] > 1 && view.row_stride != view.shape[1] {
            let expected = format!("without gaps, so {} elements from row to row", view.shape[1]);
            return Err(self.error(name, expected, view.row_stride));
        }
        self.strided(name, view, format, shape, format.bytes())
    }

    /// The same for words that may be absent; null is absence.
    pub(super) fn optional_words(&self, name: &str, view: Option<View>, len: usize) -> Result<u64> {
        view.map_or(Ok(0), |view| self.dense(name, view, Format::Word, [1, len]))
    }

    /// An address that this device can use.
    pub(super) fn address(&self, name: &str, address: u64, alignment: usize) -> Result<u64> {
        if address == 0 {
            return Err(self.error(name, "a device address", "null"));
        }
        if !address.is_multiple_of(alignment as u64) {
            let expected = format!("aligned to {alignment} bytes");
            return Err(self.error(name, expected, format!("{address:#x}")));
        }
        let ordinal = self.device.properties().ordinal;
        match self.device.context.device_of(address)? {
            Some(owner) if usize::try_from(owner) == Ok(ordinal) => Ok(address),
            Some(owner) => {
                Err(self.error(name, format!("on device {ordinal}"), format!("device {owner}")))
            }
            None => Err(self.error(name, "a device address", format!("{address:#x}"))),
        }
    }

    /// The address of a workspace of at least `needed` bytes.
    pub(super) fn workspace(&self, workspace: Workspace, needed: usize) -> Result<u64> {
        if workspace.bytes < needed {
            let expected = format!("of at least {needed} bytes");
            return Err(self.error("workspace", expected, workspace.bytes));
        }
        if needed == 0 {
            return Ok(workspace.address);
        }
        self.address("workspace", workspace.address, 256)
    }
}
