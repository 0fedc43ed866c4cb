//! `moefy tune`

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use moefy::convert::Progress;
use moefy::cuda::bench::{FfnBench, Limits};
use moefy::cuda::{Device, LayerShape, Path, TunedLayer, Tuning, build_info};
use moefy::ffn::MoeFfn;
use moefy::model::{Ffn, Folder};
use moefy::{DType, Error, Result};
use serde::Serialize;
use serde_json::json;

use crate::bench::shapes;
use crate::progress::Bar;
use crate::{Common, dtype, output, tuning};

/// Every number of tokens at which another kernel begins, and enough between them. From 33 to 511 there is
/// nothing to choose.
const TOKENS: [usize; 13] = [1, 2, 4, 8, 9, 16, 17, 32, 512, 1024, 2048, 4096, 8192];
/// So close that, as the estimates go, straight lines between them are within 2 % of the time.
const DENSITIES: [f64; 8] = [0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0];
const QUICK_TOKENS: [usize; 5] = [1, 8, 32, 512, 8192];
const QUICK_DENSITIES: [f64; 3] = [0.05, 0.2, 1.0];

#[derive(clap::Args)]
pub struct Tune {
    #[command(flatten)]
    layers: shapes::Layers,
    /// Instead, the layers of a converted model folder
    #[arg(long, value_name = "FOLDER", required_unless_present_any = ["named", "d_model"])]
    #[arg(conflicts_with_all = ["named", "d_model", "shared", "activation", "router"])]
    model: Option<PathBuf>,
    /// f32, f16, bf16 [default: bf16, of a model f16]
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = dtype)]
    dtype: Vec<DType>,
    /// Numbers of tokens; between them times are interpolated [default: 13 from 1 to 8192]
    #[arg(long, value_name = "T", value_delimiter = ',', value_parser = shapes::tokens)]
    tokens: Vec<usize>,
    /// Shares of the routed neurons that a token runs; between them times are interpolated [default: 8 from 0.03
    /// to 1]
    #[arg(long, value_name = "SHARE", value_delimiter = ',', value_parser = shapes::share)]
    density: Vec<f64>,
    /// Measure a fifth as much
    #[arg(long, conflicts_with_all = ["tokens", "density"])]
    quick: bool,
    /// Where the measurements go, beside those of other layers that are there already [default: the file of this
    /// device in the user's cache folder, which `eval`, `embed` and `inspect` read]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Number of the GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    device_index: usize,
}

/// What to measure.
enum Layer {
    Drawn(LayerShape),
    Stored(Box<MoeFfn>),
}

/// Where a plan chooses another path than without the measurements.
#[derive(Serialize)]
struct Change {
    layer: String,
    dtype: DType,
    tokens: usize,
    density: f64,
    fallback: &'static str,
    default_path: Path,
    default_us: Option<f64>,
    path: Path,
    us: Option<f64>,
}

impl Tune {
    pub fn run(self, common: &Common) -> Result<()> {
        // What is wrong with the arguments is said before a GPU is looked for.
        let layers = self.layers()?;
        if let Some(out) = &self.out
            && let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty())
            && !folder.is_dir()
        {
            return Err(Error::file(out, "expected a folder that exists: make it first"));
        }
        let old = self.out.as_deref().map(existing).transpose()?.flatten();
        let device = Arc::new(Device::open(self.device_index)?);
        let name = &device.properties().name;
        let (out, old) = match &self.out {
            Some(out) => (out.clone(), old),
            None => {
                let out = default_file(name)?;
                let old = existing(&out)?;
                (out, old)
            }
        };
        let mut tuning = extended(&out, old, name)?;
        let mut changes = Vec::new();
        let bar = Bar::new(common.quiet);
        let mut limits: Vec<(DType, Limits)> = Vec::new();
        for layer in layers {
            let dtype = layer.dtype();
            if limits.iter().all(|(of, _)| *of != dtype) {
                limits.push((dtype, Limits::measure(&device, dtype)?));
            }
            let (_, limits) = limits.iter().find(|(of, _)| *of == dtype).expect("measured");
            let mut bench = layer.bench(&device, *limits)?;
            let tuned = self.measure(&mut bench, &bar)?;
            tuning.insert(tuned.clone());
            // Now, so that nothing is lost should a later layer fail.
            tuning.save(&out)?;
            changes.extend(changes_of(&bench, &tuning, &tuned));
        }
        drop(bar);
        if common.json {
            output::json(&json!({ "out": output::path(&out), "device": name, "changes": changes }));
        } else {
            if !changes.is_empty() {
                output::line(&table(&changes));
            }
            output::written(common, &out);
        }
        Ok(())
    }

    fn layers(&self) -> Result<Vec<Layer>> {
        let or = |default| if self.dtype.is_empty() { vec![default] } else { self.dtype.clone() };
        let Some(model) = &self.model else {
            let layers = self.layers.shapes(&or(DType::BF16))?;
            return Ok(layers.into_iter().map(Layer::Drawn).collect());
        };
        let folder = Folder::open(model)?;
        let mut layers: Vec<MoeFfn> = Vec::new();
        for index in 0..folder.num_layers() {
            let Ffn::Moe(ffn) = folder.ffn(index)? else { continue };
            for dtype in or(DType::F16) {
                let ffn = ffn.to_dtype(dtype)?;
                if layers.iter().all(|known| LayerShape::of(known) != LayerShape::of(&ffn)) {
                    layers.push(ffn);
                }
            }
        }
        if layers.is_empty() {
            return Err(Error::file(model, "expected a converted model, got a dense one"));
        }
        Ok(layers.into_iter().map(|ffn| Layer::Stored(Box::new(ffn))).collect())
    }

    fn measure(&self, bench: &mut FfnBench, bar: &Bar) -> Result<TunedLayer> {
        let (tokens, densities) = match self.quick {
            true => (&QUICK_TOKENS[..], &QUICK_DENSITIES[..]),
            false => (&TOKENS[..], &DENSITIES[..]),
        };
        let tokens = if self.tokens.is_empty() { tokens } else { &self.tokens };
        let densities = if self.density.is_empty() { densities } else { &self.density };
        let what = label(bench.layer());
        bench.tune(tokens, densities, &|done, total| bar.step(&what, done, total))
    }
}

