//! Whole encoders on the GPU, against the reference.

use std::sync::atomic::AtomicBool;

use moefy::cuda::interop::cudarc::driver::sys;
use moefy::cuda::{EncoderGraphs, Fallback, Gpu as Backend, GpuOptions, RoutingCounts};
use moefy::ffn::{Activation, ExpertMask, Selection};
use moefy::model::{
    self, Batch, Conversion, ConvertedLayer, Encoder, EncoderShape, Ffn, FfnRun, Folder, Output,
    write_moefied,
};
use moefy::reference::Reference;
use moefy::{DType, Result};
use serde_json::json;

use crate::common::{HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, TinyBert, VOCAB, conversion};
use crate::harness::{Gpu, is_small, relative_error, thin};
use crate::support::{Random, Shape, widened};

pub fn tests() -> crate::Tests {
    vec![
        ("transformer::encoder", encoder),
        ("transformer::moefied", moefied),
        ("transformer::partly_converted_folder", partly_converted_folder),
        ("transformer::replays_with_other_tokens", replays_with_other_tokens),
        ("transformer::buckets", buckets),
        ("transformer::buckets_memory_stays_flat", buckets_memory_stays_flat),
        ("transformer::statistics", statistics),
        ("transformer::bad_input", bad_input),
    ]
}

/// One function at every number of tokens, so that the reference is the same for all.
const MASKED: GpuOptions = GpuOptions { fallback: Fallback::Masked, statistics: false };

fn backend(gpu: &Gpu, dtype: DType, options: GpuOptions) -> Backend {
    Backend::new(&gpu.device, dtype, options).expect("a backend")
}

/// One head, as wide as there are kernels for.
fn tiny(seed: u64, dtype: DType) -> TinyBert {
    let mut model = TinyBert::new(seed, dtype);
    model.config["num_attention_heads"] = json!(HIDDEN / 32);
    model
}

fn folder(seed: u64, dtype: DType) -> Folder {
    let model = tiny(seed, dtype);
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

/// Choosing algorithms takes long where tools slow the device down; the operations have tests of their own for
/// every type.
fn dtypes() -> &'static [DType] {
    if is_small() { &[DType::F32] } else { &[DType::F32, DType::F16, DType::BF16] }
}

/// Each layer rounds a dozen times, to the type and in sums of f32.
fn bar(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
    }
}

/// Two encoders give the same, but for the roundings of the type.
fn assert_close<A: model::Backend, B: model::Backend>(
    on_gpu: &Encoder<A>,
    reference: &Encoder<B>,
    batch: &Batch,
    ffn: FfnRun,
    dtype: DType,
) {
    let got = run(on_gpu, batch, ffn).expect("a pass");
    let expected = run(reference, batch, ffn).expect("a pass");
    for (got, expected) in got.iter().zip(expected) {
        let error = relative_error(got, &widened(&expected));
        let offsets = batch.sequence_offsets();
        assert!(error <= bar(dtype), "{dtype} {offsets:?} {ffn:?}: {error:.3e}");
    }
}

fn encoder(gpu: &Gpu) {
    let mut random = Random::new(1);
    for &dtype in dtypes() {
        let folder = folder(3, dtype);
        let on_gpu = Encoder::load(backend(gpu, dtype, MASKED), &folder).expect("memory");
        let reference = Encoder::load(Reference, &folder).expect("a model");
        for lengths in thin(vec![&[2, POSITIONS, 1, 19][..], &[1], &[7; 14]], 3) {
            let batch = batch(&mut random, lengths);
            for ffn in [FfnRun::Stored, FfnRun::Zero] {
                assert_close(&on_gpu, &reference, &batch, ffn, dtype);
            }
        }
    }
}

const EXPERTS: Shape = Shape {
    d_model: HIDDEN,
    num_experts: 5,
    expert_width: 8,
    shared: INTERMEDIATE - 5 * 8,
    activation: Activation::Gelu,
    glu: false,
    biases: true,
    dtype: DType::F32,
};

/// All layers but the first.
fn moefy<B: model::Backend>(encoder: &mut Encoder<B>, seed: u64, rel_threshold: f32) {
    let mut random = Random::new(seed);
    for layer in 1..LAYERS {
        let ffn = Ffn::Moe(random.moe(&EXPERTS, 1, Selection::dynamic_k(rel_threshold)));
        encoder.replace_ffn(layer, &ffn).expect("it fits");
    }
}

/// A whole pass as one graph, with other tokens before each replay.
fn replays_with_other_tokens(gpu: &Gpu) {
    let mut random = Random::new(5);
    let folder = folder(6, DType::F16);
    let stream = gpu.stream.clone();
    let backend = Backend::on_stream(&gpu.device, DType::F16, MASKED, stream);
    let mut encoder = Encoder::load(backend.expect("a backend"), &folder).expect("memory");
    moefy(&mut encoder, 7, 0.5);
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
    let mut on_gpu = Encoder::load(backend(gpu, DType::F32, MASKED), &folder).expect("memory");
    let mut reference = Encoder::load(Reference, &folder).expect("a model");
    moefy(&mut on_gpu, 8, 0.5);
    moefy(&mut reference, 8, 0.5);
    let batch = batch(&mut random, &[3, 17, 1, 30]);
    let selection = FfnRun::Selection(Selection::top_k(2));
    for ffn in [FfnRun::Stored, FfnRun::Raised(2.0), selection, FfnRun::Dense] {
        assert_close(&on_gpu, &reference, &batch, ffn, DType::F32);
    }
}

