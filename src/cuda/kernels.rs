//! The compiled kernels that this build carries.

use super::Properties;
use super::driver::{Context, Function, Module as Loaded};
use crate::dtype::DType;
use crate::error::{Error, Result};

struct Build {
    /// Why there are no kernels.
    missing: Option<&'static str>,
    toolkit: &'static str,
    ptx_isa: &'static str,
    modules: &'static [Module],
}

struct Module {
    name: &'static str,
    image: &'static [u8],
}

#[allow(unused_macros, reason = "a build without nvcc has no image")]
macro_rules! image {
    ($path:literal) => {{
        // The driver reads the headers of an image as words.
        #[repr(C, align(16))]
        struct Aligned<T: ?Sized>(T);
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &IMAGE.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/kernel_table.rs"));

/// What the build knows about its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildInfo {
    /// Version of the compiler that made them, "13.0.88".
    pub toolkit: &'static str,
    /// Version of the PTX among them, "9.0".
    pub ptx_isa: &'static str,
    /// Fingerprint of the sources that decide what runs on a GPU.
    pub source_digest: &'static str,
}

/// What the kernels of this build were compiled with.
///
/// # Errors
/// When the build has none; the error says where it looked for a compiler.
pub fn build_info() -> Result<BuildInfo> {
    match BUILD.missing {
        Some(reason) => Err(Error::NoGpu {
            problem: format!(
                "this build of moefy has no kernels, because {reason}; build it again where nvcc \
                 is on the PATH, or with MOEFY_NVCC=/path/to/nvcc"
            ),
        }),
        None => Ok(BuildInfo {
            toolkit: BUILD.toolkit,
            ptx_isa: BUILD.ptx_isa,
            source_digest: env!("MOEFY_SOURCE_DIGEST"),
        }),
    }
}

/// Every module of the build that the device can run.
pub(super) struct Modules(Vec<(&'static str, Loaded)>);

impl Modules {
    pub(super) fn load(context: &Context, device: &Properties) -> Result<Self> {
        let build = build_info()?;
        check_device(&build, device).map_err(|problem| Error::NoGpu { problem })?;
        let is_hopper = device.compute_capability == (9, 0);
        let usable = BUILD.modules.iter().filter(|m| is_hopper || !m.name.starts_with("sm90_"));
        let load = |m: &Module| Ok((m.name, context.load_module(m.name, m.image, is_hopper)?));
        Ok(Self(usable.map(load).collect::<Result<_>>()?))
    }

    /// An entry point of `module`, and the most dynamic shared memory it will ask for.
    pub(super) fn function(
        &self,
        module: &str,
        name: &'static str,
        shared_bytes: usize,
    ) -> Result<Function> {
        self.module(module).expect("the build compiles every module").function(name, shared_bytes)
    }

    /// A module that only some devices can run.
    pub(super) fn module(&self, module: &str) -> Option<&Loaded> {
        self.0.iter().find(|(name, _)| *name == module).map(|(_, loaded)| loaded)
    }

    /// One entry point per element type.
    pub(super) fn per_dtype(
        &self,
        module: &str,
        [f32, f16, bf16]: [&'static str; 3],
        shared_bytes: usize,
    ) -> Result<PerDType> {
        Ok(PerDType {
            f32: self.function(module, f32, shared_bytes)?,
            f16: self.function(module, f16, shared_bytes)?,
            bf16: self.function(module, bf16, shared_bytes)?,
        })
    }
}

/// One entry point per element type.
pub(super) struct PerDType {
    f32: Function,
    f16: Function,
    bf16: Function,
}

impl PerDType {
    pub(super) fn get(&self, dtype: DType) -> &Function {
        match dtype {
            DType::F32 => &self.f32,
            DType::F16 => &self.f16,
            DType::BF16 => &self.bf16,
        }
    }
}

/// An entry point, and how much dynamic shared memory it can have.
pub(super) type Variant = (Function, usize);

/// Variants of a kernel, of each type of 16 bits.
pub(super) struct Half<const N: usize> {
    f16: [Variant; N],
    bf16: [Variant; N],
}

impl<const N: usize> Half<N> {
    /// Those of [`half_names`]; `None` where `load` finds that the device cannot have one of them.
    pub(super) fn load(
        [f16, bf16]: [[&'static str; N]; 2],
        load: impl Fn(&'static str) -> Result<Option<Variant>>,
    ) -> Result<Option<Self>> {
        let of = |names: [&'static str; N]| -> Result<Option<[Variant; N]>> {
            let variants = names.into_iter().map(&load).collect::<Result<Option<Vec<_>>>>()?;
            Ok(variants.map(|variants| std::array::from_fn(|i| variants[i])))
        };
        let (Some(f16), Some(bf16)) = (of(f16)?, of(bf16)?) else { return Ok(None) };
        Ok(Some(Self { f16, bf16 }))
    }

    /// Those of a type, where there are some.
    pub(super) fn of(&self, dtype: DType) -> Option<&[Variant; N]> {
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(&self.f16),
            DType::BF16 => Some(&self.bf16),
        }
    }
}

/// Names of entry points, of f16 and of bf16: what stands before the type, and what behind it in each of the variants.
macro_rules! half_names {
    ($kernel:literal: $($variant:literal),+) => {
        [
            [$(concat!($kernel, "_f16_", $variant)),+],
            [$(concat!($kernel, "_bf16_", $variant)),+],
        ]
    };
}
pub(super) use half_names;

/// The machine code for compute capability 8.x and 9.0 runs on any driver of the toolkit's major
/// version; the PTX for other devices needs a driver as new as the toolkit.
fn check_device(build: &BuildInfo, device: &Properties) -> Result<(), String> {
    let (major, minor) = device.compute_capability;
    if major < 8 {
        return Err(format!(
            "{} has compute capability {major}.{minor}, and the kernels need 8.0 or newer",
            device.name
        ));
    }
    let mut parts = build.toolkit.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let toolkit = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let has_machine_code = major == 8 || (major, minor) == (9, 0);
    let needed = if has_machine_code { (toolkit.0, 0) } else { toolkit };
    if device.driver < needed {
        return Err(format!(
            "the kernels were built with CUDA {}.{} (PTX {}), and the driver supports CUDA {}.{}: \
             update the driver, or build moefy with an nvcc that is no newer than the driver",
            toolkit.0, toolkit.1, build.ptx_isa, device.driver.0, device.driver.1
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(compute_capability: (u32, u32), driver: (u32, u32)) -> Result<(), String> {
        let device = Properties { compute_capability, driver, ..Properties::default() };
        check_device(&BuildInfo { toolkit: "13.1.80", ptx_isa: "9.1", source_digest: "" }, &device)
    }

    #[test]
    fn machine_code_needs_the_toolkits_major_version() {
        assert_eq!(check((8, 6), (13, 0)), Ok(()));
        assert_eq!(check((9, 0), (13, 0)), Ok(()));
        let problem = check((9, 0), (12, 9)).unwrap_err();
        assert!(
            problem.contains("CUDA 13.1 (PTX 9.1)") && problem.contains("CUDA 12.9"),
            "{problem}"
        );
    }

    #[test]
    fn ptx_needs_a_driver_as_new_as_the_toolkit() {
        assert!(check((10, 0), (13, 0)).is_err());
        assert_eq!(check((10, 0), (13, 1)), Ok(()));
    }

    #[test]
    fn devices_before_ampere_are_refused() {
        let problem = check((7, 5), (13, 1)).unwrap_err();
        assert!(problem.contains("7.5") && problem.contains("8.0"), "{problem}");
    }
}
