//! What the paths of a plan take on one device, as measured: plain data, which needs no GPU.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path as FilePath;

use serde::{Deserialize, Serialize};

use super::Path;
use super::places::MAX_CHUNK;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{self, Activation, Compensation, Router};

/// The format that this version reads and writes.
const VERSION: u32 = 1;

/// Times of forced paths on one device. [`Device::set_tuning`](super::Device::set_tuning) makes plans choose
/// by them; `moefy tune` measures them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    version: u32,
    /// Name of the device.
    pub device: String,
    /// [`BuildInfo::source_digest`](super::BuildInfo::source_digest) of the kernels: others take other times.
    pub kernels: String,
    /// One for each shape of a layer.
    pub layers: Vec<TunedLayer>,
}

/// Times of the layers of one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunedLayer {
    /// What they have in common.
    pub shape: LayerShape,
    /// In any order.
    pub times: Vec<TunedTime>,
}

/// What decides about the time of a layer, but for tokens and routing. Selection and gate are not among it:
/// they cost little, and about the same on every sparse path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerShape {
    /// Width of a token.
    pub d_model: usize,
    /// Neurons, shared ones included.
    pub d_ff: usize,
    /// Whether it is gated.
    pub glu: bool,
    /// φ: cuBLASLt fuses some and not others.
    pub activation: Activation,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Of a linear compensation; 0 without one.
    pub rank: usize,
    /// Of weights and activations.
    pub dtype: DType,
    /// Hidden units of the router; 0 where it has one layer.
    pub router_hidden: usize,
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunedTime {
    /// What ran.
    pub path: Path,
    /// T.
    pub tokens: usize,
    /// Executed neurons / d_ff; `None` where the path takes the same at any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Microseconds of the whole layer.
    pub us: f64,
}

impl LayerShape {
    /// That of a layer.
    pub fn of(ffn: &ffn::MoeFfn) -> Self {
        let neurons = ffn.neurons();
        Self {
            d_model: ffn.d_model(),
            d_ff: ffn.d_ff(),
            glu: neurons.is_glu(),
            activation: neurons.activation(),
            num_experts: ffn.num_experts(),
            shared: ffn.shared(),
            rank: match ffn.compensation() {
                Some(Compensation::Linear { v, .. }) => v.shape()[0],
                _ => 0,
            },
            dtype: neurons.dtype(),
            router_hidden: match ffn.router() {
                Router::Mlp { w1, .. } => w1.shape()[0],
                _ => 0,
            },
        }
    }
}

impl Tuning {
    /// Without layers, for the device of this name and kernels with this digest.
    pub fn new(device: impl Into<String>, kernels: impl Into<String>) -> Self {
        let (device, kernels) = (device.into(), kernels.into());
        Self { version: VERSION, device, kernels, layers: Vec::new() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is no tuning, is of another version, or has a value that no measurement gives.
    pub fn load(file: &FilePath) -> Result<Self> {
        let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
        let wrong = |problem: String| {
            Error::file(file, format!("{problem}; remove it and run `moefy tune` again"))
        };
        let tuning = Self::parse(&text).map_err(wrong)?;
        tuning.check().map_err(wrong)?;
        Ok(tuning)
    }

    fn parse(text: &str) -> Result<Self, String> {
        /// Of every version.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let wrong =
            |error: serde_json::Error| format!("expected what `moefy tune` writes: {error}");
        let Head { version } = serde_json::from_str(text).map_err(wrong)?;
        if version != VERSION {
            return Err(format!("expected version {VERSION}, got {version}"));
        }
        serde_json::from_str(text).map_err(wrong)
    }

    /// Writes a file, whole or not at all.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn save(&self, file: &FilePath) -> Result<()> {
        let failed = || Error::io("write", file);
        let mut text = serde_json::to_string_pretty(self).expect("numbers, strings and lists");
        text.push('\n');
        let folder = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => FilePath::new("."),
        };
        let mut staged = tempfile::Builder::new();
        #[cfg(unix)]
        staged.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut staged = staged.tempfile_in(folder).map_err(failed())?;
        staged.write_all(text.as_bytes()).map_err(failed())?;
        staged.as_file().sync_all().map_err(failed())?;
        staged.persist(file).map_err(|refused| failed()(refused.error))?;
        Ok(())
    }