/// A folder whose last layer alone is MoEfied.
fn partly_converted_folder(gpu: &Gpu) {
    let mut random = Random::new(10);
    let dir = tempfile::tempdir().expect("a folder");
    let [dense, moe] = ["dense", "moe"].map(|name| dir.path().join(name));
    tiny(11, DType::F32).write(&dense);
    let layer = random.moe(&EXPERTS, 1, Selection::dynamic_k(0.5));
    let layers = vec![ConvertedLayer::new(LAYERS - 1, &layer)];
    let conversion = Conversion { layers, ..conversion::random(&mut gpu.rng()) };
    let interrupted = &AtomicBool::new(false);
    let output = Output { path: &moe, overwrite: false, interrupted };
    write_moefied(&Folder::open(&dense).expect("a model"), &conversion, output).expect("room");
    let folder = Folder::open(&moe).expect("a converted model");
    let reference = Encoder::load(Reference, &folder).expect("a model");
    let batch = batch(&mut random, &[2, POSITIONS, 1, 19]);
    for &dtype in dtypes() {
        let on_gpu = Encoder::load(backend(gpu, dtype, MASKED), &folder).expect("memory");
        assert_close(&on_gpu, &reference, &batch, FfnRun::Dense, dtype);
        // Elsewhere the type decides which of two close scores is above the threshold.
        if dtype == DType::F32 {
            assert_close(&on_gpu, &reference, &batch, FfnRun::Stored, dtype);
        }
    }
}

const BUCKETS: [[usize; 2]; 3] = [[4, POSITIONS], [1, 8], [3, 10]];
/// Tokens of the largest.
const MAX_TOKENS: usize = 4 * POSITIONS;

fn graphs(gpu: &Gpu, dtype: DType, rel_threshold: f32) -> EncoderGraphs {
    let mut encoder =
        Encoder::load(backend(gpu, dtype, MASKED), &folder(13, dtype)).expect("memory");
    moefy(&mut encoder, 14, rel_threshold);
    EncoderGraphs::new(encoder, &BUCKETS).expect("graphs")
}

/// Within the largest bucket, and often within a smaller one.
fn small_batch(random: &mut Random) -> Batch {
    let longest = random.pick(&[3, 8, 10, POSITIONS]);
    let lengths: Vec<usize> = (0..1 + random.below(4)).map(|_| 1 + random.below(longest)).collect();
    batch(random, &lengths)
}

/// Batches of other tokens and other sizes through the same graphs: as eager passes of the padded batch, bit
/// for bit, and close to those of the batch alone.
fn buckets(gpu: &Gpu) {
    let mut random = Random::new(12);
    let dtype = DType::F16;
    let mut graphs = graphs(gpu, dtype, 0.5);
    let mut eager = {
        let encoder = graphs.encoder();
        let batches = BUCKETS.map(|size| (size, encoder.bucket(size).expect("memory")));
        let x = encoder.activations(MAX_TOKENS).expect("memory");
        (batches, x, encoder.workspace(MAX_TOKENS).expect("memory"))
    };
    let mut taken = std::collections::HashSet::new();
    for _ in 0..if is_small() { 6 } else { 1000 } {
        let batch = small_batch(&mut random);
        let size = graphs.bucket_of(&batch).expect("a bucket");
        taken.insert(size);
        let replayed = [graphs.hidden(&batch), graphs.embed(&batch)].map(|r| r.expect("a pass"));
        let (encoder, (batches, x, workspace)) = (graphs.encoder(), &mut eager);
        let (_, on_device) =
            batches.iter_mut().find(|(bucket, _)| *bucket == size).expect("the same bucket");
        encoder.refill(on_device, &batch).expect("it fits");
        encoder.forward(FfnRun::Stored, x, on_device, workspace, None).expect("a pass");
        let mut padded = [encoder.to_host(x, on_device), encoder.pool(x, on_device)]
            .map(|values| values.expect("a copy"));
        padded[0].truncate(batch.num_tokens() * HIDDEN);
        assert!(padded[1][batch.num_sequences() * HIDDEN..].iter().all(|&v| v == 0.0));
        padded[1].truncate(batch.num_sequences() * HIDDEN);
        assert!(padded == replayed, "a replay differs");
    }
    assert!(is_small() || taken.len() == BUCKETS.len(), "{taken:?}");

    // Every expert runs, so that no rounding decides which.
    let mut graphs = self::graphs(gpu, dtype, 0.0);
    for _ in 0..if is_small() { 2 } else { 20 } {
        let batch = small_batch(&mut random);
        let replayed = [graphs.hidden(&batch), graphs.embed(&batch)].map(|r| r.expect("a pass"));
        let alone = run(graphs.encoder(), &batch, FfnRun::Stored).expect("a pass");
        for (replayed, alone) in replayed.iter().zip(alone) {
            let error = relative_error(replayed, &widened(&alone));
            assert!(error <= bar(dtype), "{:?}: {error:.3e}", batch.sequence_offsets());
        }
    }
}

