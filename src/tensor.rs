//! Vectors and matrices on the host: [`TensorRef`] borrows what an engine or a file holds,
//! [`Tensor`] owns a row-major copy. Nothing here needs more than two dimensions; a vector of n is
//! a matrix of shape \[1, n\].

use std::borrow::Cow;

use half::{bf16, f16};

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

/// A borrowed matrix of any [`DType`], with strides, so that transposed weights need no copy.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    dtype: DType,
    shape: [usize; 2],
    /// In elements.
    strides: [usize; 2],
    bytes: &'a [u8],
}

impl<'a> TensorRef<'a> {
    /// A row-major matrix `[rows, cols]` over `data`.
    ///
    /// # Errors
    /// When `data` does not hold exactly `rows * cols` elements.
    pub fn matrix<E: Element>(data: &'a [E], [rows, cols]: [usize; 2]) -> Result<Self> {
        Self::from_bytes(E::DTYPE, bytemuck::cast_slice(data), [rows, cols])
    }

    /// A vector over `data`, as a matrix of one row.
    pub fn vector<E: Element>(data: &'a [E]) -> Self {
        let shape = [1, data.len()];
        Self { dtype: E::DTYPE, shape, strides: [shape[1], 1], bytes: bytemuck::cast_slice(data) }
    }

    /// A row-major matrix over little-endian bytes, which need no alignment: what a safetensors
    /// file holds.
    ///
    /// # Errors
    /// When `bytes` does not hold exactly `rows * cols` elements.
    pub fn from_bytes(dtype: DType, bytes: &'a [u8], shape: [usize; 2]) -> Result<Self> {
        let [rows, cols] = shape;
        let needed = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes()));
        if needed != Some(bytes.len()) {
            return Err(Error::argument(
                "tensor",
                "data",
                format!("{rows} x {cols} elements of {dtype}"),
                format!("{} bytes", bytes.len()),
            ));
        }
        Ok(Self { dtype, shape, strides: [cols, 1], bytes })
    }

    /// The same memory read as the transpose: \[cols, rows\].
    pub fn transposed(self) -> Self {
        let ([r, c], [rs, cs]) = (self.shape, self.strides);
        Self { shape: [c, r], strides: [cs, rs], ..self }
    }

    /// Element format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// \[rows, cols\].
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// A row-major copy.
    pub fn to_owned(&self) -> Tensor {
        match self.dtype {
            DType::F32 => self.gather::<f32>().into(),
            DType::F16 => self.gather::<f16>().into(),
            DType::BF16 => self.gather::<bf16>().into(),
        }
    }

    fn gather<E: Element>(&self) -> ([usize; 2], Vec<E>) {
        let [rows, cols] = self.shape;
        let [row_stride, col_stride] = self.strides;
        let size = size_of::<E>();
        let mut data = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                let at = (r * row_stride + c * col_stride) * size;
                data.push(bytemuck::pod_read_unaligned(&self.bytes[at..at + size]));
            }
        }
        (self.shape, data)
    }
}

/// The elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// Runs `$body` with `$v` bound to the typed vector inside `$data`.
macro_rules! with_elements {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            Data::F32($v) => $body,
            Data::F16($v) => $body,
            Data::BF16($v) => $body,
        }
    };
}

/// An owned row-major matrix of any [`DType`].
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: [usize; 2],
    data: Data,
}

impl Tensor {
    /// A matrix `[rows, cols]` that takes over `data`, row-major.
    ///
    /// # Errors
    /// When `data` does not hold exactly `rows * cols` elements.
    pub fn matrix<E: Element>(data: Vec<E>, shape: [usize; 2]) -> Result<Self>
    where
        ([usize; 2], Vec<E>): Into<Self>,
    {
        TensorRef::matrix(&data, shape)?;
        Ok((shape, data).into())
    }

    /// A vector that takes over `data`, as a matrix of one row.
    pub fn vector<E: Element>(data: Vec<E>) -> Self
    where
        ([usize; 2], Vec<E>): Into<Self>,
    {
        ([1, data.len()], data).into()
    }

    /// Element format.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
        }
    }

    /// \[rows, cols\].
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A view of the whole tensor.
    pub fn view(&self) -> TensorRef<'_> {
        let [rows, cols] = self.shape;
        TensorRef {
            dtype: self.dtype(),
            shape: [rows, cols],
            strides: [cols, 1],
            bytes: self.as_bytes(),
        }
    }

    /// The elements as bytes, row-major, in the machine's order (little-endian on every machine
    /// that the crate supports).
    pub fn as_bytes(&self) -> &[u8] {
        with_elements!(&self.data, v => bytemuck::cast_slice(v))
    }

    /// The elements widened to f32, exactly; borrowed when they are f32 already.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match &self.data {
            Data::F32(v) => Cow::Borrowed(v),
            Data::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(v) => v.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The elements widened to f64, exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        self.to_f32().iter().map(|&x| f64::from(x)).collect()
    }

    /// The same values rounded to `dtype` (nearest, ties to even).
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        let values = self.to_f32();
        let data = match dtype {
            DType::F32 => Data::F32(values.into_owned()),
            DType::F16 => Data::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Data::BF16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        };
        Self { shape: self.shape, data }
    }

    /// The transpose, copied.
    pub fn transposed(&self) -> Self {
        self.view().transposed().to_owned()
    }

    /// The rows `ids`, in that order: row i of the result is row `ids[i]`.
    ///
    /// # Panics
    /// When an id is not a row.
    pub fn gather_rows(&self, ids: &[u32]) -> Self {
        let cols = self.shape[1];
        let pick = |i: u32| i as usize * cols..(i as usize + 1) * cols;
        let data = match &self.data {
            Data::F32(v) => Data::F32(ids.iter().flat_map(|&i| &v[pick(i)]).copied().collect()),
            Data::F16(v) => Data::F16(ids.iter().flat_map(|&i| &v[pick(i)]).copied().collect()),
            Data::BF16(v) => Data::BF16(ids.iter().flat_map(|&i| &v[pick(i)]).copied().collect()),
        };
        Self { shape: [ids.len(), cols], data }
    }

    /// The columns `ids`, in that order.
    ///
    /// # Panics
    /// When an id is not a column.
    pub fn gather_cols(&self, ids: &[u32]) -> Self {
        self.transposed().gather_rows(ids).transposed()
    }

    /// Place (row, column) and value of the first NaN or infinity, if there is one.
    pub fn first_non_finite(&self) -> Option<([usize; 2], f32)> {
        let values = self.to_f32();
        let at = values.iter().position(|x| !x.is_finite())?;
        Some(([at / self.shape[1], at % self.shape[1]], values[at]))
    }
}

impl From<([usize; 2], Vec<f32>)> for Tensor {
    fn from((shape, data): ([usize; 2], Vec<f32>)) -> Self {
        Self { shape, data: Data::F32(data) }
    }
}

impl From<([usize; 2], Vec<f16>)> for Tensor {
    fn from((shape, data): ([usize; 2], Vec<f16>)) -> Self {
        Self { shape, data: Data::F16(data) }
    }
}

impl From<([usize; 2], Vec<bf16>)> for Tensor {
    fn from((shape, data): ([usize; 2], Vec<bf16>)) -> Self {
        Self { shape, data: Data::BF16(data) }
    }
}
