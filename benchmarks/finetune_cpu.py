"""Time LoRA steps on the CPU: ours, and those of transformers with PEFT in another Python, on one checkpoint and batch, in turn.

    taskset -c 0,1 python benchmarks/finetune_cpu.py CHECKPOINT [--peer OTHER/bin/python] [--targets attention experts] [--json FILE]

CHECKPOINT: a Hugging Face directory with MXFP4 experts. OTHER needs torch, transformers, accelerate and peft. Both train adapters of rank 8 on full
rows of random tokens with AdamW, all activations kept; transformers decodes the experts when it loads. A step's time is the median over
repetitions, beside the lowest and the highest; memory is the process's peak, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

RANK, ALPHA, RATE = 8, 16, 1e-4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with transformers and peft")
    parser.add_argument("--targets", nargs="+", choices=("attention", "experts"), default=["attention", "experts"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--serve", choices=sorted(STEPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    pythons = {"gptoss_jax": sys.executable} | ({"transformers": arguments.peer} if arguments.peer else {})
    runners = {name: Runner(python, name) for name, python in pythons.items()}
    times, losses = {name: [] for name in runners}, {name: [] for name in runners}
    for repetition in range(-1, arguments.repetitions):  # the first isn't counted
        for name, runner in runners.items():
            result = runner.step()
            losses[name].append(result["loss"])
            if repetition >= 0:
                times[name].append(result["seconds"])
    tokens = arguments.rows * arguments.tokens
    for name, runner in runners.items():
        seconds, low, high = statistics.median(times[name]), min(times[name]), max(times[name])
        facts = runner.facts | {"tokens_per_second": round(tokens / seconds, 1), "step_s": round(seconds, 4), "lowest_s": round(low, 4),
                                "highest_s": round(high, 4), "losses": losses[name], "peak_mb": runner.end()}
        print(f"{name:<14}{facts['tokens_per_second']:>9,.1f} tokens/s, step {seconds:.3f} s ({low:.3f} to {high:.3f}), peak {facts['peak_mb']:,} MB, "
              f"ready after {facts['ready_s']} s, losses {losses[name][0]:.4f} to {losses[name][-1]:.4f}")
        if arguments.json:
            settings = {key: str(value) if key == "checkpoint" else value for key, value in vars(arguments).items() if key not in ("json", "serve")}
            with arguments.json.open("a") as file:
                file.write(json.dumps({"name": name} | settings | facts) + "\n")


class Runner:
    """A process that does a step whenever it is told to, and waits."""

    def __init__(self, python: str, name: str):
        self._process = subprocess.Popen([python, __file__, *sys.argv[1:], "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[0]} has ended with exit code {self._process.wait()}")
        return json.loads(line)

    def step(self) -> dict:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Let the process end; return its peak memory in MB."""
        self._process.stdin.close()
        return self._read()["peak_mb"]


def serve(arguments: argparse.Namespace) -> None:
    """Make a step's function, and call it for each line that comes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def tell(facts):
        print(json.dumps(facts), file=out, flush=True)

    start = time.perf_counter()
    step, facts = STEPS[arguments.serve](arguments)
    tell(facts | {"ready_s": round(time.perf_counter() - start, 1), "threads": len(os.sched_getaffinity(0))})
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        tell({"seconds": time.perf_counter() - start, "loss": round(loss, 5)})
    tell({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6})


def random_tokens(arguments: argparse.Namespace, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (arguments.rows, arguments.tokens), np.int32)


def our_step(arguments: argparse.Namespace):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    import gptoss_jax
    from gptoss_jax.kernels import cpu_library
    from gptoss_jax.training import state as training
    from gptoss_jax.training.config import DataConfig, InitConfig, OptimizerConfig, TrainConfig, TrainingConfig
    from gptoss_jax.training.optimizer import make_optimizer
    from gptoss_jax.training.step import make_train_step

    config = training.resolve(TrainingConfig(
        init=InitConfig(str(arguments.checkpoint)), data=DataConfig(batch_size=arguments.rows, row_tokens=arguments.tokens),
        train=TrainConfig(mode="lora", rank=RANK, alpha=ALPHA, targets=tuple(arguments.targets), compute_dtype=arguments.dtype, remat="none"),
        optimizer=OptimizerConfig(learning_rate=RATE, warmup_steps=0, weight_decay=0.0, clip_norm=None)))
    optimizer = make_optimizer(config.optimizer, 1000)
    state, frozen = training.initial_state(config, optimizer)
    tokens = random_tokens(arguments, config.model.vocab_size)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(arguments.tokens, dtype=np.int32), tokens.shape)
    batch = training.Batch(tokens, np.roll(tokens, -1, axis=1), weights, np.ones(tokens.shape, np.int32), positions)
    compiled = make_train_step(config, optimizer).lower(state, frozen, batch).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return float(metrics["loss"])

    kernels = "cpu" if cpu_library.available() else "xla"
    return step, {"version": gptoss_jax.__version__, "jax": jax.__version__, "kernels": kernels}


def peer_step(arguments: argparse.Namespace):
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = transformers.GptOssForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16,
                                                           quantization_config=transformers.Mxfp4Config(dequantize=True)).to(dtype)
    model.config.use_cache = False
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=MODULES if "attention" in arguments.targets else [],
        target_parameters=PARAMETERS if "experts" in arguments.targets else None))
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0)
    tokens = torch.from_numpy(random_tokens(arguments, model.config.vocab_size)).long()
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return step, versions | {"adapter_parameters": sum(weight.numel() for weight in adapters)}


STEPS = {"gptoss_jax": our_step, "transformers": peer_step}

if __name__ == "__main__":
    main()
