"""What training costs: parameters, FLOPs and bytes, measured on the model itself.

The measurements work on any transformers model and need no memory for its weights: they run a twin of it whose tensors
have shapes but no data. The formulas that papers give for Llama are in `lorank.papers.formulas`.
"""

from lorank import renamed
from lorank.accounting.flops import MORE_FLOPS, Flops, achievable_flops, flops_per_token, measure_flops
from lorank.accounting.memory import (
    Memory,
    Peak,
    Saved,
    Step,
    all_reduce_bytes,
    held_bytes,
    measure_call,
    measure_peak,
    measure_saved,
    measure_step,
    memory_estimate,
    rests_bytes,
    saved_by,
)
from lorank.accounting.meter import Meter
from lorank.accounting.parameters import Parameters, count_parameters, shared_modules

__all__ = [
    "MORE_FLOPS",
    "Flops",
    "Memory",
    "Meter",
    "Parameters",
    "Peak",
    "Saved",
    "Step",
    "achievable_flops",
    "all_reduce_bytes",
    "count_parameters",
    "flops_per_token",
    "held_bytes",
    "measure_call",
    "measure_flops",
    "measure_peak",
    "measure_saved",
    "measure_step",
    "memory_estimate",
    "rests_bytes",
    "saved_by",
    "shared_modules",
]

renamed.hint(__name__)
