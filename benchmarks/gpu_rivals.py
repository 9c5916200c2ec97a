"""What else a GPU machine may have installed, timed beside ours as sections of `gpu.py`: PyTorch, Triton's tl.dot_scaled, transformers."""

from __future__ import annotations

import statistics
import time

from gpu_lanes import alone


def torch_ceilings(arguments, record) -> None:
    """What the same device gives PyTorch: a copy, and a bfloat16 matrix product."""
    import torch

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    data, copy = (torch.empty(1 << 32, dtype=torch.uint8, device="cuda") for _ in range(2))
    with alone():
        record(what="torch copy", gb_per_second=2 * data.numel() / gpu_seconds(torch, lambda: copy.copy_(data)) / 1e9)
        record(what="torch matmul", tflop_per_second=2 * 8192**3 / gpu_seconds(torch, lambda: a @ b) / 1e12)


def gpu_seconds(torch, run, repetitions: int = 10) -> float:
    """Return the median seconds of a call, by events."""
    run()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def triton_rival(arguments, record) -> None:
    """The experts' first product through Triton's tl.dot_scaled, for kernels.expert_matmul to be held against: 4 experts, few rows each."""
    import torch
    import triton  # noqa: F401

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    from triton_dot_scaled import mxfp4_matmul  # beside this file: Triton reads its kernels' source

    experts, out, inputs, rows = 128, 5760, 2880, 16
    blocks = torch.randint(0, 256, (experts, out, inputs // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 121, (experts, out, inputs // 32), dtype=torch.uint8, device="cuda")
    x = torch.randn(4, rows, inputs, dtype=torch.bfloat16, device="cuda")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cuda")
    chosen = torch.randperm(experts, device="cuda")[:4]
    picked = blocks[chosen]
    codes = torch.stack([picked & 15, picked >> 4], -1).flatten(-2).long()
    dense = values[codes] * torch.exp2(scales[chosen].float() - 127).repeat_interleave(32, -1)
    expected = torch.einsum("eri,eoi->ero", x.float(), dense)
    error = ((mxfp4_matmul(x, blocks, scales, chosen).float() - expected).norm() / expected.norm()).item()
    choices = [torch.randperm(experts, device="cuda")[:4] for _ in range(8)]  # others each time: the cache holds four
    with alone():
        seconds = gpu_seconds(torch, lambda: [mxfp4_matmul(x, blocks, scales, chosen) for chosen in choices]) / len(choices)
    record(what="triton dot_scaled", rows=rows, experts=4, error=error, seconds=seconds, gb_per_second=4 * out * inputs * 17 / 32 / seconds / 1e9)


def transformers_rival(arguments, record) -> None:
    """Batch-1 decode of the smaller model by transformers, bfloat16 experts, random weights, as large as the time allows."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        return record(skipped="PyTorch finds no GPU")
    config = transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32, torch_dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad(), alone():
        for weight in model.parameters():
            weight.normal_(0, 0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
        ids = torch.randint(0, config.vocab_size, (1, 112), device="cuda")
        for count in (4, 16):  # the first to warm up
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count + 1, min_new_tokens=count + 1, do_sample=False)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        first = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        torch.cuda.synchronize()
        seconds -= time.perf_counter() - first
    record(what="transformers decode", version=transformers.__version__, batch=1, context=128, dtype="bfloat16", tokens_per_second=16 / seconds)
