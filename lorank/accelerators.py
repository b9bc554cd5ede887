"""What some accelerators can do by their makers' data sheets, and what a run on them takes."""

import difflib
import math
from dataclasses import dataclass
from typing import NamedTuple


class Accelerator(NamedTuple):
    """One device. All values except the price are from its data sheet."""

    name: str
    device: str
    """Part of the name that PyTorch gives it."""
    flops: float
    """bf16 operations per second in dense matrix products, without structured sparsity."""
    tf32_flops: float
    """The same in TF32, in which training multiplies fp32 numbers (`torch.set_float32_matmul_precision("high")`)."""
    memory_gib: float
    """GB by the data sheet; tensors can use some 2 to 5 % less."""
    watts: float
    """Board power at full load."""
    dollars_per_hour: float
    """Our assumption, a round figure. Offers differ by a factor of three and change every month."""

    def rate(self, precision: str) -> float:
        """FLOP/s of training in a recipe's precision.

        >>> find_accelerator("a100").rate("fp32"), find_accelerator("a100").rate("bf16-pure")
        (156000000000000.0, 312000000000000.0)
        """
        return self.tf32_flops if precision == "fp32" else self.flops


ACCELERATORS = {  # where one device name is part of another, the longer comes first
    "b200": Accelerator("B200 SXM", "B200", 2250e12, 1125e12, 180, 1000, 5.00),
    "h200": Accelerator("H200 SXM", "H200", 989e12, 494e12, 141, 700, 3.50),
    "h100-pcie": Accelerator("H100 PCIe", "H100 PCIe", 756e12, 378e12, 80, 350, 2.00),
    "h100": Accelerator("H100 SXM", "H100", 989e12, 494e12, 80, 700, 2.50),
    "a100-40gb": Accelerator("A100 SXM 40 GB", "A100-SXM4-40GB", 312e12, 156e12, 40, 400, 1.20),
    "a100": Accelerator("A100 SXM 80 GB", "A100", 312e12, 156e12, 80, 400, 1.50),
    "l40s": Accelerator("L40S", "L40S", 362e12, 183e12, 48, 350, 1.00),
    "l4": Accelerator("L4", "L4", 121e12, 60e12, 24, 72, 0.60),
    "rtx-4090": Accelerator("GeForce RTX 4090", "RTX 4090", 165e12, 82.6e12, 24, 450, 0.40),
    "mi300x": Accelerator("Instinct MI300X", "MI300X", 1307e12, 653.7e12, 192, 750, 2.50),
}


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of that name; ValueError with the known names if there is none."""
    if (found := ACCELERATORS.get(name.lower().replace(" ", "-"))) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown accelerator {name!r}; {hint}the accelerators are: {', '.join(ACCELERATORS)}")


def check_memory(gib: float) -> None:
    """Raise ValueError if that is not an amount of memory."""
    if not 0 < gib < math.inf:
        raise ValueError(f"--fits must be a positive number of GiB, for example --fits 40, got {gib:g}")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Devices that train one model together, and what we assume about them; ValueError for impossible values.

    >>> one_hour = Fleet(accelerator=find_accelerator("h100"), devices=8).run(8 * 0.4 * 989e12 * 3600, "bf16")
    >>> one_hour.hours, one_hour.kilowatt_hours, one_hour.dollars
    (1.0, 5.6, 20.0)
    """

    accelerator: Accelerator
    devices: int = 8
    utilisation: float = 0.4
    """Fraction of the peak rate that is reached; recomputation counts as work."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices must be positive, got {self.devices}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], usually 0.3 to 0.5, got {self.utilisation}")
        for field in ("flops", "tf32_flops", "watts", "dollars_per_hour"):
            value = getattr(self.accelerator, field)
            if not (math.isfinite(value) and (value > 0 or (field == "dollars_per_hour" and value == 0))):
                raise ValueError(f"{field} must be a positive number, got {value}")

    def run(self, flops: float, precision: str) -> "Run":
        """What that many operations take in a recipe's precision, with devices at full board power that never wait."""
        hours = flops / (self.devices * self.accelerator.rate(precision) * self.utilisation) / 3600
        return Run(
            hours,
            hours * self.devices * self.accelerator.watts / 1000,
            hours * self.devices * self.accelerator.dollars_per_hour,
        )


class Run(NamedTuple):
    """What a run takes, all devices together."""

    hours: float
    kilowatt_hours: float
    dollars: float