impl Layer {
    fn dtype(&self) -> DType {
        match self {
            Self::Drawn(shape) => shape.dtype,
            Self::Stored(ffn) => ffn.neurons().dtype(),
        }
    }

    fn bench(self, device: &Arc<Device>, limits: Limits) -> Result<FfnBench> {
        match self {
            Self::Drawn(shape) => FfnBench::new(device, shape, limits),
            Self::Stored(ffn) => FfnBench::of_layer(device, *ffn, limits),
        }
    }
}

fn label(layer: &LayerShape) -> String {
    let LayerShape { d_model, d_ff, glu, num_experts, dtype, .. } = *layer;
    format!("{} {dtype}", shapes::label(d_model, d_ff, glu, num_experts))
}

/// The file's measurements, if there is such a file.
fn existing(file: &FilePath) -> Result<Option<Tuning>> {
    file.exists().then(|| Tuning::load(file)).transpose()
}

/// In a folder that exists.
fn default_file(device: &str) -> Result<PathBuf> {
    let nowhere =
        || Error::argument("tune", "--out", "given where there is no cache folder", "neither");
    let file = tuning::default_file(device).ok_or_else(nowhere)?;
    let folder = file.parent().expect("a file in the cache folder");
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    Ok(file)
}

/// What is to be added to: `old`, unless that is of kernels that are no more.
fn extended(out: &FilePath, old: Option<Tuning>, device: &str) -> Result<Tuning> {
    let kernels = build_info()?.source_digest;
    match old {
        Some(old) if old.device != device => {
            let of = old.device;
            let problem = format!(
                "holds measurements of `{of}`, and this is `{device}`: choose another file"
            );
            Err(Error::file(out, problem))
        }
        Some(old) if old.kernels == kernels => Ok(old),
        _ => Ok(Tuning::new(device, kernels)),
    }
}

fn changes_of(bench: &FfnBench, tuning: &Tuning, tuned: &TunedLayer) -> Vec<Change> {
    let measured = |time: &moefy::cuda::TunedTime| Some((time.tokens, time.density?));
    let mut points: Vec<(usize, f64)> = tuned.times.iter().filter_map(measured).collect();
    points.sort_by(|a, b| a.partial_cmp(b).expect("no NaN"));
    points.dedup();
    let mut changes = Vec::new();
    for (tokens, density) in points {
        for (fallback, [default_path, path]) in bench.changes(tuning, tokens, density) {
            let us = |path| tuned.us(path, tokens, density);
            changes.push(Change {
                layer: label(bench.layer()),
                dtype: bench.layer().dtype,
                tokens,
                density,
                fallback: fallback.name(),
                default_path,
                default_us: us(default_path),
                path,
                us: us(path),
            });
        }
    }
    changes
}

fn table(changes: &[Change]) -> String {
    let header = ["layer", "T", "density", "fallback", "without tuning", "us", "tuned", "us"];
    output::table(
        header,
        changes.iter().map(|change| {
            let us = |us: Option<f64>| us.map_or("-".into(), |us| format!("{us:.1}"));
            [
                change.layer.clone(),
                change.tokens.to_string(),
                output::percent(change.density),
                change.fallback.to_string(),
                change.default_path.name().to_string(),
                us(change.default_us),
                change.path.name().to_string(),
                us(change.us),
            ]
        }),
    )
}
