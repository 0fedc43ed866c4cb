//! Whether the kernels give on this card what the reference gives: a few cases of every operation and
//! of every path through a layer; and whether a whole model does.

mod model;

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::LayerShape;
use super::synthetic::{Routing, imposed_scores, random};
use super::{
    Buffer, Device, FfnInputs, Format, MoeFfn, Path, PlanOptions, RawStream, RouteIndexOutputs,
    RouterSelectOutputs, SelectOutputs, View, Workspace, route_index, route_index_workspace_bytes,
    router_select, router_select_workspace_bytes, select,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{self, Activation, ExpertMask, Selection};
use crate::reference;
use crate::tensor::{Tensor, TensorRef};

pub use model::{ModelTexts, check_model};

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The error is at most the bar.
    Passed,
    /// It is not.
    Failed,
    /// The path says that it cannot do this case.
    Refused,
}

/// One case that was checked.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The operation, or the path.
    pub name: String,
    /// Sizes.
    pub shape: String,
    /// Of tokens and weights, where there are any.
    pub dtype: Option<DType>,
    /// ‖out − ref‖ / ‖ref‖; of masks and lists, the number of words that differ; of a model, what its name
    /// says.
    pub error: f64,
    /// The most that the error may be.
    pub bar: f64,
    /// What follows.
    pub verdict: Verdict,
}

/// The default stream: reading a buffer waits for it.
const STREAM: RawStream = RawStream(std::ptr::null_mut());
/// Of a layer: within what a path for few tokens takes at once, and beyond.
const TOKENS: [usize; 2] = [5, 40];

/// Checks one case after another; each goes to `found`.
///
/// # Errors
/// When the device fails or has too little memory, or cuBLASLt is missing.
pub fn check(device: &Arc<Device>, mut found: impl FnMut(Checked)) -> Result<()> {
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let capped = Selection { max_experts: Some(3), ..Selection::dynamic_k(0.2) };
    for (rule, selection) in [
        ("top-k", Selection::top_k(7)),
        ("dynamic-k", Selection::dynamic_k(0.6)),
        ("dynamic-k, capped", capped),
        ("cumulative share", Selection::cumulative_share(0.5)),
    ] {
        found(check_select(device, rng, rule, &selection)?);
    }
    for [num_tokens, num_experts] in [[8, 448], [1000, 129]] {
        let mask = Routing::Random { density: 0.1 }.draw(rng, 0, num_tokens, num_experts)?;
        found(check_route_index(device, &mask)?);
    }
    let plain = LayerShape {
        d_model: 384,
        d_ff: 1160,
        glu: false,
        activation: Activation::Gelu,
        num_experts: 48,
        shared: 8,
        rank: 0,
        dtype: DType::F32,
        router_hidden: 64,
    };
    let gated = LayerShape {
        d_model: 1000,
        d_ff: 1200,
        glu: true,
        activation: Activation::Silu,
        num_experts: 12,
        shared: 0,
        router_hidden: 0,
        ..plain
    };
    for layer_shape in [plain, gated] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let layer = Layer::new(device, LayerShape { dtype, ..layer_shape })?;
            for num_tokens in TOKENS {
                layer.check_router_select(rng, num_tokens, &mut found)?;
                layer.check_paths(rng, num_tokens, &mut found)?;
            }
        }
    }
    Ok(())
}

impl Checked {
    /// Words must be the same.
    fn exact(
        name: String,
        shape: String,
        dtype: Option<DType>,
        got: &[u32],
        expected: &[u32],
    ) -> Self {
        let differ = got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
        let error = (differ + got.len().abs_diff(expected.len())) as f64;
        let verdict = if error == 0.0 { Verdict::Passed } else { Verdict::Failed };
        Self { name, shape, dtype, error, bar: 0.0, verdict }
    }

    /// Values must be close.
    fn close(
        name: String,
        shape: String,
        dtype: DType,
        got: &[f32],
        expected: &[f64],
        bar: f64,
    ) -> Self {
        let square = |v: f64| v * v;
        let difference: f64 =
            got.iter().zip(expected).map(|(got, e)| square(f64::from(*got) - e)).sum();
        let size: f64 = expected.iter().copied().map(square).sum();
        let error = (difference / size.max(f64::MIN_POSITIVE)).sqrt();
        // A NaN is no pass.
        let verdict = if error <= bar { Verdict::Passed } else { Verdict::Failed };
        Self { name, shape, dtype: Some(dtype), error, bar, verdict }
    }
}

/// Memory for masks.
fn mask_buffer(device: &Device, num_tokens: usize, num_experts: usize) -> Result<(Buffer, View)> {
    let shape = [num_tokens, num_experts.div_ceil(32)];
    let buffer = Buffer::new(device, 4 * shape[0] * shape[1])?;
    let view = View::matrix(buffer.address(), Format::Word, shape);
    Ok((buffer, view))
}

