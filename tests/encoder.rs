//! Whole encoders: the CPU against the reference, a random little BERT and a real model.

mod common;
mod support;

use common::{HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, TinyBert, VOCAB};
use moefy::cpu::Cpu;
use moefy::ffn::{Activation, ExpertMask, Selection};
use moefy::model::{
    Backend, Batch, Encoder, Ffn, FfnRun, Folder, batches, batches_in_order, embed,
};
use moefy::reference::Reference;
use moefy::{DType, Result};
use serde_json::json;
use support::{Random, Shape, on_threads, relative_error, widened};

fn open(model: &TinyBert) -> Folder {
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    // The files stay mapped when their folder is gone.
    Folder::open(dir.path()).unwrap()
}

fn sequence(random: &mut Random, length: usize) -> Vec<u32> {
    (0..length).map(|_| random.below(VOCAB.len()) as u32).collect()
}

fn hidden<B: Backend>(encoder: &Encoder<B>, batch: &Batch, run: FfnRun) -> Result<Vec<f32>> {
    let mut workspace = encoder.workspace(batch.num_tokens())?;
    let mut x = encoder.activations(batch.num_tokens())?;
    let batch = encoder.batch(batch)?;
    encoder.forward(run, &mut x, &batch, &mut workspace, None)?;
    encoder.to_host(&x, &batch)
}

/// The four little experts of a layer, and what they would be as a dense layer.
fn moe(random: &mut Random) -> Ffn {
    let shape = Shape {
        d_model: HIDDEN,
        num_experts: 5,
        expert_width: 9,
        shared: INTERMEDIATE - 5 * 9,
        activation: Activation::Gelu,
        glu: false,
        biases: true,
        dtype: DType::F32,
    };
    Ffn::Moe(random.moe(&shape, 1, Selection::dynamic_k(0.5)))
}

#[test]
fn the_cpu_is_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(1);
    for (seed, prefix) in ["", "bert.", "roberta."].into_iter().enumerate() {
        for dtype in support::DTYPES {
            let folder = open(&TinyBert::with_prefix(seed as u64, dtype, prefix));
            let cpu = Encoder::load(Cpu, &folder).unwrap();
            let reference = Encoder::load(Reference, &folder).unwrap();
            for lengths in [&[][..], &[1], &[2, POSITIONS, 1, 19], &[7; 14]] {
                let sequences = lengths.iter().map(|&length| sequence(&mut random, length));
                let batch = Batch::pack(sequences).unwrap();
                for run in [FfnRun::Stored, FfnRun::Zero] {
                    let got = hidden(&cpu, &batch, run).unwrap();
                    let expected = widened(&hidden(&reference, &batch, run).unwrap());
                    let error = relative_error(&got, &expected);
                    assert!(error < 5e-6, "{prefix} {dtype} {lengths:?} {run:?}: {error:e}");
                    for threads in [1, 5] {
                        let again = on_threads(threads, || hidden(&cpu, &batch, run).unwrap());
                        assert_eq!(again, got);
                    }
                }
            }
        }
    }
}