    /// What is wrong with its values, if anything.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut shapes = HashSet::new();
        for TunedLayer { shape, times } in &self.layers {
            if !shapes.insert(shape) {
                return Err(format!("expected every shape once, got {shape:?} twice"));
            }
            let mut seen = HashSet::new();
            for &TunedTime { path, tokens, density, us } in times {
                let at = format!("{} at T {tokens}", path.name());
                if tokens == 0 {
                    return Err(format!("{at}: expected at least 1 token"));
                }
                if !(us.is_finite() && us > 0.0) {
                    return Err(format!("{at}: expected a positive time, got {us}"));
                }
                if let Some(density) = density.filter(|density| !(0.0..=1.0).contains(density)) {
                    return Err(format!("{at}: expected a density from 0 to 1, got {density}"));
                }
                if !seen.insert((path, tokens, density.map(f64::to_bits))) {
                    return Err(format!(
                        "{at}: expected every density once, got {density:?} twice"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Adds what was measured, instead of what there was for the shape.
    pub fn insert(&mut self, layer: TunedLayer) {
        self.layers.retain(|old| old.shape != layer.shape);
        self.layers.push(layer);
    }

    /// The times of a shape.
    pub fn layer(&self, shape: &LayerShape) -> Option<&TunedLayer> {
        self.layers.iter().find(|layer| layer.shape == *shape)
    }
}

impl TunedLayer {
    /// Microseconds of a path, where measurements surround that number of tokens and that density: linear
    /// between densities, and between numbers of tokens a power of them. Beyond the most tokens a path takes
    /// as much again for each turn, if it was measured with a full one; else nothing is claimed.
    pub fn us(&self, path: Path, tokens: usize, density: f64) -> Option<f64> {
        let mut measured: Vec<usize> =
            self.times.iter().filter(|time| time.path == path).map(|time| time.tokens).collect();
        measured.sort_unstable();
        measured.dedup();
        let most = *measured.last()?;
        if tokens > most && most >= MAX_CHUNK {
            let turns = tokens as f64 / most as f64;
            return Some(turns * self.at(path, most, density)?);
        }
        let point =
            |tokens: usize| Some(((tokens as f64).ln(), self.at(path, tokens, density)?.ln()));
        let points: Vec<(f64, f64)> = measured.into_iter().filter_map(point).collect();
        interpolate(&points, (tokens as f64).ln()).map(f64::exp)
    }

    /// The same for a number of tokens that was measured.
    fn at(&self, path: Path, tokens: usize, density: f64) -> Option<f64> {
        let times = self.times.iter().filter(|time| time.path == path && time.tokens == tokens);
        let mut points = Vec::new();
        for time in times {
            match time.density {
                None => return Some(time.us),
                Some(density) => points.push((density, time.us)),
            }
        }
        points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        interpolate(&points, density)
    }
}

/// The value at `x` of straight lines from point to point, which ascend. `None` outside of them.
fn interpolate(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let above = points.iter().position(|point| point.0 >= x)?;
    let (right, value) = points[above];
    if right == x {
        return Some(value);
    }
    let (left, from) = points[above.checked_sub(1)?];
    Some(from + (value - from) * (x - left) / (right - left))
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use tempfile::TempDir;

    use super::*;

    const SHAPE: LayerShape = LayerShape {
        d_model: 768,
        d_ff: 3072,
        glu: false,
        activation: Activation::Gelu,
        num_experts: 96,
        shared: 0,
        rank: 0,
        dtype: DType::F16,
        router_hidden: 128,
    };

    fn time(path: Path, tokens: usize, density: impl Into<Option<f64>>, us: f64) -> TunedTime {
        TunedTime { path, tokens, density: density.into(), us }
    }

    fn tuning(times: Vec<TunedTime>) -> Tuning {
        let mut tuning = Tuning::new("a device", "a digest");
        tuning.insert(TunedLayer { shape: SHAPE, times });
        tuning
    }

    #[test]
    fn times_are_those_that_were_measured_and_lie_between_them() {
        let few = |tokens, density, us| time(Path::Few, tokens, density, us);
        let tuning = tuning(vec![
            few(8, 0.5, 40.0),
            few(2, 0.1, 10.0),
            few(2, 0.5, 20.0),
            few(8, 0.1, 20.0),
            time(Path::DenseExact, 2, None, 30.0),
            time(Path::DenseExact, 8, None, 30.0),
        ]);
        let layer = tuning.layer(&SHAPE).unwrap();
        let us = |path, tokens, density| layer.us(path, tokens, density);
        let few = |tokens, density| us(Path::Few, tokens, density);
        for (tokens, density, expected) in
            [(2, 0.1, 10.0), (8, 0.5, 40.0), (2, 0.2, 12.5), (4, 0.1, 200f64.sqrt())]
        {
            assert_relative_eq!(few(tokens, density).unwrap(), expected, max_relative = 1e-12);
        }
        for density in [0.0, 0.3, 1.0] {
            assert_relative_eq!(
                us(Path::DenseExact, 5, density).unwrap(),
                30.0,
                max_relative = 1e-12
            );
        }
        let outside = [(1, 0.1), (9, 0.1), (4, 0.09), (4, 0.51), (4, f64::NAN), (0, 0.1)];
        assert!(outside.iter().all(|&(tokens, density)| few(tokens, density).is_none()));
        assert_eq!(us(Path::DenseExact, 9, 0.1), None);
        assert_eq!(us(Path::ExpertMajor, 2, 0.1), None);
        assert!(tuning.layer(&LayerShape { rank: 8, ..SHAPE }).is_none());
    }

    #[test]
    fn turns_take_as_much_again() {
        let many = |tokens, density, us| time(Path::ExpertMajor, tokens, density, us);
        let times = vec![many(1024, 0.1, 50.0), many(MAX_CHUNK, 0.1, 300.0)];
        let layer = TunedLayer { shape: SHAPE, times };
        let us = |tokens, density| layer.us(Path::ExpertMajor, tokens, density);
        assert_relative_eq!(us(MAX_CHUNK, 0.1).unwrap(), 300.0, max_relative = 1e-12);
        assert_eq!(us(3 * MAX_CHUNK, 0.1), Some(900.0));
        assert_eq!(us(3 * MAX_CHUNK, 0.2), None);
    }

    #[test]
    fn a_density_may_be_measured_for_some_numbers_of_tokens_only() {
        let few = |tokens, density, us| time(Path::Few, tokens, density, us);
        let times = vec![few(1, 0.1, 9.0), few(2, 0.2, 1.0), few(4, 0.1, 9.0)];
        let layer = TunedLayer { shape: SHAPE, times };
        assert_relative_eq!(layer.us(Path::Few, 2, 0.1).unwrap(), 9.0, max_relative = 1e-12);
    }

    #[test]
    fn a_file_gives_back_what_was_written() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("tuning.json");
        let mut tuning = tuning(vec![
            time(Path::FewFused, 3, 0.1, 1.0 / 3.0),
            time(Path::DenseMasked, 3, None, 7e-9),
        ]);
        tuning.save(&file).unwrap();
        assert_eq!(Tuning::load(&file).unwrap(), tuning);
        tuning.insert(TunedLayer { shape: SHAPE, times: Vec::new() });
        tuning.save(&file).unwrap();
        assert_eq!(Tuning::load(&file).unwrap(), tuning);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
        let nowhere = folder.path().join("missing/tuning.json");
        let error = tuning.save(&nowhere).unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("missing"), "{error}");
    }

    #[test]
    fn paths_have_the_names_of_the_command_line() {
        for path in Path::ALL {
            assert_eq!(serde_json::to_value(path).unwrap(), path.name());
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("tuning.json");
        let refuses = |text: &str, words: &[&str]| {
            fs::write(&file, text).unwrap();
            let error = Tuning::load(&file).unwrap_err().to_string();
            assert_eq!(error.lines().count(), 1, "{error}");
            for word in ["tuning.json", "moefy tune"].iter().chain(words) {
                assert!(error.contains(word), "no `{word}` in: {error}");
            }
        };
        let good = tuning(vec![time(Path::Few, 1, 0.25, 64.0)]);
        let text = serde_json::to_string(&good).unwrap();
        let with = |old: &str, new: &str| {
            assert!(text.contains(old), "{text}");
            text.replace(old, new)
        };
        refuses("no JSON", &["expected", "line 1"]);
        refuses("{}", &["version"]);
        refuses(&text[..text.len() - 3], &["EOF"]);
        refuses(&with("\"version\":1", "\"version\":2"), &["version 1", "got 2"]);
        refuses(&with("\"few\"", "\"fewer\""), &["fewer", "few-fused", "dense-exact"]);
        refuses(&with("64.0", "-64.0"), &["few at T 1", "positive", "-64"]);
        refuses(&with("64.0", "0"), &["positive", "got 0"]);
        refuses(&with("64.0", "NaN"), &["line 1"]);
        refuses(&with("64.0", "1e999"), &["line 1"]);
        refuses(&with("0.25", "1.25"), &["density", "1.25"]);
        refuses(&with("\"tokens\":1", "\"tokens\":0"), &["at least 1 token"]);
        refuses(&with("\"us\"", "\"ms\""), &["ms"]);
        let mut twice = good.clone();
        twice.layers[0].times.push(time(Path::Few, 1, 0.25, 65.0));
        refuses(&serde_json::to_string(&twice).unwrap(), &["0.25", "twice"]);
        twice.layers.push(good.layers[0].clone());
        twice.layers.remove(0);
        twice.layers.push(good.layers[0].clone());
        refuses(&serde_json::to_string(&twice).unwrap(), &["768", "twice"]);
        fs::remove_file(&file).unwrap();
        let error = Tuning::load(&file).unwrap_err().to_string();
        assert!(error.contains("cannot read"), "{error}");
        let not_a_number = tuning(vec![time(Path::Few, 1, 0.25, f64::NAN)]);
        assert!(not_a_number.check().unwrap_err().contains("NaN"));
    }
}
