"""What a step gains from a loss without logits: peak memory and time of a 60M Llama with a vocabulary of 32,000, fp32.

    python benchmarks/loss.py [--rounds 9]

Memory is counted on the tensors of a whole step with AdamW (`lorank.accounting.memory_estimate`, which tests compare with the memory of
processes). Times are of forward and backward passes in turns in one process; the ratios are between medians.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM

import lorank
from lorank.accounting import memory_estimate
from lorank.architectures import llama_config
from lorank.loss import next_token_loss

TIMED = (2, 256)
LARGER = ((2, 256), (8, 256), (16, 256), (64, 256))


def build(method: str, without_logits: bool, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config("60m")).train()
        if method != "dense":
            lorank.convert(model, lorank.CoLA(rank=128))
    return lorank.loss_without_logits(model) if without_logits else model


def seconds(model: Any, ids: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    next_token_loss(model, {"input_ids": ids, "labels": ids}).total.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    print(f"60M Llama, vocabulary 32,000, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\nPeak of a step in MiB, AdamW included")
    print(f"{'':12} {'tokens':>8} {'with logits':>12} {'without':>9} {'ratio':>6}")
    for method in ("dense", "cola"):
        for batch, n in LARGER:
            peaks = [
                memory_estimate(build(method, fast, "meta"), batch=batch, sequence_length=n).peak_bytes / 2**20
                for fast in (False, True)
            ]
            print(f"{method:12} {batch * n:8,} {peaks[0]:12.0f} {peaks[1]:9.0f} {peaks[1] / peaks[0]:6.2f}")

    models = {(method, fast): build(method, fast) for method in ("dense", "cola") for fast in (False, True)}
    ids = torch.randint(32_000, TIMED, generator=torch.Generator().manual_seed(0))
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in models}
    for round_ in range(options.rounds + 2):
        for key, model in models.items():
            elapsed = seconds(model, ids)
            if round_ >= 2:  # warm
                times[key].append(elapsed)
    median = {key: statistics.median(each) for key, each in times.items()}
    print(f"\nForward and backward of {TIMED[0]} x {TIMED[1]} tokens, s; gain: from doing without logits")
    print(f"{'':12} {'with logits':>12} {'without':>9} {'gain':>6}")
    for method in ("dense", "cola"):
        one, other = median[method, False], median[method, True]
        print(f"{method:12} {one:12.3f} {other:9.3f} {one / other:6.2f}")
    for fast, name in ((False, "with logits"), (True, "without")):
        print(f"CoLA / dense, both {name}: {median['dense', fast] / median['cola', fast]:.2f} times as fast")


if __name__ == "__main__":
    main()
