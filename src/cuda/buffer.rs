//! Memory on a device.

use bytemuck::Pod;

use super::Device;
use super::driver::Context;
use crate::error::{Error, Result};

/// Memory on a device, freed when dropped. Its content is arbitrary until it is written. Its
/// functions wait for the device; operations on streams take its address.
pub struct Buffer {
    context: Context,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Allocates; 0 bytes are fine.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        // The driver refuses to allocate nothing.
        let address = device.context.allocate(bytes.max(1))?;
        Ok(Self { context: device.context.clone(), address, bytes })
    }

    /// Allocates, all bytes zero.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn zeroed(device: &Device, bytes: usize) -> Result<Self> {
        let buffer = Self::new(device, bytes)?;
        // SAFETY: nobody else knows of it.
        unsafe { device.context.clear(buffer.address, bytes)? };
        Ok(buffer)
    }

    /// Allocates and copies.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn from_slice<T: Pod>(device: &Device, data: &[T]) -> Result<Self> {
        let mut buffer = Self::new(device, size_of_val(data))?;
        buffer.write(data)?;
        Ok(buffer)
    }

    /// The same content in memory of its own.
    #[cfg(feature = "cuda")]
    pub(super) fn copy(&self) -> Result<Self> {
        let copy = Self {
            context: self.context.clone(),
            address: self.context.allocate(self.bytes.max(1))?,
            bytes: self.bytes,
        };
        // SAFETY: the sizes are equal.
        unsafe { self.context.copy_within(copy.address, self.address, self.bytes)? };
        Ok(copy)
    }

    /// Where it begins, aligned to 256 bytes.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites all of it.
    ///
    /// # Errors
    /// When `data` has another size.
    pub fn write<T: Pod>(&mut self, data: &[T]) -> Result<()> {
        let data: &[u8] = bytemuck::cast_slice(data);
        if data.len() != self.bytes {
            let expected = format!("{} bytes", self.bytes);
            return Err(Error::argument("buffer", "data", expected, data.len()));
        }
        // SAFETY: the sizes are equal.
        unsafe { self.context.copy_to_device(self.address, data) }
    }

    /// Copies all of it to the host.
    ///
    /// # Errors
    /// When its size is no multiple of the element's, or an earlier kernel failed.
    pub fn read<T: Pod>(&self) -> Result<Vec<T>> {
        if !self.bytes.is_multiple_of(size_of::<T>()) {
            let expected = format!("a multiple of {} bytes", size_of::<T>());
            return Err(Error::argument("buffer", "size", expected, self.bytes));
        }
        let mut data = vec![T::zeroed(); self.bytes / size_of::<T>()];
        // SAFETY: the sizes are equal.
        unsafe { self.context.copy_to_host(bytemuck::cast_slice_mut(&mut data), self.address)? };
        Ok(data)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `new` allocated it; freeing waits for what the device still does with it.
        unsafe { self.context.free(self.address) };
    }
}
