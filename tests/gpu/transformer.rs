//! Whole encoders on the GPU, against the reference.

use moefy::cuda::Gpu as Backend;
use moefy::ffn::{Activation, Selection};
use moefy::model::{self, Batch, Encoder, Ffn, FfnRun, Folder};
use moefy::reference::Reference;
use moefy::{DType, Result};
use serde_json::json;

use crate::common::{HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, TinyBert, VOCAB};
use crate::harness::{Gpu, relative_error};
use crate::support::{Random, Shape, widened};

pub fn tests() -> crate::Tests {
    vec![("transformer::encoder", encoder), ("transformer::moefied", moefied)]
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

fn moefied(gpu: &Gpu) {
    let mut random = Random::new(2);
    let folder = folder(4, DType::F32);
    let backend = Backend::new(&gpu.device, DType::F32).expect("a backend");
    let mut on_gpu = Encoder::load(backend, &folder).expect("memory");
    let mut reference = Encoder::load(Reference, &folder).expect("a model");
    // One layer stays dense.
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
        on_gpu.replace_ffn(layer, &ffn).expect("it fits");
        reference.replace_ffn(layer, &ffn).expect("it fits");
    }
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
