//! Whole encoders on the GPU, against the reference.

use moefy::cuda::Gpu as Backend;
use moefy::cuda::interop::cudarc::driver::sys;
use moefy::ffn::{Activation, Selection};
use moefy::model::{self, Batch, Encoder, Ffn, FfnRun, Folder};
use moefy::reference::Reference;
use moefy::{DType, Result};
use serde_json::json;

use crate::common::{HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, TinyBert, VOCAB};
use crate::harness::{Gpu, is_small, relative_error};
use crate::support::{Random, Shape, widened};

pub fn tests() -> crate::Tests {
    vec![
        ("transformer::encoder", encoder),
        ("transformer::moefied", moefied),
        ("transformer::replays_with_other_tokens", replays_with_other_tokens),
    ]
}

/// One head, as wide as there are kernels for.
fn folder(seed: u64, dtype: DType) -> Folder {
    let mut model = TinyBert::new(seed, dtype);
    model.config["num_attention_heads"] = json!(HIDDEN / 32);
    let dir = tempfile::tempdir().expect("a folder");
    model.write(dir.path());
    // The files stay mapped when their folder is gone.
    Folder::open(dir.path()).expect("a model")
}

fn batch(random: &mut Random, lengths: &[usize]) -> Batch {
    let mut sequence =
        |&length: &usize| (0..length).map(|_| random.below(VOCAB.len()) as u32).collect::<Vec<_>>();
    Batch::pack(lengths.iter().map(&mut sequence)).expect("sequences")
}

/// Hidden states and embeddings.
fn run<B: model::Backend>(
    encoder: &Encoder<B>,
    batch: &Batch,
    run: FfnRun,
) -> Result<[Vec<f32>; 2]> {
    let mut workspace = encoder.workspace(batch.num_tokens())?;
    let mut x = encoder.activations(batch.num_tokens())?;
    let batch = encoder.batch(batch)?;
    encoder.forward(run, &mut x, &batch, &mut workspace, None)?;
    Ok([encoder.to_host(&x, &batch)?, encoder.pool(&x, &batch)?])
}

/// Each layer rounds a dozen times, to the type and in sums of f32.
fn bar(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
    }
}

fn encoder(gpu: &Gpu) {
    let mut random = Random::new(1);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let folder = folder(3, dtype);
        let backend = Backend::new(&gpu.device, dtype).expect("a backend");
        let on_gpu = Encoder::load(backend, &folder).expect("memory");
        let reference = Encoder::load(Reference, &folder).expect("a model");
        for lengths in [&[1][..], &[2, POSITIONS, 1, 19], &[7; 14]] {
            let batch = batch(&mut random, lengths);
            for ffn in [FfnRun::Stored, FfnRun::Zero] {
                let got = run(&on_gpu, &batch, ffn).expect("a pass");
                let expected = run(&reference, &batch, ffn).expect("a pass");
                for (got, expected) in got.iter().zip(expected) {
                    let error = relative_error(got, &widened(&expected));
                    assert!(error <= bar(dtype), "{dtype} {lengths:?} {ffn:?}: {error:.3e}");
                }
            }
        }
    }
}

/// All layers but the first.
fn moefy<B: model::Backend>(encoder: &mut Encoder<B>, seed: u64) {
    let mut random = Random::new(seed);
    for layer in 1..LAYERS {
        let shape = Shape {
            d_model: HIDDEN,
            num_experts: 5,
            expert_width: 8,
            shared: INTERMEDIATE - 5 * 8,
            activation: Activation::Gelu,
            glu: false,
            biases: true,
            dtype: DType::F32,
        };
        let ffn = Ffn::Moe(random.moe(&shape, 1, Selection::dynamic_k(0.5)));
        encoder.replace_ffn(layer, &ffn).expect("it fits");
    }
}

/// A whole pass as one graph, with other tokens before each replay.
fn replays_with_other_tokens(gpu: &Gpu) {
    let mut random = Random::new(5);
    let folder = folder(6, DType::F16);
    let stream = gpu.stream.clone();
    let backend = Backend::on_stream(&gpu.device, DType::F16, stream).expect("a backend");
    let mut encoder = Encoder::load(backend, &folder).expect("memory");
    moefy(&mut encoder, 7);
    let lengths = [9, POSITIONS, 1];
    let first = batch(&mut random, &lengths);
    let mut workspace = encoder.workspace(first.num_tokens()).expect("memory");
    let mut x = encoder.activations(first.num_tokens()).expect("memory");
    let mut on_device = encoder.batch(&first).expect("a batch");
    // Algorithms are chosen here.
    encoder.forward(FfnRun::Stored, &mut x, &on_device, &mut workspace, None).expect("a pass");
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    gpu.stream.synchronize().expect("no failure");
    gpu.stream.begin_capture(mode).expect("capture");
    encoder.forward(FfnRun::Stored, &mut x, &on_device, &mut workspace, None).expect("a pass");
    let graph = gpu.stream.end_capture(sys::CUgraphInstantiate_flags(0)).expect("a graph");
    let graph = graph.expect("kernels");
    for _ in 0..if is_small() { 3 } else { 1000 } {
        let mut lengths = lengths;
        lengths.rotate_left(random.below(3));
        let batch = batch(&mut random, &lengths);
        encoder.refill(&mut on_device, &batch).expect("the same sizes");
        graph.launch().expect("a launch");
        let replayed = encoder.to_host(&x, &on_device).expect("a copy");
        encoder.forward(FfnRun::Stored, &mut x, &on_device, &mut workspace, None).expect("a pass");
        let eager = encoder.to_host(&x, &on_device).expect("a copy");
        assert!(eager == replayed, "a replay differs");
    }
    let more = batch(&mut random, &[9, POSITIONS, 2]);
    let refused = encoder.refill(&mut on_device, &more).expect_err("another size").to_string();
    assert!(refused.contains("50 tokens") && refused.contains("51 tokens"), "{refused}");
}

fn moefied(gpu: &Gpu) {
    let mut random = Random::new(2);
    let folder = folder(4, DType::F32);
    let backend = Backend::new(&gpu.device, DType::F32).expect("a backend");
    let mut on_gpu = Encoder::load(backend, &folder).expect("memory");
    let mut reference = Encoder::load(Reference, &folder).expect("a model");
    moefy(&mut on_gpu, 8);
    moefy(&mut reference, 8);
    let batch = batch(&mut random, &[3, 17, 1, 30]);
    let selection = FfnRun::Selection(Selection::top_k(2));
    for ffn in [FfnRun::Stored, FfnRun::Raised(2.0), selection, FfnRun::Dense] {
        let got = run(&on_gpu, &batch, ffn).expect("a pass");
        let expected = run(&reference, &batch, ffn).expect("a pass");
        for (got, expected) in got.iter().zip(expected) {
            let error = relative_error(got, &widened(&expected));
            assert!(error <= bar(DType::F32), "{ffn:?}: {error:.3e}");
        }
    }
}
