//! The operations around the FFNs, against the f64 reference.

use moefy::cuda::{
    AttentionInputs, EmbeddingTables, Format, NormInputs, RawStream, View, attention, embed_tokens,
    norm, pool, rotary,
};
use moefy::reference::{self, Heads};
use moefy::{DType, Tensor, TensorRef};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::harness::{Gpu, Output, relative_error, sizes, thin, uniform};

pub fn tests() -> crate::Tests {
    vec![
        ("body::embed_tokens", embeddings),
        ("body::norm", norms),
        ("body::attention", every_attention),
        ("body::attention_of_packed_rows", packed_rows),
        ("body::rotary", rotary_positions),
        ("body::pool", pooling),
    ]
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Of one rounding to the type, and of sums of f32.
fn bar(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 1e-3,
        DType::BF16 => 6e-3,
    }
}

fn draw(rng: &mut ChaCha8Rng, shape: [usize; 2], dtype: DType) -> Tensor {
    let values = uniform(rng, shape[0] * shape[1]);
    Tensor::matrix(values, shape).expect("sizes fit").to_dtype(dtype)
}

fn view(address: u64, dtype: DType, shape: [usize; 2]) -> View {
    View::matrix(address, Format::Float(dtype), shape)
}

fn values(output: &Output, dtype: DType, shape: [usize; 2]) -> Vec<f32> {
    let bytes = output.read::<u8>();
    TensorRef::from_bytes(dtype, &bytes, shape).expect("its size").to_owned().to_f32().into_owned()
}

/// For an operation that changes its input: eagerly and from a graph, each on a fresh copy.
fn in_place(
    gpu: &Gpu,
    x: &Tensor,
    launch: impl Fn(RawStream, View) -> moefy::Result<()>,
) -> Vec<f32> {
    let mut memory = Output::new(gpu, x.as_bytes().len());
    let x_view = view(memory.address(), x.dtype(), x.shape());
    memory.write(x.as_bytes());
    launch(gpu.raw_stream(), x_view).expect("arguments that fit");
    let eager = values(&memory, x.dtype(), x.shape());
    memory.write(x.as_bytes());
    gpu.capture(|stream| launch(stream, x_view)).expect("a kernel").launch().expect("a launch");
    assert!(values(&memory, x.dtype(), x.shape()) == eager, "a graph differs");
    eager
}

fn assert_near(actual: &[f32], expected: &[f64], bar: f64, what: &str) {
    let error = relative_error(actual, expected);
    assert!(error <= bar, "{what}: error {error:.3e} > {bar:.3e}");
}

fn embeddings(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in DTYPES {
        for (num_tokens, d_model) in [(1, 8), (7, 384), (99, 768), (3, 4096)] {
            let [words, positions] = [50, 20].map(|rows| draw(rng, [rows, d_model], dtype));
            let token_type = draw(rng, [1, d_model], dtype);
            let mut ids = |below| (0..num_tokens).map(|_| rng.random_range(0..below)).collect();
            let (token_ids, position_ids): (Vec<u32>, Vec<u32>) = (ids(50), ids(20));
            let [t, p] = [&token_ids, &position_ids].map(|ids| gpu.input(ids));
            let [w, at, of_type] =
                [&words, &positions, &token_type].map(|table| gpu.input(table.as_bytes()));
            let mut y = Output::new(gpu, num_tokens * d_model * dtype.bytes());
            let y_view = view(y.address(), dtype, [num_tokens, d_model]);
            let tables = EmbeddingTables {
                words: view(w.address(), dtype, words.shape()),
                positions: Some(view(at.address(), dtype, positions.shape())),
                token_type: Some(view(of_type.address(), dtype, [1, d_model])),
            };
            let [t, p] = [t, p].map(|ids| (View::words(ids.address(), num_tokens), ids));
            gpu.run(&mut [&mut y], |stream| unsafe {
                embed_tokens(&gpu.device, stream, y_view, t.0, Some(p.0), &tables)
            });
            let expected = reference::embed_tokens(
                &words.to_f64(),
                &positions.to_f64(),
                &token_type.to_f64(),
                &token_ids,
                &position_ids,
            );
            let what = format!("{dtype} T {num_tokens} d {d_model}");
            assert_near(&values(&y, dtype, [num_tokens, d_model]), &expected, bar(dtype), &what);
        }
    }
}

