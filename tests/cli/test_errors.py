"""Bad input and failing disks: one sentence and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked_processes")

PLAN = ["plan", "--size", "tiny", "--set", "vocab_size=300", "--sequence-length", "32", "--method", "dense,cola-m"]

BAD = {
    "an unknown accelerator": ([*PLAN, "--accelerator", "h101"], "did you mean 'h100'"),
    "an empty set of methods": (["plan", "--method", ""], "no method to plan for"),
    "an unknown method to plan": (["plan", "--method", "colla"], "did you mean 'cola'"),
    "an empty set of sizes": (["plan", "--size", ""], "unknown size ''"),
    "an unknown size to plan": (["plan", "--size", "61m"], "did you mean '60m'"),
    "a budget below one step": ([*PLAN, "--tokens", "5"], "tokens must be at least one step's"),
    "a budget of nothing": (
        [*PLAN, "--tokens", "0"],
        "tokens must be a number of tokens such as 1.1B or 819200, got '0'",
    ),
    "a budget in words": ([*PLAN, "--tokens", "many"], "got 'many'"),
    "memory that nothing fits in": (
        [*PLAN, "--fits", "0.001"],
        "No requested model fits in 0.001 GiB. The smallest, cola-m tiny, needs",
    ),
    "negative memory": ([*PLAN, "--fits", "-1"], "must be a positive number of GiB"),
    "more than the peak rate": ([*PLAN, "--utilisation", "2"], "utilisation must be in (0, 1]"),
    "a price below nothing": ([*PLAN, "--price", "-1"], "dollars_per_hour must be a positive number, got -1.0"),
    "devices that divide no batch": ([*PLAN, "--devices", "7"], "7 devices with micro-batches of 16"),
    "an unknown paper": (["papers", "colla"], "did you mean 'cola'"),
    "a recipe that is not there": (["plan", "recipes/nowhere.yaml"], "recipe recipes/nowhere.yaml does not exist"),
    "an option of no method": (
        [*PLAN, "--option", "update_gap=3"],
        "no method here (dense, cola-m) has the setting 'update_gap'",
    ),
    "a flag that is a command now": (["plan", "--paper", "cola"], "no such option: --paper; use lorank papers NAME"),
    "a flag for the recipe": (
        ["pretrain", "--recipe", "cola-60m"],
        "no such option: --recipe; use its name without a flag",
    ),
    "a setting with entries": (["pretrain", "--shape", "8"], "no such option: --shape; use --set shape.NAME=VALUE"),
    "a setting of several values in compare": (["compare", "--seed", "3"], "no such option: --seed; use --seeds"),
    "a setting that plan asks for otherwise": ([*PLAN, "--set", "size=1b"], "use --size"),
    "an unknown setting": (["pretrain", "--set", "weight_dekay=1"], "did you mean 'weight_decay'"),
    "heads that share no keys": (
        [*PLAN, "--set", "shape.num_attention_heads=2"],
        "the model cannot be run: num_attention_heads must be a multiple of num_key_value_heads=4, got 2",
    ),
    "an unknown entry of the shape": (
        ["pretrain", "--set", "shape.hidden_sise=8", "--dry-run"],
        "did you mean 'hidden_size'",
    ),
    "two formats at once": (["plan", "--json", "--csv"], "give --json or --csv, not both"),
    "a rank beyond reason": (
        [*PLAN, "--rank", "-3"],
        "rank must be a positive integer, a fraction of the width in (0, 1]",
    ),
    "a missing file": (["pretrain", "--data", "nowhere.txt"], "nowhere.txt"),
    "an empty corpus": (["pretrain", "--data", "{empty}", "{quick}"], "empty"),
    "a corpus shorter than a sequence": (["pretrain", "--data", "{short}", "{quick}"], "sequence_length"),
    "an unknown file type": (["pretrain", "--data", "{odd}", "{quick}"], "odd.xyz"),
    "an unknown method": (["pretrain", "--method", "colla"], "did you mean 'cola'"),
    "an unknown size": (["pretrain", "--size", "61m"], "did you mean '60m'"),
    "an unknown model": (["pretrain", "--model", "./nothing"], "./nothing"),
    "a converted model": (["pretrain", "--model", "{trained}", "--data", "{text}", "{quick}"], "already converted"),
    "a negative rank": (
        ["pretrain", "--rank", "-3", "--data", "{text}", "{quick}"],
        "rank must be a positive integer, a fraction of the width in (0, 1]",
    ),
    "a rank that is no number": (["pretrain", "--rank", "few"], "'few'"),
    "a field the method lacks": (["pretrain", "--option", "sparsity=1", "--data", "{text}", "{quick}"], "sparsity"),
    "an option without value": (["pretrain", "--option", "sparsity"], "NAME=VALUE"),
    "a variant that does not exist": (
        ["pretrain", "--option", "nonlinearity=some", "--data", "{text}", "{quick}"],
        "nonlinearity",
    ),
    "a pattern without match": (["pretrain", "--targets", "conv", "--data", "{text}", "{quick}"], "'conv'"),
    "a rank for dense": (["pretrain", "--method", "dense", "--rank", "4", "--data", "{text}", "{quick}"], "dense"),
    "broken YAML": (["pretrain", "{broken}"], "not valid YAML"),
    "a missing recipe": (["pretrain", "absent.yaml"], "absent.yaml"),
    "an unknown flag": (["pretrain", "--learning-rate", "1"], "--learning-rate"),
    "an unknown command": (["pretrian"], "unknown command 'pretrian'; did you mean 'pretrain'"),
    "an unwritable place": (["pretrain", "--data", "{text}", "{quick}", "--out", "{text}/run"], "fox.txt/run"),
    "a run that is there": (
        ["pretrain", "--data", "{text}", "{quick}", "--out", "{trained}"],
        "already contains a run",
    ),
    "nothing to resume": (["pretrain", "--resume", "nowhere"], "nowhere"),
    "resume with other settings": (["pretrain", "--resume", "{trained}", "--lr", "1"], "--lr"),
    "sequences beyond the model": (["pretrain", "--model", "gpt2", "--sequence-length", "2048"], "1024 positions"),
    "a tracker that is not installed": (
        ["pretrain", "--data", "{text}", "{quick}", "--set", "report_to=wandb"],
        "wandb",
    ),
    "evaluate without a model": (["evaluate", "{folder}"], "has no config.json"),
    "evaluate tasks on a text": (
        ["evaluate", "{trained}", "--tasks", "x.yaml", "--data", "{text}"],
        "leave out --data",
    ),
    "evaluate on nothing": (["evaluate", "{trained}", "--data", "nowhere.txt"], "nowhere.txt"),
    "evaluate on too little": (["evaluate", "{trained}", "--data", "{short}"], "sequence_length"),
    "evaluate what is broken": (["evaluate", "{corrupt}"], "no model could be loaded"),
    "generate without a model": (["generate", "{folder}"], "has no config.json"),
    "generate at a negative temperature": (
        ["generate", "{trained}", "--temperature", "-1"],
        "temperature must be 0 (greedy) or from 0.001 to 1000, got -1.0",
    ),
    "generate nothing": (["generate", "{trained}", "--max-new-tokens", "0"], "max-new-tokens"),
    "export what no dense model equals": (
        ["export", "{trained}", "--out", "{folder}/x"],
        "export the layers as they are with --format trained",
    ),
    "export to its own folder": (["export", "{trained}", "--out", "{trained}"], "must be another folder"),
    "export to a file": (["export", "{trained}", "--out", "{text}"], "must be a folder, got"),
    "a licence in words": (["export", "{trained}", "--license", "Apache 2"], "license must be an identifier such as"),
    "export nothing": (["export", "{folder}"], "has no config.json"),
    "a folder as recipe": (["pretrain", "{folder}"], "is a folder; give a YAML file"),
    "a file as folder": (["pretrain", "--data", "{text}", "{quick}", "--out", "{text}"], "--out must be a folder"),
    "a rate without end": (["pretrain", "--lr", "inf"], "lr must be a positive number, got inf"),
    "a clip that is none": (["pretrain", "--set", "clip=nan"], "clip must be a number of at least 0, got nan"),
    "a decay without end": (
        ["pretrain", "--set", "weight_decay=inf"],
        "weight_decay must be a number of at least 0, got inf",
    ),
    "evaluation on fewer than no tokens": (
        ["pretrain", "--set", "eval_tokens=-5"],
        "eval_tokens must be a positive integer or None, got -5",
    ),
    "no vocabulary": (["pretrain", "--set", "vocab_size=0"], "vocab_size must be a positive integer"),
    "a vocabulary smaller than the tokenizer's": (
        [
            "pretrain",
            "--data",
            "{text}",
            "--tokenizer",
            "{trained}",
            "--steps",
            "2",
            "--warmup-steps",
            "1",
            "--set",
            "vocab_size=100",
        ],
        "leave it out to use all of them",
    ),
    "no name of data": (["pretrain", "--data", ""], "data must not be empty"),
    "a seed too large": (["pretrain", "--seed", "4294967296"], "seed must be an integer in [0, 4294967296)"),
    "evaluate with a negative seed": (["evaluate", "{trained}", "--seed", "-1"], "--seed"),
    "generate with a huge seed": (["generate", "{trained}", "--seed", "99999999999999999999"], "--seed"),
    "a demo in a file": (["demo", "--out", "{text}"], "is a file"),
    "a demo where one is": (["demo", "--out", "{demo}"], "already holds a run"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    lorank, trained: Path, text: Path, quick: list[str], tmp_path: Path, arguments: list[str], words: str
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
    whole = [each for argument in arguments for each in (quick if argument == "{quick}" else [argument])]
    code, _, err = lorank(*(argument.format(**places) for argument in whole))
    assert code == 2
    assert words in err and "Traceback" not in err
    assert len(err.splitlines()) == 1, "one sentence"
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_sentence(text: Path, quick: list[str], tmp_path: Path) -> None:
    """Files may not grow beyond 50 kB, as on a disk that fills: the run ends in one sentence, not in a traceback."""
    code = f"""
import resource, sys
from lorank.cli import main
import transformers
sys.argv = ["lorank", "pretrain", "--data", {str(text)!r}, *{quick!r}, "--save-every", "2", "--out", {str(tmp_path / "run")!r}]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main()
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert end.returncode == 2, end.stderr
    assert "Traceback" not in end.stderr and "could not" in end.stderr.strip().splitlines()[-1]
