//! Reading of dense model folders.

mod common;

use common::{HIDDEN, INTERMEDIATE, LAYERS, TinyBert};
use moefy::DType;
use moefy::ffn::Activation;
use moefy::model::{Architecture, Ffn, Folder};
use serde_json::json;

fn check_read(model: &TinyBert, folder: &Folder, prefix: &str, dtype: DType) {
    assert_eq!(folder.num_layers(), LAYERS);
    assert!(folder.moefy().is_none());
    assert_eq!(folder.config().activation, Activation::Gelu);
    for layer in 0..LAYERS {
        let Ffn::Dense(ffn) = folder.ffn(layer).unwrap() else { panic!("layer {layer} is dense") };
        assert_eq!((ffn.d_model(), ffn.d_ff(), ffn.dtype()), (HIDDEN, INTERMEDIATE, dtype));
        let stored =
            |name: &str| &model.tensors[&format!("{prefix}encoder.layer.{layer}.{name}")].bytes;
        assert_eq!(ffn.w_in().as_bytes(), stored("intermediate.dense.weight"));
        assert_eq!(ffn.b_in().unwrap().as_bytes(), stored("intermediate.dense.bias"));
        assert_eq!(ffn.w_out().transposed().as_bytes(), stored("output.dense.weight"));
        assert_eq!(ffn.b_out().unwrap().as_bytes(), stored("output.dense.bias"));
    }
    let query = folder.names().query(1);
    let weight = folder.matrix(&query.weight, [HIDDEN, HIDDEN]).unwrap();
    assert_eq!(weight.to_owned().as_bytes(), model.tensors[&query.weight].bytes);
    let bias = folder.vector(&query.bias, HIDDEN).unwrap();
    assert_eq!(bias.shape(), [1, HIDDEN]);
    assert_eq!(bias.to_owned().as_bytes(), model.tensors[&query.bias].bytes);
}

#[test]
fn every_prefix_and_format_reads() {
    for (seed, prefix) in ["", "bert.", "roberta."].into_iter().enumerate() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let dir = tempfile::tempdir().unwrap();
            let model = TinyBert::with_prefix(seed as u64, dtype, prefix);
            model.write(dir.path());
            check_read(&model, &Folder::open(dir.path()).unwrap(), prefix, dtype);
        }
    }
}

#[test]
fn shards_read_like_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyBert::new(7, DType::F32);
    model.write_sharded(dir.path(), 3);
    check_read(&model, &Folder::open(dir.path()).unwrap(), "", DType::F32);
}

#[test]
fn old_names_of_norms_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = TinyBert::new(8, DType::F32);
    model.tensors = std::mem::take(&mut model.tensors)
        .into_iter()
        .map(|(name, tensor)| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
            (name.replace("LayerNorm.bias", "LayerNorm.beta"), tensor)
        })
        .collect();
    model.write(dir.path());
    let folder = Folder::open(dir.path()).unwrap();
    assert_eq!(folder.names().ffn_norm(1).bias, "encoder.layer.1.output.LayerNorm.beta");
}

#[test]
fn the_architecture_sets_positions_and_defaults() {
    let read = |edits: &[(&str, serde_json::Value)]| {
        let dir = tempfile::tempdir().unwrap();
        let mut model = TinyBert::new(9, DType::F32);
        for (key, value) in edits {
            model.config[*key] = value.clone();
        }
        model.write(dir.path());
        Folder::open(dir.path()).unwrap().config().clone()
    };
    let bert = read(&[("pad_token_id", json!(null)), ("layer_norm_eps", json!(null))]);
    assert_eq!(bert.architecture, Architecture::Bert);
    assert_eq!((bert.pad_token_id, bert.first_position(), bert.num_positions()), (0, 0, 40));
    assert_eq!(bert.layer_norm_eps, 1e-12);

    let roberta = read(&[("model_type", json!("xlm-roberta")), ("pad_token_id", json!(null))]);
    assert_eq!(roberta.architecture, Architecture::Roberta);
    assert_eq!((roberta.pad_token_id, roberta.first_position()), (1, 2));
    assert_eq!(roberta.num_positions(), 38);

    let class =
        read(&[("model_type", json!(null)), ("architectures", json!(["CamembertForMaskedLM"]))]);
    assert_eq!(class.architecture, Architecture::Roberta);
}