fn buckets_memory_stays_flat(gpu: &Gpu) {
    let mut random = Random::new(15);
    let mut graphs = graphs(gpu, DType::F16, 0.5);
    let batches: Vec<Batch> = (0..10).map(|_| small_batch(&mut random)).collect();
    let context = gpu.device.cudarc_context();
    let mut call = |i: usize| graphs.embed(&batches[i % batches.len()]).expect("a pass");
    call(0);
    let (before, _) = context.mem_get_info().expect("a number");
    (0..if is_small() { 10 } else { 10_000 }).for_each(|i| drop(call(i)));
    let (after, _) = context.mem_get_info().expect("a number");
    assert_eq!(before, after, "free memory before and after");
}

/// The counters say what the masks do, over passes of several plans.
fn statistics(gpu: &Gpu) {
    let mut random = Random::new(16);
    let options = GpuOptions { statistics: true, ..MASKED };
    let folder = folder(17, DType::F16);
    let mut encoder = Encoder::load(backend(gpu, DType::F16, options), &folder).expect("memory");
    moefy(&mut encoder, 18, 0.5);
    assert!(encoder.statistics().expect("numbers").iter().all(Option::is_none));
    let mut expected = vec![None; LAYERS];
    for lengths in [&[1][..], &[9, POSITIONS], &[3, 3, 3]] {
        let batch = batch(&mut random, lengths);
        let mut workspace = encoder.workspace(batch.num_tokens()).expect("memory");
        let mut x = encoder.activations(batch.num_tokens()).expect("memory");
        let batch = encoder.batch(&batch).expect("a batch");
        let mut observe = |layer: usize, mask: &ExpertMask| {
            let counts: &mut RoutingCounts = expected[layer].get_or_insert_with(|| RoutingCounts {
                k_histogram: vec![0; EXPERTS.num_experts + 1],
                expert_counts: vec![0; EXPERTS.num_experts],
            });
            for token in 0..mask.num_tokens() {
                counts.k_histogram[mask.count(token)] += 1;
                mask.experts(token).for_each(|expert| counts.expert_counts[expert] += 1);
            }
        };
        let observe = Some(&mut observe as &mut model::MaskObserver<'_>);
        encoder.forward(FfnRun::Stored, &mut x, &batch, &mut workspace, observe).expect("a pass");
    }
    assert_eq!(encoder.statistics().expect("numbers"), expected);
}

fn bad_input(gpu: &Gpu) {
    let refused = |result: Result<()>, words: &[&str]| {
        let message = result.expect_err("it should be refused").to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{message:?} lacks {word:?}"));
    };
    let folder = folder(19, DType::F16);
    let encoder = || Encoder::load(backend(gpu, DType::F16, MASKED), &folder).expect("memory");
    let with = |buckets: &[[usize; 2]]| EncoderGraphs::new(encoder(), buckets).map(drop);
    refused(with(&[]), &["buckets", "at least one"]);
    refused(with(&[[1, 4], [0, 4]]), &["bucket", "at least 1", "[0, 4]"]);
    refused(with(&[[1, POSITIONS + 1]]), &["bucket", "at most 40", "[1, 41]"]);
    refused(with(&[[usize::MAX, 2]]), &["bucket", "2^32"]);

    let mut graphs = EncoderGraphs::new(encoder(), &[[2, 8], [1, 16]]).expect("graphs");
    let mut embed = |sequences: &[Vec<u32>]| {
        graphs.embed(&Batch::pack(sequences).expect("sequences")).map(drop)
    };
    refused(embed(&[]), &["batch", "at least one sequence"]);
    refused(embed(&[vec![1; 8], vec![2; 9]]), &["batch", "[[2, 8], [1, 16]]", "[2, 9]"]);
    refused(embed(&[vec![1], vec![VOCAB.len() as u32]]), &["token_ids", "30", "sequence 1"]);
    refused(encoder().batch(&Batch::pack([[0; 41]]).expect("a batch")).map(drop), &["40", "41"]);

    let mut on_device = encoder().bucket([2, 8]).expect("memory");
    let long = Batch::pack([[1; 9]]).expect("a batch");
    refused(encoder().refill(&mut on_device, &long), &["16 tokens", "9 tokens"]);

    // More than any device has.
    let shape = EncoderShape {
        num_layers: 1000,
        d_model: 1 << 16,
        num_heads: 1 << 10,
        d_ff: 1 << 18,
        ..EncoderShape::BERT_BASE
    };
    let encoder = Encoder::random(backend(gpu, DType::F16, MASKED), &shape, 0).map(drop);
    refused(encoder, &["weights", "free MiB in f16", "are missing"]);
}
