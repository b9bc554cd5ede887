"""How much faster does CoLA write than its dense twin? Greedy decoding with a KV cache, batches of 1 and 16, on a CPU, fp32.

    OMP_NUM_THREADS=1 python benchmarks/decode.py [1b] [--new 8] [--rounds 5]

Models have random weights, which cost what trained ones do. All take turns in one process; a round writes `--new` tokens after a prompt
of 8, and the time of the prompt itself is measured apart and taken off. The dense model has had `lorank.fast_decoding`; of CoLA there is
one without it as well. Seconds are of processor time. Kept in results/decode.json.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from turns import in_turns, ratios

import lorank
from lorank.architectures import llama_config
from lorank.sizes import SIZES

FILE = Path(__file__).with_name("results") / "decode.json"
PROMPT = 8


def write(model: Any, batch: int, new: int) -> None:
    prompt = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    assert out.shape[1] == PROMPT + new


def measure(models: dict[str, Any], batch: int, new: int, rounds: int) -> dict[str, Any]:
    ways = {(name, many): partial(write, model, batch, many) for name, model in models.items() for many in (1 + new, 1)}
    times: Any = in_turns(ways, rounds + 1)  # type: ignore[arg-type]
    each = {
        name: [(a - b) / new for a, b in zip(times[name, 1 + new], times[name, 1], strict=True)][1:] for name in models
    }
    found = {"seconds a token, shortest": {name: round(min(seconds), 4) for name, seconds in each.items()}}
    for one, other in (("dense", "cola"), ("dense", "cola as loaded"), ("cola as loaded", "cola")):
        found[f"{one} / {other}"] = ratios(each[one], each[other])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="1b", choices=SIZES)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    asked = parser.parse_args()
    torch.manual_seed(0)
    models: dict[str, Any] = {"dense": LlamaForCausalLM(llama_config(asked.size)).eval()}
    loaded = lorank.convert(copy.deepcopy(models["dense"]), lorank.CoLA(**lorank.CoLA.published[asked.size]))
    models |= {"cola": lorank.fast_decoding(copy.deepcopy(loaded)), "cola as loaded": loaded}
    lorank.fast_decoding(models["dense"])
    sizes = {name: models[name].num_parameters() for name in ("dense", "cola")}
    found: dict[str, Any] = {"parameters": sizes, "threads": torch.get_num_threads(), "torch": torch.__version__}
    with torch.inference_mode():
        for batch in asked.batches:
            found[f"batch {batch}"] = measure(models, batch, asked.new, asked.rounds)
            print(f"batch {batch}:", json.dumps(found[f"batch {batch}"]), flush=True)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**kept, asked.size: {**kept.get(asked.size, {}), **found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
