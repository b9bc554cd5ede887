"""The examples of own loops and of inner loops run, and learn."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("forked_processes")


@pytest.mark.parametrize(("name", "steps"), [("perk", 40), ("abmll", 5)])
def test_the_examples_of_inner_loops_run_and_learn(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, str(steps)])
    runpy.run_path(str(ROOT / f"examples/{name}.py"))
    before, after = (int(share) for share in re.findall(r"right answers: (\d+)%", capsys.readouterr().out))
    assert after > before


def test_the_examples_run_learn_and_go_on(tmp_path: Path, fresh_python) -> None:
    """With methods that do nothing between steps, merge, need an AdamW of their own, need a schedule, or are an optimizer.

    The Trainer with ReLoRA is started again: its factors are merged after the checkpoint that is left, by the steps that its hook
    has counted.
    """
    methods, files = ["cola", "relora", "switchlora", "sst", "galore"], [*(ROOT / "examples").glob("own_*.py")]
    program = """
        import runpy, shutil, sys
        from pathlib import Path
        folder, methods, *files = sys.argv[1:]
        for file in files:
            for method in methods.split():
                print("RUN")
                sys.argv = [file, method] + [folder] * (method == "relora" and "trainer" in file)
                runpy.run_path(file)
        weights = Path(folder, "model/model.safetensors")
        first = weights.read_bytes()
        for checkpoint in Path(folder).glob("checkpoint-*"):
            if checkpoint.name != "checkpoint-10":
                shutil.rmtree(checkpoint)
        weights.unlink()
        sys.argv = [next(file for file in files if "trainer" in file), "relora", folder]
        runpy.run_path(sys.argv[0])
        assert weights.read_bytes() == first
    """
    _, *runs = fresh_python(program, str(tmp_path), " ".join(methods), *map(str, files)).split("RUN\n")
    assert len(runs) == len(methods) * len(files)
    for said in runs:
        losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?([0-9.]+)", said)]
        assert len(losses) >= 2 and losses[-1] < 0.8 * losses[0], said