fn check_select(
    device: &Device,
    rng: &mut ChaCha8Rng,
    rule: &str,
    selection: &Selection,
) -> Result<Checked> {
    let (num_tokens, num_experts) = (99, 129);
    let scores = random(rng, [num_tokens, num_experts], 1.0, DType::F32);
    let input = Buffer::from_slice(device, scores.as_bytes())?;
    let (mask, view) = mask_buffer(device, num_tokens, num_experts)?;
    let outputs = SelectOutputs { mask: view, counts: None, status: None };
    let input = View::matrix(input.address(), Format::F32, scores.shape());
    // SAFETY: the buffers have the sizes of their views and live until they were read.
    unsafe { select(device, STREAM, &outputs, input, None, selection, Workspace::NONE)? };
    let expected = reference::select(selection, &scores.to_f32(), num_experts).mask;
    let shape = format!("T {num_tokens}, E {num_experts}");
    let (got, name) = (mask.read()?, format!("select, {rule}"));
    Ok(Checked::exact(name, shape, None, &got, expected.words()))
}

fn check_route_index(device: &Device, mask: &ExpertMask) -> Result<Checked> {
    let (num_tokens, num_experts) = (mask.num_tokens(), mask.num_experts());
    let expected = reference::route_index(mask, num_tokens);
    let input = Buffer::from_slice(device, mask.words())?;
    let row_words = num_experts.div_ceil(32);
    let input_view = View::matrix(input.address(), Format::Word, [num_tokens, row_words]);
    let num_blocks = num_tokens.div_ceil(32);
    let words = |len: usize| Buffer::new(device, 4 * len);
    let [counts, union_ids] = [words(num_experts)?, words(num_experts)?];
    let offsets = words(num_experts + 1)?;
    let token_ids = words(expected.token_ids.len())?;
    let [expert_masks, word_offsets] =
        [words(num_experts * num_blocks)?, words(num_experts * num_blocks)?];
    let num_union = words(1)?;
    let view = |buffer: &Buffer| View::words(buffer.address(), buffer.bytes() / 4);
    let outputs = RouteIndexOutputs {
        counts: view(&counts),
        offsets: view(&offsets),
        token_ids: view(&token_ids),
        expert_masks: View::matrix(expert_masks.address(), Format::Word, [num_experts, num_blocks]),
        word_offsets: View::matrix(word_offsets.address(), Format::Word, [num_experts, num_blocks]),
        union_ids: view(&union_ids),
        num_union: view(&num_union),
        status: None,
    };
    let bytes = route_index_workspace_bytes(num_tokens, num_experts);
    let scratch = Buffer::new(device, bytes)?;
    let workspace = Workspace { address: scratch.address(), bytes };
    // SAFETY: as above.
    unsafe { route_index(device, STREAM, &outputs, input_view, num_experts, None, workspace)? };
    let mut union = union_ids.read::<u32>()?;
    union.truncate(expected.union_ids.len());
    let got = [
        counts.read()?,
        offsets.read()?,
        token_ids.read()?,
        expert_masks.read()?,
        word_offsets.read()?,
        union,
        num_union.read()?,
    ];
    let expected = [
        expected.counts,
        expected.offsets,
        expected.token_ids,
        expected.expert_masks,
        expected.word_offsets,
        expected.union_ids.clone(),
        vec![expected.union_ids.len() as u32],
    ];
    let shape = format!("T {num_tokens}, E {num_experts}");
    Ok(Checked::exact("route_index".into(), shape, None, &got.concat(), &expected.concat()))
}

/// A layer here and there.
struct Layer<'a> {
    device: &'a Device,
    layer_shape: LayerShape,
    host: ffn::MoeFfn,
    on_device: Arc<MoeFfn>,
}

impl<'a> Layer<'a> {
    fn new(device: &'a Arc<Device>, layer_shape: LayerShape) -> Result<Self> {
        let host = layer_shape.draw()?;
        let on_device = Arc::new(MoeFfn::new(device, &host)?);
        Ok(Self { device, layer_shape, host, on_device })
    }

    fn shape(&self, num_tokens: usize) -> String {
        let LayerShape { d_model, num_experts, glu, .. } = self.layer_shape;
        let width = self.host.expert_width();
        let glu = if glu { ", GLU" } else { "" };
        format!("T {num_tokens}, d {d_model}, E {num_experts}, s {width}{glu}")
    }