fn norms(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in DTYPES {
        for (num_tokens, d_model) in
            [(1, 8), (7, 384), (99, 768), (9, 1000), (5, 1024), (3, 1032), (2, 4096), (2, 8192)]
        {
            for (is_rms, has_branch) in [(false, true), (true, true), (false, false)] {
                let shape = [num_tokens, d_model];
                let (x, branch) = (draw(rng, shape, dtype), draw(rng, shape, dtype));
                let [weight, bias] = [(); 2].map(|()| draw(rng, [1, d_model], dtype));
                let [b, w, c] = [&branch, &weight, &bias].map(|t| gpu.input(t.as_bytes()));
                let inputs = NormInputs {
                    branch: has_branch.then(|| view(b.address(), dtype, shape)),
                    weight: view(w.address(), dtype, [1, d_model]),
                    bias: (!is_rms).then(|| view(c.address(), dtype, [1, d_model])),
                    epsilon: 1e-5,
                    is_rms,
                };
                let residual = Output::new(gpu, num_tokens * d_model * dtype.bytes());
                let residual_view = view(residual.address(), dtype, shape);
                let actual = in_place(gpu, &x, |stream, x| unsafe {
                    norm(&gpu.device, stream, x, Some(residual_view), &inputs)
                });
                let sum: Vec<f64> = match has_branch {
                    true => x.to_f64().iter().zip(branch.to_f64()).map(|(x, b)| x + b).collect(),
                    false => x.to_f64(),
                };
                let (weight, bias) = (weight.to_f64(), bias.to_f64());
                let expected = match is_rms {
                    true => reference::rms_norm(&weight, 1e-5, &sum),
                    false => reference::layer_norm(&weight, &bias, 1e-5, &sum),
                };
                let what = format!("{dtype} {shape:?} rms {is_rms} branch {has_branch}");
                assert_near(&actual, &expected, bar(dtype), &what);
                assert_near(&values(&residual, dtype, shape), &sum, bar(dtype), &what);
            }
        }
    }
}

/// Sequences of these lengths, one after another.
fn offsets(lengths: &[usize]) -> Vec<u32> {
    let mut offsets = vec![0];
    offsets.extend(lengths.iter().scan(0, |end, &length| {
        *end += length as u32;
        Some(*end)
    }));
    offsets
}

fn every_attention(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for d_head in [32, 64, 96, 128] {
            for is_causal in [false, true] {
                for (num_heads, num_kv_heads) in [(2, 2), (4, 1), (6, 2)] {
                    cases.push((dtype, Heads { num_heads, num_kv_heads, d_head, is_causal }));
                }
            }
        }
    }
    let lengths = sizes(&[1, 2, 16, 17, 63, 64, 0, 65, 129, 300], 65);
    for (dtype, heads) in thin(cases, 7) {
        one_attention(gpu, rng, dtype, heads, &lengths);
    }
}

fn one_attention(gpu: &Gpu, rng: &mut ChaCha8Rng, dtype: DType, heads: Heads, lengths: &[usize]) {
    let Heads { num_heads, num_kv_heads, d_head, is_causal } = heads;
    // Rows beyond the last sequence are padding.
    let num_tokens = lengths.iter().sum::<usize>() + 3;
    let [of_q, of_k] = [num_heads, num_kv_heads].map(|heads| heads * d_head);
    let q = draw(rng, [num_tokens, of_q], dtype);
    let [k, v] = [(); 2].map(|()| draw(rng, [num_tokens, of_k], dtype));
    // Side by side, as one product gives them.
    let width = of_q + 2 * of_k;
    let mut packed = Vec::new();
    for token in 0..num_tokens {
        for (matrix, columns) in [(&q, of_q), (&k, of_k), (&v, of_k)] {
            let bytes = columns * dtype.bytes();
            packed.extend_from_slice(&matrix.as_bytes()[token * bytes..][..bytes]);
        }
    }
    let packed = gpu.input(&packed);
    let offsets = offsets(lengths);
    let offsets_device = gpu.input(&offsets);
    let part = |first: usize, columns: usize| View {
        row_stride: width,
        ..view(packed.address() + (first * dtype.bytes()) as u64, dtype, [num_tokens, columns])
    };
    let inputs = AttentionInputs {
        q: part(0, of_q),
        k: part(of_q, of_k),
        v: part(of_q + of_k, of_k),
        sequence_offsets: View::words(offsets_device.address(), offsets.len()),
        max_length: lengths.iter().copied().max().unwrap_or(0),
        num_heads,
        num_kv_heads,
        is_causal,
    };
    let mut y = Output::new(gpu, num_tokens * of_q * dtype.bytes());
    let y_view = view(y.address(), dtype, [num_tokens, of_q]);
    gpu.run(&mut [&mut y], |stream| unsafe { attention(&gpu.device, stream, y_view, &inputs) });
    let (q, k, v) = (q.to_f64(), k.to_f64(), v.to_f64());
    let expected = reference::grouped_attention(&q, &k, &v, &offsets, heads);
    let in_sequences = (num_tokens - 3) * of_q;
    let actual = values(&y, dtype, [num_tokens, of_q]);
    let what = format!("{dtype} {heads:?}");
    assert_near(&actual[..in_sequences], &expected[..in_sequences], bar(dtype), &what);
    assert!(actual[in_sequences..].iter().all(|v| v.is_nan()), "padding was written to");
}

