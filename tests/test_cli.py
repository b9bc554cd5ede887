"""The command line as a user meets it: good commands end well, bad ones in one sentence and exit code 2."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TEXT = "".join(f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(600))
QUICK = ["--vocab-size", "300", "--sequence-length", "32", "--batch-size", "4", "--steps", "4", "--warmup-steps", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def lorank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: Callable[..., tuple[int, str, str]]):
    """Run a command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return in_this_process


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fox"
    command = [sys.executable, "-m", "lorank", "pretrain", "--data", text, *QUICK, "--out", folder]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder


def test_pretrain_evaluate_generate(lorank, trained: Path, text: Path) -> None:
    code, out, _ = lorank("evaluate", trained, "--data", text, "--sequence-length", 32, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["perplexity"] > 1
    # the biased figure is lower whenever the loss is positive
    assert figures["published_compatible_perplexity"] < figures["perplexity"]
    code, out, _ = lorank("evaluate", trained, "--data", text, "--sequence-length", 32)
    assert code == 0 and "perplexity (unbiased)" in out and "published-compatible" in out and "bits per byte" in out
    code, first, _ = lorank("generate", trained, "--prompt", "line 1", "--max-new-tokens", 8, "--seed", 1)
    assert code == 0 and first.startswith("line 1")
    assert lorank("generate", trained, "--prompt", "line 1", "--max-new-tokens", 8, "--seed", 1)[1] == first


def test_a_recipe_file_and_flags_have_the_same_names(lorank, text: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        f"data: {text}\nvocab_size: 300\nsequence_length: 32\nbatch_size: 4\nmethod: low-rank\n"
    )
    code, _, err = lorank("pretrain", "my.yaml", "--steps", 2, "--warmup-steps", 1, "--rank", "0.2", "--out", "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["lorank"]["method"], config["lorank"]["arguments"]["rank"]) == ("low-rank", 0.2)


def test_dry_run_shows_what_becomes_what_and_writes_nothing(lorank, tmp_path: Path) -> None:
    code, out, _ = lorank("pretrain", "--size", "60m", "--vocab-size", 32000, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    assert "58,073,600" in out and "42,770,944" in out and "q_proj" in out and "rank=128" in out
    assert "weights" in out and "activations" in out


def test_dry_run_of_another_architecture(lorank) -> None:
    code, out, _ = lorank("pretrain", "--model", "gpt2", "--method", "cola-m", "--dry-run")
    assert code == 0 and "c_attn.query" in out and "recompute" in out


PLAN = ["plan", "--size", "tiny", "--vocab-size", "300", "--sequence-length", "32", "--method", "dense,cola-m"]


def test_plan_prints_tables_narrow_enough_for_a_terminal(lorank) -> None:
    code, out, err = lorank(*PLAN, "--fits", 1, "--tokens", "1B", "--accelerator", "l4", "--devices", 1)
    assert code == 0, err
    for word in (
        "cola-m",
        "in the blocks",
        "peak",
        "A run of 1 G tokens on L4",
        "What fits in 1 GiB",
        "Assumed",
        "$0.60",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80


def test_plan_for_programs(lorank) -> None:
    code, out, err = lorank(*PLAN, "--price", 9, "--watts", 100, "--flops", 1e14, "--utilisation", 0.5, "--json")
    assert code == 0, err
    dense, cola = json.loads(out)["forecasts"]
    assert (dense["method"], cola["method"]) == ("dense", "cola-m")
    assert dense["dollars"] == pytest.approx(9 * 8 * dense["hours"])
    assert dense["hours"] * 3600 * 8 * 5e13 == pytest.approx(dense["flops_per_token"] * dense["tokens"])
    code, out, _ = lorank(*PLAN, "--flops", 1e14, "--precision", "fp32", "--json")
    assert [one["accelerator_flops"] for one in json.loads(out)["forecasts"]] == [1e14, 1e14], "given for any precision"
    code, out, _ = lorank(*PLAN, "--csv")
    header, *rows = out.strip().splitlines()
    assert code == 0 and len(rows) == 2 and header.startswith("shape,method,rank")


def test_plan_of_a_configuration(lorank, tmp_path: Path) -> None:
    shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    code, out, err = lorank("plan", "--model", tmp_path / "config.json", "--method", "cola", "--sequence-length", 32)
    assert code == 0 and "cola" in out, err


def test_plan_of_recipes(lorank, tmp_path: Path) -> None:
    common = "size: tiny\nvocab_size: 300\nsequence_length: 32\nsteps: 40\nwarmup_steps: 4\ntokenizer: no/such\n"
    for name, text in (("dense", "method: dense\n"), ("mine", "method: galore\noptions: {update_gap: 5}\n")):
        (tmp_path / f"{name}.yaml").write_text(common + text)
    files = [tmp_path / "dense.yaml", tmp_path / "mine.yaml"]
    code, out, err = lorank("plan", *files)
    assert code == 0, err
    assert "A run of 10.2 k tokens" in out and "galore" in out and max(map(len, out.splitlines())) <= 80
    flags = ["--option", "in_backward=true", "--targets", "mlp", "--precision", "bf16", "--json"]
    code, out, err = lorank("plan", files[1], *flags)
    [record] = json.loads(out)["forecasts"]
    assert record["options"] == {"in_backward": True} and record["devices"] == 1 and record["precision"] == "bf16"
    assert (record["recipe"], record["steps"], record["batch_size"]) == (str(files[1]), 40, 8)
    code, out, err = lorank("plan", files[0], "--size", "1b")
    assert code == 2 and "a recipe has its own model and method" in err


BAD = {
    "an unknown accelerator": ([*PLAN, "--accelerator", "h101"], "did you mean 'h100'"),
    "an empty set of methods": (["plan", "--method", ""], "no method to plan for"),
    "an unknown method to plan": (["plan", "--method", "colla"], "did you mean 'cola'"),
    "an empty set of sizes": (["plan", "--size", ""], "unknown size ''"),
    "an unknown size to plan": (["plan", "--size", "61m"], "did you mean '60m'"),
    "a budget below one step": ([*PLAN, "--tokens", "5"], "tokens=5 are fewer than one step's"),
    "a budget of nothing": ([*PLAN, "--tokens", "0"], "tokens='0'"),
    "a budget in words": ([*PLAN, "--tokens", "many"], "tokens='many'"),
    "memory that nothing fits in": ([*PLAN, "--fits", "0.001"], "nothing fits in 0.001 GiB"),
    "negative memory": ([*PLAN, "--fits", "-1"], "must be a positive number of GiB"),
    "more than the peak rate": ([*PLAN, "--utilisation", "2"], "utilisation must be in (0, 1]"),
    "a price below nothing": ([*PLAN, "--price", "-1"], "dollars_per_hour must be a positive number, got -1.0"),
    "devices that divide no batch": ([*PLAN, "--devices", "7"], "7 devices with micro-batches of 16"),
    "an unknown paper": (["plan", "--paper", "colla"], "did you mean 'cola'"),
    "a recipe that is not there": (["plan", "recipes/nowhere.yaml"], "recipe recipes/nowhere.yaml does not exist"),
    "an option of no method": ([*PLAN, "--option", "update_gap=3"], "none of dense, cola-m takes 'update_gap'"),
    "a paper and a recipe": (["plan", "mine.yaml", "--paper", "cola"], "drop the recipe"),
    "a paper at another size": (["plan", "--paper", "cola", "--size", "1b"], "drop --size"),
    "two formats at once": (["plan", "--json", "--csv"], "exclude each other"),
    "a rank beyond reason": ([*PLAN, "--rank", "-3"], "rank=-3 is not positive"),
    "a missing file": (["pretrain", "--data", "nowhere.txt"], "nowhere.txt"),
    "an empty corpus": (["pretrain", "--data", "{empty}", *QUICK], "empty"),
    "a corpus shorter than a sequence": (["pretrain", "--data", "{short}", *QUICK], "sequence_length"),
    "an unknown file type": (["pretrain", "--data", "{odd}", *QUICK], "odd.xyz"),
    "an unknown method": (["pretrain", "--method", "colla"], "did you mean 'cola'"),
    "an unknown size": (["pretrain", "--size", "61m"], "did you mean '60m'"),
    "an unknown model": (["pretrain", "--model", "./nothing"], "./nothing"),
    "a converted model": (["pretrain", "--model", "{trained}", "--data", "{text}", *QUICK], "converted already"),
    "a negative rank": (["pretrain", "--rank", "-3", "--data", "{text}", *QUICK], "rank=-3 is not positive"),
    "a rank that is no number": (["pretrain", "--rank", "few"], "'few'"),
    "a field the method lacks": (["pretrain", "--option", "sparsity=1", "--data", "{text}", *QUICK], "sparsity"),
    "an option without value": (["pretrain", "--option", "sparsity"], "NAME=VALUE"),
    "a variant that does not exist": (
        ["pretrain", "--option", "nonlinearity=some", "--data", "{text}", *QUICK],
        "nonlinearity",
    ),
    "a pattern without match": (["pretrain", "--targets", "conv", "--data", "{text}", *QUICK], "'conv'"),
    "a rank for dense": (["pretrain", "--method", "dense", "--rank", "4", "--data", "{text}", *QUICK], "dense"),
    "broken YAML": (["pretrain", "{broken}"], "not valid YAML"),
    "a missing recipe": (["pretrain", "absent.yaml"], "absent.yaml"),
    "an unknown flag": (["pretrain", "--learning-rate", "1"], "--learning-rate"),
    "an unknown command": (["train"], "train"),
    "an unwritable place": (["pretrain", "--data", "{text}", *QUICK, "--out", "{text}/run"], "fox.txt/run"),
    "a run that is there": (["pretrain", "--data", "{text}", *QUICK, "--out", "{trained}"], "already contains a run"),
    "nothing to resume": (["pretrain", "--resume", "nowhere"], "nowhere"),
    "resume with other settings": (["pretrain", "--resume", "{trained}", "--lr", "1"], "--lr"),
    "sequences beyond the model": (["pretrain", "--model", "gpt2", "--sequence-length", "2048"], "1024 positions"),
    "a tracker that is not installed": (["pretrain", "--data", "{text}", *QUICK, "--report-to", "wandb"], "wandb"),
    "evaluate without a model": (["evaluate", "{folder}"], "has no config.json"),
    "evaluate on nothing": (["evaluate", "{trained}", "--data", "nowhere.txt"], "nowhere.txt"),
    "evaluate on too little": (["evaluate", "{trained}", "--data", "{short}"], "sequence_length"),
    "evaluate what is broken": (["evaluate", "{corrupt}"], "no model could be loaded"),
    "generate without a model": (["generate", "{folder}"], "has no config.json"),
    "generate at a negative temperature": (
        ["generate", "{trained}", "--temperature", "-1"],
        "temperature must be 0 (greedy) or from 0.001 to 1000, got -1.0",
    ),
    "generate nothing": (["generate", "{trained}", "--max-new-tokens", "0"], "max-new-tokens"),
    "a folder as recipe": (["pretrain", "{folder}"], "is a folder; give a YAML file"),
    "a file as folder": (["pretrain", "--data", "{text}", *QUICK, "--out", "{text}"], "--out must be a folder"),
    "a rate without end": (["pretrain", "--lr", "inf"], "lr=inf is not a finite number"),
    "a clip that is none": (["pretrain", "--clip", "nan"], "clip=nan is not a finite number"),
    "a decay without end": (["pretrain", "--weight-decay", "inf"], "weight_decay=inf is not a finite number"),
    "evaluation on fewer than no tokens": (["pretrain", "--eval-tokens", "-5"], "eval_tokens=-5 is not positive"),
    "no vocabulary": (["pretrain", "--vocab-size", "0"], "vocab_size=0 is not positive"),
    "a vocabulary smaller than the tokenizer's": (
        ["pretrain", "--data", "{text}", "--tokenizer", "{trained}", *QUICK[2:], "--vocab-size", "100"],
        "leave it out to use all of them",
    ),
    "no name of data": (["pretrain", "--data", ""], "data is empty"),
    "a seed too large": (["pretrain", "--seed", "4294967296"], "seed=4294967296 is not below"),
    "evaluate with a negative seed": (["evaluate", "{trained}", "--seed", "-1"], "--seed"),
    "generate with a huge seed": (["generate", "{trained}", "--seed", "99999999999999999999"], "--seed"),
    "a demo in a file": (["demo", "--out", "{text}"], "is a file"),
    "a demo where one is": (["demo", "--out", "{demo}"], "already holds a run"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    lorank, trained: Path, text: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty.txt").write_text(" ".strip())
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "odd.xyz").write_text("ab")
    (tmp_path / "broken.yaml").write_text("steps: [1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "demo/dense").mkdir(parents=True)
    (tmp_path / "demo/dense/recipe.yaml").write_text("")
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (corrupt / name).write_bytes((trained / name).read_bytes())
    (corrupt / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:1000])
    places = {
        "empty": tmp_path / "empty.txt",
        "short": tmp_path / "short.txt",
        "odd": tmp_path / "odd.xyz",
        "text": text,
    }
    places |= {
        "broken": tmp_path / "broken.yaml",
        "folder": tmp_path / "folder",
        "trained": trained,
        "corrupt": corrupt,
    }
    places |= {"demo": tmp_path / "demo"}
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, _, err = lorank(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert words in err and "Traceback" not in err
    assert len(err.splitlines()) == 1, "one sentence"
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_sentence(text: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 50 kB, as on a disk that fills: the run ends in one sentence, not in a traceback."""
    code = f"""
import resource, sys
from lorank.cli import main
import transformers
sys.argv = ["lorank", "pretrain", "--data", {str(text)!r}, *{QUICK!r}, "--save-every", "2", "--out", {str(tmp_path / "run")!r}]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main()
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert end.returncode == 2, end.stderr
    assert "Traceback" not in end.stderr and "could not" in end.stderr.strip().splitlines()[-1]


def test_ctrl_c_leaves_a_run_that_resumes(text: Path, tmp_path: Path) -> None:
    import signal

    command = [sys.executable, "-m", "lorank", "pretrain", "--data", text, *QUICK, "--out", tmp_path / "run"]
    command = [*map(str, command), "--steps", "100000", "--log-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in out and "Traceback" not in err
    assert list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['lorank', '--help']; from lorank.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.strip().endswith("[]") and "pretrain" in out


@pytest.mark.parametrize("policy", ["none", "bottlenecks", "bottlenecks+attention", "blocks"])
def test_every_checkpoint_policy_is_a_flag(lorank, policy: str) -> None:
    code, out, err = lorank(
        "pretrain", "--vocab-size", "300", "--sequence-length", "32", "--checkpoint", policy, "--dry-run"
    )
    assert code == 0, err
    assert ("recompute" in out) == (policy != "none")


def test_under_torchrun_only_the_first_process_speaks(lorank, trained: Path, text: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, out, err = lorank("evaluate", trained, "--data", text, "--sequence-length", 32)
    assert (code, out, err) == (0, "", "")