    fn check_router_select(
        &self,
        rng: &mut ChaCha8Rng,
        num_tokens: usize,
        found: &mut impl FnMut(Checked),
    ) -> Result<()> {
        let LayerShape { d_model, num_experts, dtype, router_hidden, .. } = self.layer_shape;
        let x = random(rng, [num_tokens, d_model], 1.0, dtype);
        let x_device = Buffer::from_slice(self.device, x.as_bytes())?;
        let router = self.on_device.router().view();
        let bytes = router_select_workspace_bytes(num_tokens, &router);
        let scratch = Buffer::new(self.device, bytes)?;
        let (mask, view) = mask_buffer(self.device, num_tokens, num_experts)?;
        let scores = Buffer::new(self.device, 4 * num_tokens * num_experts)?;
        let scores_view = View::matrix(scores.address(), Format::F32, [num_tokens, num_experts]);
        let outputs = RouterSelectOutputs {
            selected: SelectOutputs { mask: view, counts: None, status: None },
            scores: Some(scores_view),
        };
        let x_view = View::matrix(x_device.address(), Format::Float(dtype), x.shape());
        let workspace = Workspace { address: scratch.address(), bytes };
        let selection = self.host.selection();
        // SAFETY: as above.
        unsafe {
            router_select(
                self.device,
                STREAM,
                &outputs,
                x_view,
                None,
                &router,
                &selection,
                workspace,
            )?;
        }
        let scores: Vec<f32> = scores.read()?;
        let expected = reference::router_scores(self.host.router(), &x.to_f64(), d_model);
        let bar = f32_bar(d_model.max(router_hidden));
        let shape = self.shape(num_tokens);
        let name = "router_select, scores".into();
        found(Checked::close(name, shape.clone(), dtype, &scores, &expected, bar));
        let expected = reference::select(&selection, &scores, num_experts).mask;
        let name = "router_select, masks".into();
        found(Checked::exact(name, shape, Some(dtype), &mask.read()?, expected.words()));
        Ok(())
    }

    fn check_paths(
        &self,
        rng: &mut ChaCha8Rng,
        num_tokens: usize,
        found: &mut impl FnMut(Checked),
    ) -> Result<()> {
        let LayerShape { d_model, d_ff, num_experts, dtype, .. } = self.layer_shape;
        let mask = Routing::Random { density: 0.3 }.draw(rng, 0, num_tokens, num_experts)?;
        let x = random(rng, [num_tokens, d_model], 1.0, dtype);
        let sparse = reference::experts(&self.host, &x.to_f64(), &mask, None);
        let dense = reference::dense_ffn(self.host.neurons(), &x.to_f64());
        for path in Path::ALL {
            let (shape, bar) = (self.shape(num_tokens), bar(dtype, d_model.max(d_ff)));
            let (expected, bar) = match path {
                Path::DenseExact => (&dense, bar),
                // It rounds once more: the pre-activations.
                Path::DenseMasked => (&sparse, 2.0 * bar),
                _ => (&sparse, bar),
            };
            let name = format!("layer, {}", path.name());
            found(match self.run(path, &x, &mask) {
                Ok(y) => Checked::close(name, shape, dtype, &y, expected, bar),
                Err(Error::Argument { .. }) => {
                    let (dtype, verdict) = (Some(dtype), Verdict::Refused);
                    Checked { name, shape, dtype, error: f64::NAN, bar, verdict }
                }
                Err(error) => return Err(error),
            });
        }
        Ok(())
    }

    /// y of the layer on a path.
    fn run(&self, path: Path, x: &Tensor, mask: &ExpertMask) -> Result<Vec<f32>> {
        let (float, shape) = (Format::Float(x.dtype()), x.shape());
        let plan = self
            .on_device
            .plan(shape[0], PlanOptions { path: Some(path), ..PlanOptions::default() })?;
        let x = Buffer::from_slice(self.device, x.as_bytes())?;
        let scores = Buffer::from_slice(self.device, &imposed_scores(mask))?;
        // NaN, so that an element that is not written shows.
        let y = Buffer::from_slice(self.device, &vec![0xffu8; x.bytes()])?;
        let workspace = Buffer::new(self.device, plan.workspace_bytes())?;
        let scores_shape = [shape[0], mask.num_experts()];
        let inputs = FfnInputs {
            scores: Some(View::matrix(scores.address(), Format::F32, scores_shape)),
            ..FfnInputs::new(View::matrix(x.address(), float, shape))
        };
        let y_view = View::matrix(y.address(), float, shape);
        let workspace = Workspace { address: workspace.address(), bytes: workspace.bytes() };
        // SAFETY: as above.
        unsafe { plan.run(STREAM, y_view, &inputs, workspace)? };
        let y = y.read::<u8>()?;
        Ok(TensorRef::from_bytes(self.layer_shape.dtype, &y, shape)?
            .to_owned()
            .to_f32()
            .into_owned())
    }
}

/// What sums of f32 over this many terms may be off.
fn f32_bar(terms: usize) -> f64 {
    1e-6 * (terms.max(64) as f64 / 64.0).sqrt()
}

fn bar(dtype: DType, terms: usize) -> f64 {
    match dtype {
        DType::F32 => f32_bar(terms),
        DType::F16 => 1e-3,
        DType::BF16 => 6e-3,
    }
}