/// Scores so large that all but one weight vanish, and so equal that all weights are the same.
fn packed_rows(gpu: &Gpu) {
    let (length, d_head) = (70, 64);
    for dtype in DTYPES {
        for (scale, bar) in [(0.0, bar(dtype)), (64.0, 4.0 * bar(dtype))] {
            let rng = &mut gpu.rng();
            let qk: Vec<f32> = uniform(rng, length * d_head).iter().map(|v| v * scale).collect();
            let qk = Tensor::matrix(qk, [length, d_head]).expect("sizes fit").to_dtype(dtype);
            let v = draw(rng, [length, d_head], dtype);
            let [qk_device, v_device] = [&qk, &v].map(|t| gpu.input(t.as_bytes()));
            let offsets_device = gpu.input(&[0u32, length as u32]);
            let shape = [length, d_head];
            let inputs = AttentionInputs {
                q: view(qk_device.address(), dtype, shape),
                k: view(qk_device.address(), dtype, shape),
                v: view(v_device.address(), dtype, shape),
                sequence_offsets: View::words(offsets_device.address(), 2),
                max_length: length,
                num_heads: 1,
                num_kv_heads: 1,
                is_causal: false,
            };
            let mut y = Output::new(gpu, length * d_head * dtype.bytes());
            let y_view = view(y.address(), dtype, shape);
            gpu.run(&mut [&mut y], |stream| unsafe {
                attention(&gpu.device, stream, y_view, &inputs)
            });
            let heads = Heads { num_heads: 1, num_kv_heads: 1, d_head, is_causal: false };
            let (qk, v) = (qk.to_f64(), v.to_f64());
            let expected = reference::grouped_attention(&qk, &qk, &v, &[0, length as u32], heads);
            assert_near(&values(&y, dtype, shape), &expected, bar, &format!("{dtype} x {scale}"));
        }
    }
}

fn rotary_positions(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in DTYPES {
        for (num_tokens, num_heads, d_head) in [(1, 1, 32), (99, 4, 64), (5, 3, 128)] {
            let x = draw(rng, [num_tokens, num_heads * d_head], dtype);
            let positions: Vec<u32> =
                (0..num_tokens).map(|_| rng.random_range(0..100_000)).collect();
            let ids = gpu.input(&positions);
            let ids_view = View::words(ids.address(), num_tokens);
            let actual = in_place(gpu, &x, |stream, x| unsafe {
                rotary(&gpu.device, stream, x, ids_view, num_heads, 10_000.0)
            });
            let expected = reference::rotary(&x.to_f64(), &positions, d_head, 10_000.0);
            let what = format!("{dtype} {num_heads} heads of {d_head}");
            assert_near(&actual, &expected, bar(dtype), &what);
        }
    }
}

fn pooling(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in DTYPES {
        for d_model in [8, 384, 768, 4096] {
            let offsets = offsets(&[1, 7, 30]);
            let x = draw(rng, [38, d_model], dtype);
            let [x_device, offsets_device] =
                [x.as_bytes(), bytemuck::cast_slice(&offsets)].map(|bytes| gpu.input(bytes));
            let mut y = Output::new(gpu, 3 * d_model * dtype.bytes());
            let y_view = view(y.address(), dtype, [3, d_model]);
            gpu.run(&mut [&mut y], |stream| unsafe {
                let x = view(x_device.address(), dtype, x.shape());
                pool(&gpu.device, stream, y_view, x, View::words(offsets_device.address(), 4))
            });
            let expected = reference::pool(&x.to_f64(), &offsets, d_model);
            assert_near(
                &values(&y, dtype, [3, d_model]),
                &expected,
                bar(dtype),
                &format!("{dtype}"),
            );
        }
    }
}
