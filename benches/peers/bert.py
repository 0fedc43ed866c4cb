#!/usr/bin/env python3
"""Tokens/s of a BERT encoder in PyTorch, as `moefy bench model --peers` reads them: a line of JSON for each size.

    bert.py [--named minilm,bert-base] [--batch 1,8,64,256] [--length 32,128,512] [--dtype f16]

Needs PyTorch alone. The model is written out with scaled_dot_product_attention, and each size runs as one CUDA graph.
With --compile, torch.compile is tried as well, and the faster one counts.
"""

import argparse
import json

import torch
import torch.nn.functional as F

SHAPES = {"minilm": (6, 384, 12), "bert-base": (12, 768, 12), "bert-large": (24, 1024, 16)}
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
VOCAB, POSITIONS = 30522, 512
LAUNCHES = 20


class Layer(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.norm1, self.norm2 = torch.nn.LayerNorm(width, 1e-12), torch.nn.LayerNorm(width, 1e-12)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(context))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(torch.nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.words, self.positions = torch.nn.Embedding(VOCAB, width), torch.nn.Embedding(POSITIONS, width)
        self.kind = torch.nn.Parameter(torch.zeros(width))
        self.norm = torch.nn.LayerNorm(width, 1e-12)
        self.layers = torch.nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, ids):
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(at) + self.kind)
        for layer in self.layers:
            x = layer(x)
        return x


def microseconds(model, ids):
    """Median of replays of one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids)
    times = []
    for _ in range(LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--named", default="minilm,bert-base", type=lambda text: text.split(","))
    parser.add_argument("--batch", default="1,8,64,256", type=numbers)
    parser.add_argument("--length", default="32,128,512", type=numbers)
    parser.add_argument("--dtype", default="f16", choices=TYPES)
    parser.add_argument("--compile", action="store_true", help="also try torch.compile, which takes a minute a size")
    wanted = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for name in wanted.named:
            model = Bert(*SHAPES[name]).to("cuda", TYPES[wanted.dtype]).eval()
            models = [model] + ([torch.compile(model, dynamic=False)] if wanted.compile else [])
            for batch in wanted.batch:
                for length in wanted.length:
                    ids = torch.randint(VOCAB, (batch, length), device="cuda")
                    us = min(microseconds(model, ids) for model in models)
                    row = {"model": name, "dtype": wanted.dtype, "batch": batch, "length": length,
                           "torch_tokens_per_s": 1e6 * batch * length / us}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
