"""A plugin of pytest that gives the examples of a hypothesis test by atheris, which looks for inputs that reach new code of lorank.

See `benchmarks/hostile.py --guided`. libFuzzer ends the process: with code 0 after LORANK_HOSTILE examples, with another one at a fault.
"""

import os
import random
import sys
from typing import Any

import atheris
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

with atheris.instrument_imports(include=["lorank"]):
    import lorank.cli.errors
    import lorank.train.continual
    import lorank.train.data
    import lorank.train.folder
    import lorank.train.model
    import lorank.train.saved  # noqa: F401


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Instead of a test with hypothesis, all of its examples. Other tests run as they are."""
    if not hasattr(pyfuncitem.obj, "hypothesis"):
        return None
    test, names = pyfuncitem.obj.hypothesis.inner_test, pyfuncitem._fixtureinfo.argnames
    fixtures = {name: pyfuncitem.funcargs[name] for name in names}

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def example(data: Any) -> None:
        test(data=data, **fixtures)

    seeds, draw = pyfuncitem.funcargs["tmp_path"] / "seeds", random.Random(0)
    seeds.mkdir()  # inputs must be long: hypothesis takes some bytes for each choice
    for number in range(32):
        (seeds / str(number)).write_bytes(draw.randbytes(4096))
    pyfuncitem.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
    limits = [
        f"-runs={os.environ['LORANK_HOSTILE']}",
        "-max_len=8192",
        "-len_control=0",
        "-rss_limit_mb=8192",
        "-seed=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(seeds)], example.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()
    return True