#[test]
fn moefied_layers_run_as_asked() {
    let mut random = Random::new(2);
    let folder = open(&TinyBert::new(7, DType::F32));
    let mut cpu = Encoder::load(Cpu, &folder).unwrap();
    let mut reference = Encoder::load(Reference, &folder).unwrap();
    for layer in 0..LAYERS {
        let ffn = moe(&mut random);
        cpu.replace_ffn(layer, &ffn).unwrap();
        reference.replace_ffn(layer, &ffn).unwrap();
    }
    let lengths = [3, 17, 1, 30];
    let batch = Batch::pack(lengths.map(|length| sequence(&mut random, length))).unwrap();
    let masks_of = |run| {
        fn masks<B: Backend>(encoder: &Encoder<B>, batch: &Batch, run: FfnRun) -> Vec<ExpertMask> {
            let mut masks = Vec::new();
            let mut observe = |layer: usize, mask: &ExpertMask| {
                assert_eq!(layer, masks.len());
                masks.push(mask.clone());
            };
            let mut workspace = encoder.workspace(batch.num_tokens()).unwrap();
            let mut x = encoder.activations(batch.num_tokens()).unwrap();
            let batch = encoder.batch(batch).unwrap();
            encoder.forward(run, &mut x, &batch, &mut workspace, Some(&mut observe)).unwrap();
            masks
        }
        let got = masks(&cpu, &batch, run);
        assert_eq!(got, masks(&reference, &batch, run));
        got
    };
    let pairs = |run| masks_of(run).iter().map(ExpertMask::num_pairs).collect::<Vec<_>>();
    let all = 5 * batch.num_tokens();
    let selection = |rule| FfnRun::Selection(rule);
    let runs = [
        (FfnRun::Stored, pairs(selection(Selection::dynamic_k(0.5)))),
        (selection(Selection::dynamic_k(0.0)), vec![all; LAYERS]),
        (selection(Selection::top_k(2)), vec![2 * batch.num_tokens(); LAYERS]),
        (FfnRun::Dense, vec![]),
        (FfnRun::Zero, vec![]),
    ];
    for (run, expected) in runs {
        assert_eq!(pairs(run), expected, "{run:?}");
        let got = hidden(&cpu, &batch, run).unwrap();
        let expected = widened(&hidden(&reference, &batch, run).unwrap());
        assert!(relative_error(&got, &expected) < 5e-6, "{run:?}");
    }
    let dense = widened(&hidden(&cpu, &batch, FfnRun::Dense).unwrap());
    let every = hidden(&cpu, &batch, selection(Selection::dynamic_k(0.0))).unwrap();
    assert!(relative_error(&every, &dense) < 5e-6);
    let few = hidden(&cpu, &batch, selection(Selection::top_k(1))).unwrap();
    assert!(relative_error(&few, &dense) > 1e-2);
}

/// "Dense" is the FFN without what a compensation adds.
#[test]
fn a_compensated_layer_runs_dense() {
    let mut random = Random::new(3);
    let folder = open(&TinyBert::new(8, DType::F32));
    let mut encoder = Encoder::load(Cpu, &folder).unwrap();
    let batch = Batch::pack([sequence(&mut random, 21)]).unwrap();
    let Ffn::Moe(plain) = moe(&mut random) else { unreachable!() };
    encoder.replace_ffn(1, &Ffn::Dense(plain.to_dense())).unwrap();
    let dense = widened(&hidden(&encoder, &batch, FfnRun::Stored).unwrap());
    for kind in [1, 2] {
        let shape = Shape {
            d_model: HIDDEN,
            num_experts: 5,
            expert_width: 9,
            shared: INTERMEDIATE - 5 * 9,
            activation: Activation::Gelu,
            glu: false,
            biases: true,
            dtype: DType::F32,
        };
        let compensation = random.compensation(&shape, kind).unwrap();
        let moe = plain.clone().with_compensation(compensation).unwrap();
        encoder.replace_ffn(1, &Ffn::Moe(moe)).unwrap();
        let got = hidden(&encoder, &batch, FfnRun::Dense).unwrap();
        assert!(relative_error(&got, &dense) < 5e-6, "{kind}");
    }
}

/// RoBERTa's positions begin behind the padding token's, which padding itself has: a BERT whose
/// table holds those very rows computes the same.
#[test]
fn roberta_counts_positions_from_behind_padding() {
    let mut roberta = TinyBert::new(9, DType::F32);
    roberta.config["model_type"] = json!("roberta");
    roberta.config["pad_token_id"] = json!(1);
    let (pad, tokens) = (1, [6, 1, 5, 8]);
    let positions = [2, 1, 3, 4];

    let mut bert = TinyBert::new(9, DType::F32);
    let name = "embeddings.position_embeddings.weight";
    let row_bytes = HIDDEN * 4;
    for (to, from) in positions.into_iter().enumerate() {
        let row = roberta.tensors[name].bytes[from * row_bytes..][..row_bytes].to_vec();
        bert.tensors.get_mut(name).unwrap().bytes[to * row_bytes..][..row_bytes]
            .copy_from_slice(&row);
    }
    let [roberta, bert] = [roberta, bert].map(|model| Encoder::load(Cpu, &open(&model)).unwrap());
    assert_eq!(roberta.max_length(), POSITIONS - pad - 1);
    assert_eq!(bert.max_length(), POSITIONS);
    let batch = Batch::pack([tokens]).unwrap();
    let [got, expected] = [roberta, bert].map(|e| hidden(&e, &batch, FfnRun::Stored).unwrap());
    assert_eq!(got, expected);
}

