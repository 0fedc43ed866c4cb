//! The operations on a GPU, by the device's own clock: router_select, route_index, and a whole layer on
//! every path. `moefy bench ffn` compares with the dense layer; this watches for changes.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion};
use moefy::cuda::bench::{FfnBench, Limits, Routing, RunSpec, TimedGraph};
use moefy::cuda::interop::cudarc::driver::CudaStream;
use moefy::cuda::{
    Buffer, Device, DeviceRouter, Fallback, Format, LayerShape, Path, RouteIndexOutputs,
    RouterSelectOutputs, SelectOutputs, View, Workspace, route_index, route_index_workspace_bytes,
    router_select, router_select_workspace_bytes,
};
use moefy::ffn::{Activation, ExpertMask, MlpKind, Router, Selection};
use moefy::{DType, Error, Result, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BERT: LayerShape = LayerShape {
    d_model: 768,
    d_ff: 3072,
    glu: false,
    activation: Activation::GeluTanh,
    num_experts: 96,
    shared: 0,
    dtype: DType::BF16,
    router_hidden: 128,
    rank: 0,
};
const LLAMA: LayerShape = LayerShape {
    d_model: 4096,
    d_ff: 14336,
    glu: true,
    activation: Activation::Silu,
    num_experts: 112,
    ..BERT
};

fn main() -> Result<()> {
    let device = match Device::open(0) {
        Ok(device) => Arc::new(device),
        Err(error) => {
            println!("SKIPPED no GPU: {error}");
            return Ok(());
        }
    };
    let stream = device.cudarc_context().new_stream().expect("a stream");
    let mut criterion = Criterion::default().configure_from_args();
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    bench_router_select(&mut criterion, &device, &stream, rng)?;
    bench_route_index(&mut criterion, &device, &stream, rng)?;
    bench_layers(&mut criterion, &device)?;
    criterion.final_summary();
    Ok(())
}

/// Shows the time of a part of `graph`.
fn measure(criterion: &mut Criterion, op: &str, case: String, graph: &TimedGraph) {
    criterion.bench_with_input(BenchmarkId::new(op, case), graph, |bencher, graph| {
        bencher.iter_custom(|parts| graph.time(parts).expect("the device works"));
    });
}

fn matrix(rng: &mut ChaCha8Rng, shape: [usize; 2]) -> Result<Tensor> {
    let values = (0..shape[0] * shape[1]).map(|_| rng.random_range(-0.1f32..0.1)).collect();
    Ok(Tensor::matrix(values, shape)?.to_dtype(DType::BF16))
}

fn words(device: &Device, shape: [usize; 2]) -> Result<(Buffer, View)> {
    let buffer = Buffer::new(device, 4 * shape[0] * shape[1])?;
    let view = View::matrix(buffer.address(), Format::Word, shape);
    Ok((buffer, view))
}

fn bench_router_select(
    criterion: &mut Criterion,
    device: &Device,
    stream: &Arc<CudaStream>,
    rng: &mut ChaCha8Rng,
) -> Result<()> {
    for (num_tokens, d_model, num_experts) in
        [(1, 768, 96), (512, 768, 96), (1, 4096, 112), (1, 4096, 448), (2048, 4096, 112)]
    {
        let (w1, w2) = (matrix(rng, [128, d_model])?, matrix(rng, [num_experts, 128])?);
        let router = Router::Mlp { kind: MlpKind::D2dMoe, w1, w2 };
        let router = DeviceRouter::new(device, &router, DType::BF16)?;
        let x = Buffer::from_slice(device, matrix(rng, [num_tokens, d_model])?.as_bytes())?;
        let x_view = View::matrix(x.address(), Format::Float(DType::BF16), [num_tokens, d_model]);
        let (_mask, mask) = words(device, [num_tokens, num_experts.div_ceil(32)])?;
        let bytes = router_select_workspace_bytes(num_tokens, &router.view());
        let scratch = Buffer::new(device, bytes)?;
        let workspace = Workspace { address: scratch.address(), bytes };
        let selected = SelectOutputs { mask, counts: None, status: None };
        let outputs = RouterSelectOutputs { selected, scores: None };
        let selection = Selection::dynamic_k(0.5);
        // SAFETY: the buffers have the sizes of their views and outlive the graph.
        let graph = TimedGraph::capture(stream, 100, |stream, _| unsafe {
            let router = router.view();
            router_select(device, stream, &outputs, x_view, None, &router, &selection, workspace)
        })?;
        let case = format!("T{num_tokens} d{d_model} E{num_experts}");
        measure(criterion, "router_select", case, &graph);
    }
    Ok(())
}

fn bench_route_index(
    criterion: &mut Criterion,
    device: &Device,
    stream: &Arc<CudaStream>,
    rng: &mut ChaCha8Rng,
) -> Result<()> {
    for (num_tokens, num_experts) in [(8, 112), (512, 96), (8192, 96), (8192, 448)] {
        let mut mask = ExpertMask::none(num_tokens, num_experts);
        for token in 0..num_tokens {
            for expert in (0..num_experts).filter(|_| rng.random_bool(0.1)) {
                mask.insert(token, expert);
            }
        }
        let input = Buffer::from_slice(device, mask.words())?;
        let row_words = num_experts.div_ceil(32);
        let input_view = View::matrix(input.address(), Format::Word, [num_tokens, row_words]);
        let (_counts, counts) = words(device, [1, num_experts])?;
        let (_offsets, offsets) = words(device, [1, num_experts + 1])?;
        let (_token_ids, token_ids) = words(device, [1, mask.num_pairs()])?;
        let rows = [num_experts, num_tokens.div_ceil(32)];
        let (_expert_masks, expert_masks) = words(device, rows)?;
        let (_word_offsets, word_offsets) = words(device, rows)?;
        let (_union_ids, union_ids) = words(device, [1, num_experts])?;
        let (_num_union, num_union) = words(device, [1, 1])?;
        let outputs = RouteIndexOutputs {
            counts,
            offsets,
            token_ids,
            expert_masks,
            word_offsets,
            union_ids,
            num_union,
            status: None,
        };
        let bytes = route_index_workspace_bytes(num_tokens, num_experts);
        let scratch = Buffer::new(device, bytes)?;
        let workspace = Workspace { address: scratch.address(), bytes };
        // SAFETY: the buffers have the sizes of their views and outlive the graph.
        let graph = TimedGraph::capture(stream, 100, |stream, _| unsafe {
            route_index(device, stream, &outputs, input_view, num_experts, None, workspace)
        })?;
        measure(criterion, "route_index", format!("T{num_tokens} E{num_experts}"), &graph);
    }
    Ok(())
}

fn bench_layers(criterion: &mut Criterion, device: &Arc<Device>) -> Result<()> {
    let limits = Limits::measure(device, DType::BF16)?;
    for (name, spec) in [("d768 E96", BERT), ("d4096 E112", LLAMA)] {
        let mut bench = FfnBench::new(device, spec, limits)?;
        for tokens in [1, 8, 512] {
            for path in Path::ALL {
                let run = RunSpec {
                    tokens,
                    routing: Routing::Random { density: 0.1 },
                    path: Some(path),
                    fallback: Fallback::Exact,
                    calibrated_density: None,
                };
                let layers = match bench.capture(&run) {
                    // The path cannot do this case.
                    Err(Error::Argument { .. }) => continue,
                    layers => layers?,
                };
                let id = BenchmarkId::new(path.name(), format!("T{tokens} {name}"));
                criterion.bench_with_input(id, &layers, |bencher, layers| {
                    bencher.iter_custom(|count| layers.time(count).expect("the device works"));
                });
            }
        }
    }
    Ok(())
}