#[test]
fn embeddings_come_in_the_order_of_the_sequences() {
    let mut random = Random::new(4);
    let folder = open(&TinyBert::new(10, DType::F32));
    let encoder = Encoder::load(Cpu, &folder).unwrap();
    let reference = Encoder::load(Reference, &folder).unwrap();
    let sequences: Vec<Vec<u32>> = (0..300)
        .map(|_| {
            let length = 1 + random.below(POSITIONS);
            sequence(&mut random, length)
        })
        .collect();
    let together = embed(&encoder, &sequences, FfnRun::Stored, None).unwrap();
    for (sequence, row) in sequences.iter().zip(together.chunks_exact(HIDDEN)) {
        let norm: f32 = row.iter().map(|v| v * v).sum();
        assert!((norm - 1.0).abs() < 1e-5);
        let alone = embed(&reference, std::slice::from_ref(sequence), FfnRun::Stored, None);
        assert!(relative_error(row, &widened(&alone.unwrap())) < 1e-5);
    }
    assert!(embed(&encoder, &[], FfnRun::Stored, None).unwrap().is_empty());
}

#[test]
fn batches_hold_every_sequence_once_and_stay_below_their_size() {
    let lengths = [5, 1, 9, 30, 1, 4, 12, 7];
    let sequences: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
    let sorted = batches(&sequences, 12);
    assert_eq!(sorted, [vec![1, 4, 5, 0], vec![7], vec![2], vec![6], vec![3]]);

    let lengths = [1, 11, 1, 13, 2, 12, 3];
    let sequences: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
    let in_order: Vec<usize> = batches_in_order(&sequences, 12).map(<[_]>::len).collect();
    assert_eq!(in_order, [2, 1, 1, 1, 1, 1]);
    assert_eq!(batches_in_order::<Vec<u32>>(&[], 12).count(), 0);
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let refused = |result: Result<()>, words: &str| {
        let error = result.expect_err(words).to_string();
        assert!(error.contains(words), "`{words}` is not in `{error}`");
    };
    let batch = |ids: &[u32], offsets: &[u32]| Batch::new(ids.to_vec(), offsets.to_vec());
    refused(batch(&[1, 2], &[]).map(drop), "start at 0");
    refused(batch(&[1, 2], &[1, 2]).map(drop), "start at 0");
    refused(batch(&[1, 2], &[0, 2, 2]).map(drop), "tokens 2..2 for sequence 1");
    refused(batch(&[1, 2], &[0, 2, 1]).map(drop), "tokens 2..1 for sequence 1");
    refused(batch(&[1, 2], &[0, 1]).map(drop), "end at the number of tokens, 2, got 1");
    refused(batch(&[1], &[0]).map(drop), "end at the number of tokens, 1, got 0");

    let folder = open(&TinyBert::new(11, DType::F32));
    let mut encoder = Encoder::load(Cpu, &folder).unwrap();
    let long = vec![0; POSITIONS + 1];
    let unknown = batch(&[3, 29, 30], &[0, 1, 3]).unwrap();
    refused(encoder.batch(&unknown).map(drop), "less than vocab_size = 30, got 30 in sequence 1");
    let long = Batch::pack([long]).unwrap();
    refused(encoder.batch(&long).map(drop), "at most 40 tokens, got 41 in sequence 0");
    refused(embed(&encoder, &[vec![]], FfnRun::Stored, None).map(drop), "at least one token");

    let two = encoder.batch(&batch(&[1, 2], &[0, 2]).unwrap()).unwrap();
    let (mut x, mut workspace) = (encoder.activations(2).unwrap(), encoder.workspace(1).unwrap());
    let run = encoder.forward(FfnRun::Stored, &mut x, &two, &mut workspace, None);
    refused(run, "at most 1 tokens, as the workspace, got 2");

    let mut random = Random::new(5);
    encoder.replace_ffn(0, &moe(&mut random)).unwrap();
    let mut workspace = encoder.workspace(2).unwrap();
    let run = FfnRun::Selection(Selection::top_k(6));
    refused(encoder.forward(run, &mut x, &two, &mut workspace, None), "num_experts = 5, got 6");
    let shape = Shape {
        d_model: HIDDEN + 1,
        num_experts: 1,
        expert_width: 3,
        shared: 0,
        activation: Activation::Relu,
        glu: false,
        biases: false,
        dtype: DType::F32,
    };
    let wide = Ffn::Dense(random.dense(&shape));
    refused(encoder.replace_ffn(0, &wide), "d_model = 32, got 33");
}

#[cfg(feature = "cli")]
mod text {
    use std::path::{Path, PathBuf};

    use moefy::model::Tokenizer;

    use super::*;

    #[test]
    fn texts_become_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let mut model = TinyBert::new(12, DType::F32);
        // What the file says about length is not what the model can do.
        model.tokenizer["truncation"] =
            json!({ "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        model.tokenizer["padding"] = json!({
            "strategy": { "Fixed": 20 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"
        });
        model.write(dir.path());
        let folder = Folder::open(dir.path()).unwrap();
        let open = |max_length| Tokenizer::open(&folder, max_length);
        let long = "cat ".repeat(100);
        let texts = ["The young cat sleeps.", "", long.as_str()];

        let tokenizer = open(None).unwrap();
        assert_eq!(tokenizer.max_length(), POSITIONS);
        let ids = tokenizer.encode(&texts).unwrap();
        assert_eq!(ids[0], [2, 8, 25, 9, 1, 5, 3]);
        assert_eq!(ids[1], [2, 3]);
        assert_eq!(ids[2].len(), POSITIONS);
        assert_eq!(ids[2][POSITIONS - 1], 3);

        let lengths = |tokenizer: Tokenizer| {
            tokenizer.encode(&texts).unwrap().iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(open(Some(5)).unwrap()), [5, 2, 5]);
        assert_eq!(lengths(open(Some(1000)).unwrap()), [7, 2, POSITIONS]);

        let sentence_config = dir.path().join("sentence_bert_config.json");
        std::fs::write(&sentence_config, r#"{ "max_seq_length": 6 }"#).unwrap();
        assert_eq!(lengths(open(None).unwrap()), [6, 2, 6]);
        assert_eq!(lengths(open(Some(5)).unwrap()), [5, 2, 5]);

        let refused = |result: Result<Tokenizer>, words: &str| {
            let error = result.err().expect(words).to_string();
            assert!(error.contains(words), "`{words}` is not in `{error}`");
        };
        refused(open(Some(2)), "more than the 2 special tokens of a text, got 2");
        std::fs::write(&sentence_config, "[").unwrap();
        refused(open(None), "sentence_bert_config.json: cannot read `max_seq_length`");
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        refused(open(Some(5)), "tokenizer.json: not a tokenizer");
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        refused(open(Some(5)), "tokenizer.json");
    }

    fn real_model() -> PathBuf {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("inputs/all-MiniLM-L6-v2");
        assert!(folder.exists(), "{} is missing: run `make inputs` first", folder.display());
        folder
    }

    /// The similarities are those that the model's documentation shows for these sentences.
    #[test]
    fn a_real_model_says_what_is_known_of_it() {
        let folder = Folder::open(&real_model()).unwrap();
        let sentences =
            ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."];
        let sequences = Tokenizer::open(&folder, None).unwrap().encode(&sentences).unwrap();
        let encoder = Encoder::load(Cpu, &folder).unwrap();
        let d_model = encoder.d_model();
        let embeddings = embed(&encoder, &sequences, FfnRun::Stored, None).unwrap();
        let similarity = |i: usize, j: usize| -> f32 {
            let row = |i: usize| &embeddings[i * d_model..(i + 1) * d_model];
            row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum()
        };
        for (i, j, expected) in [(0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411)] {
            let got = similarity(i, j);
            assert!((got - expected).abs() < 1e-4, "{i}, {j}: {got}, not {expected}");
        }

        let exact = Encoder::load(Reference, &folder).unwrap();
        let exact = embed(&exact, &sequences, FfnRun::Stored, None).unwrap();
        for (got, expected) in embeddings.chunks(d_model).zip(exact.chunks(d_model)) {
            let error: f32 = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(error.sqrt() < 1e-5, "{error:e}");
        }
    }
}
