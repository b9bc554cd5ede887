"""Stopping and resuming changes nothing, whatever stopped the run; a checkpoint is whole or not there."""

import hashlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lorank.distributed.saving import load_weights
from lorank.train.folder import history, last_whole_checkpoint, locked, read_run, write_sums, write_whole
from lorank.train.run import pretrain
from lorank.train.trainer import PretrainTrainer

pytestmark = pytest.mark.usefixtures("quick")
MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def whole(recipe: Any, quick: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Summary and folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return pretrain(recipe(), out), out


@pytest.fixture(scope="module")
def died(recipe: Any, before_step: Any, quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("died") / "run"
    with pytest.raises(MemoryError):
        pretrain(recipe(save_every=3), out, callbacks=[before_step(6)])
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    return out


@pytest.fixture
def killed(died: Path, tmp_path: Path) -> Path:
    """A run that died in its seventh step with checkpoints 3 and 6."""
    return Path(shutil.copytree(died, tmp_path / "run"))


def resume(folder: Path) -> Any:
    return pretrain(read_run(folder), folder, resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "cola-m", "micro_batch_size": 2},
        {"optimizer": "muon"},
        {"precision": "bf16", "method": "dense"},
        {"method": "dense", "model": "qwen3_moe", "shape": MIXTURE},
        {"model": "qwen3_moe", "shape": MIXTURE},
    ],
    ids=["cola", "cola-m accumulating", "muon", "dense bf16", "a mixture", "a converted mixture"],
)
def test_a_killed_run_resumes_with_the_same_losses(
    recipe: Any, losses: Any, before_step: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, out = pretrain(recipe(**changes), tmp_path / "whole"), tmp_path / "killed"
    with pytest.raises(MemoryError):
        pretrain(recipe(**changes), out, callbacks=[before_step(6)])
    assert losses(out)[-1][0] == 6, "steps 5 and 6 are logged and will run again"
    resumed = resume(out)
    assert losses(out) == losses(tmp_path / "whole")
    assert torch.get_float32_matmul_precision() == "high", "`Accelerator.tf32_flops` is the rate of fp32 runs"
    assert whole is not None and resumed.validation_loss_nats_per_token == whole.validation_loss_nats_per_token


def test_a_checkpoint_may_lie_between_two_lines(recipe: Any, before_step: Any, poison: Any, tmp_path: Path) -> None:
    """The lines are the same: means of steps before and after it, auxiliary losses, and steps that were left out."""
    mixture = {"method": "dense", "model": "qwen3_moe", "shape": MIXTURE | {"output_router_logits": True}}
    asked = recipe(**mixture, log_every=3, save_every=5, eval_every=0, on_nan="skip")
    pretrain(asked, tmp_path / "whole", callbacks=[poison(4)])
    with pytest.raises(MemoryError):
        pretrain(asked, tmp_path / "killed", callbacks=[poison(4), before_step(5)])
    resume(tmp_path / "killed")
    timed = ("tokens_per_second", "mfu")
    whole, killed = (
        [{name: value for name, value in one.items() if name not in timed} for one in history(tmp_path / run)]
        for run in ("whole", "killed")
    )
    assert whole == killed and [one["step"] for one in whole] == [3, 6]
    assert whole[1]["skipped_steps"] == 1 and "auxiliary_loss" in whole[1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint(
    sent: signal.Signals, whole: Any, recipe: Any, losses: Any, before_step: Any, tmp_path: Path
) -> None:
    """Ctrl-C, and what Slurm sends before the time is over."""
    out, handler = tmp_path / "run", signal.getsignal(sent)
    interrupt = before_step(2, lambda: os.kill(os.getpid(), sent))
    assert pretrain(recipe(), out, callbacks=[interrupt]) is None
    assert signal.getsignal(sent) is handler
    assert (out / "checkpoint-3/trainer_state.json").exists()
    resume(out)
    assert losses(out) == losses(whole[1])


def test_two_runs_do_not_share_a_folder(recipe: Any, tmp_path: Path) -> None:
    being_saved = tmp_path / ".saving/checkpoint-1"  # by the first
    with locked(tmp_path):
        being_saved.mkdir(parents=True)
        with pytest.raises(ValueError, match=f"^{tmp_path} is in use by another process; wait"):
            pretrain(recipe(), tmp_path)
    assert [*tmp_path.rglob("*")] == [being_saved.parent, being_saved]


def test_trackers_get_the_name_and_the_recipe(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    seen: list[Any] = []
    pretrain(recipe(report_to=["tensorboard"]), tmp_path / "first", callbacks=[Sees(seen)])
    assert (seen[0].run_name, seen[0].project) == ("first", "lorank")
    assert os.environ["WANDB_PROJECT"] == "mine" and os.environ.pop("MLFLOW_EXPERIMENT_NAME") == "lorank"
    log = events.EventAccumulator(str(tmp_path / "events")).Reload()
    text = log.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["recipe"]["lr"] == recipe().lr


class Sees(TrainerCallback):
    def __init__(self, seen: list[Any]):
        self.seen = seen

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.seen.append(args)


def test_a_run_without_checkpoint_starts_again(
    whole: Any, recipe: Any, losses: Any, before_step: Any, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        pretrain(recipe(), tmp_path / "run", callbacks=[before_step(2)])
    resume(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[1])


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_truncated_checkpoint_is_skipped(
    file: str, whole: Any, killed: Path, losses: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = killed / "checkpoint-6" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resume(killed)
    assert losses(killed) == losses(whole[1])
    assert f"checkpoint-6 is skipped: {file}" in caplog.text


def test_an_incomplete_checkpoint_is_skipped(whole: Any, killed: Path, losses: Any) -> None:
    shutil.rmtree(killed / "checkpoint-6")
    (killed / "checkpoint-6").mkdir()
    (killed / "checkpoint-6/model.safetensors").write_bytes(b"half")
    resume(killed)
    assert losses(killed) == losses(whole[1])


def test_half_a_line_of_metrics_is_removed(whole: Any, killed: Path, losses: Any) -> None:
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss_na')
    resume(killed)
    assert losses(killed) == losses(whole[1])


def test_a_full_disk_costs_only_the_new_checkpoint(whole: Any, recipe: Any, before_step: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = before_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard)))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="could not write .*checkpoint-8.*earlier checkpoints are intact"):
            pretrain(recipe(), tmp_path / "run", callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run/checkpoint-8").exists()
    resumed = resume(tmp_path / "run")
    assert resumed.validation_loss_nats_per_token == whole[0].validation_loss_nats_per_token


def test_a_checkpoint_gets_its_name_when_it_is_whole(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves while saving, and that the next start removes it."""
    out, original = tmp_path / "run", PretrainTrainer._save_rng_state

    def cut(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            assert Path(folder).parent.name == ".saving" and (Path(folder) / "model.safetensors").exists()
            assert not (out / "checkpoint-4").exists()
            raise MemoryError("the lights went out")
        original(self, folder)

    monkeypatch.setattr(PretrainTrainer, "_save_rng_state", cut)
    with pytest.raises(MemoryError):
        pretrain(recipe(steps=4, save_every=2), out)
    monkeypatch.undo()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    (out / ".saving/checkpoint-4").mkdir(parents=True)  # a killed process cannot tidy up
    assert resume(out) is not None
    assert not (out / ".saving").exists()


def test_a_run_does_not_continue_with_other_data(
    text: Path, recipe: Any, losses: Any, before_step: Any, tmp_path: Path
) -> None:
    mine, out = tmp_path / "mine.txt", tmp_path / "run"
    shutil.copy(text, mine)
    with pytest.raises(MemoryError):
        pretrain(recipe(data=str(mine), steps=3, save_every=1), out, callbacks=[before_step(2)])
    before = losses(out)
    mine.write_text(text.read_text().replace("line 200", "LINE 200"))
    with pytest.raises(ValueError, match="must be the text with which .* began"):
        resume(out)
    assert losses(out) == before
    shutil.copy(text, mine)
    assert resume(out) is not None


def test_a_run_may_resume_from_another_folder(
    text: Path, recipe: Any, before_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    with pytest.raises(MemoryError):
        pretrain(recipe(data=text.name, steps=3, save_every=1), tmp_path / "run", callbacks=[before_step(2)])
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "run") is not None


def test_a_text_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "one \udce9")
    with pytest.raises(OSError), monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)  # fails after the text was written
        write_whole(path, "two")
    assert path.read_text() == r"one \udce9", "a name that is not UTF-8 is no reason to lose a file"


def full(*_: Any) -> None:
    raise OSError("the disk is full")


def test_a_checkpoint_without_some_weights_is_refused(killed: Path) -> None:
    for folder in ("checkpoint-3", "checkpoint-6"):
        weights = load_file(killed / folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, killed / folder / "model.safetensors", metadata={"format": "pt"})
        (killed / folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"must have all weights of the model, but it lacks model\.norm\.weight"):
        resume(killed)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_may_hold_code_is_refused(killed: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(killed)
    torch.save({"state": {}, "param_groups": [], "x": Bomb()}, killed / "checkpoint-6" / name)
    write_sums(killed / "checkpoint-6")  # who can write the one can write the other
    with pytest.raises(
        ValueError, match=f"checkpoint-6/{name} must hold tensors and numbers alone, but it may hold code"
    ):
        resume(killed)
    assert not (killed / "ran").exists()


@pytest.mark.parametrize("held", [[1, 2], {}], ids=["a list", "nothing"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_holds_something_else_is_named(killed: Path, name: str, held: Any) -> None:
    torch.save(held, killed / "checkpoint-6" / name)
    write_sums(killed / "checkpoint-6")
    with pytest.raises(
        ValueError, match=f"checkpoint-6/{name} must hold what a checkpoint has there.*; remove .*-6 to"
    ):
        resume(killed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_several_processes_wrote_is_named_if_it_is_odd(killed: Path) -> None:
    for folder in ("weights", "optimizer"):
        (killed / "checkpoint-6" / folder).mkdir()
        shutil.copy(killed / "checkpoint-6/model.safetensors", killed / "checkpoint-6" / folder)
    (killed / "checkpoint-6/optimizer.json").write_text("{}")
    write_sums(killed / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6/optimizer.json must hold what a checkpoint has there"):
        resume(killed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_missing_part_of_a_weight_is_named(tmp_path: Path) -> None:
    """Of the first process; the second one has written where its own begins. Read as they are, the first rows would stay as drawn."""
    (tmp_path / "weights").mkdir()
    about = {"DCP_SHARDING_INFO": json.dumps({"weight": {"saved_offsets": [4, 0]}})}
    save_file({"weight": torch.ones(4, 3)}, tmp_path / "weights/shard-00002.safetensors", metadata=about)
    with pytest.raises(ValueError, match="weights must have all parts of weight"):
        load_weights(torch.nn.Linear(3, 8, bias=False), tmp_path)
    about = {"DCP_SHARDING_INFO": json.dumps({"weight": {"saved_offsets": [0, 0]}})}
    save_file({"weight": torch.ones(4, 3)}, tmp_path / "weights/shard-00001.safetensors", metadata=about)
    assert load_weights(layer := torch.nn.Linear(3, 8, bias=False), tmp_path) == [] and layer.weight.eq(1).all()


def test_weights_of_another_shape_are_named(killed: Path) -> None:
    weights = {
        name: tensor[:1].clone() for name, tensor in load_file(killed / "checkpoint-6/model.safetensors").items()
    }
    save_file(weights, killed / "checkpoint-6/model.safetensors", metadata={"format": "pt"})
    write_sums(killed / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6/model.safetensors must hold what a checkpoint has there"):
        resume(killed)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        3,
        {"global_step": "6"},
        {"global_step": 6.5},
        {"global_step": 5},
        {"log_history": 3},
        {"train_batch_size": None},
        {"stateful_callbacks": {}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_state_that_is_none_is_skipped(killed: Path, wrong: Any) -> None:
    file = killed / "checkpoint-6/trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong} if isinstance(wrong, dict) else wrong))
    write_sums(killed / "checkpoint-6")
    assert last_whole_checkpoint(killed) == killed / "checkpoint-3"


def test_a_state_of_brackets_is_skipped(killed: Path) -> None:
    (killed / "checkpoint-6/trainer_state.json").write_text("[" * 100_000)
    assert last_whole_checkpoint(killed) == killed / "checkpoint-3"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "SHA256SUMS"]
)
def test_a_changed_byte_is_found(
    file: str, whole: Any, killed: Path, losses: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In a file that can still be read: weights, moments, or a number in JSON. The checkpoint before is used."""
    path = killed / "checkpoint-6" / file
    content = bytearray(path.read_bytes())
    at = content.rindex(b"6") if file.endswith("json") else len(content) * 2 // 3
    content[at] ^= 1
    path.write_bytes(content)
    assert last_whole_checkpoint(killed) == killed / "checkpoint-3"
    assert "checkpoint-6 is skipped: " in caplog.text
    if file == "model.safetensors":
        assert "model.safetensors is not as it was written" in caplog.text
        resume(killed)
        assert losses(killed) == losses(whole[1])


def test_a_run_is_found_from_another_folder(killed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through a link, and by a path that leads up; a name in the checksums may not, and is no file of the checkpoint."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").symlink_to(killed)
    monkeypatch.chdir(elsewhere)
    assert last_whole_checkpoint(Path("../linked")) == Path("../linked/checkpoint-6")
    for name in ("../checkpoint-3/model.safetensors", killed / "checkpoint-3/model.safetensors"):
        write_sums(killed / "checkpoint-6")
        with (killed / "checkpoint-6/SHA256SUMS").open("a") as sums:
            sums.write(
                f"{hashlib.sha256((killed / 'checkpoint-3/model.safetensors').read_bytes()).hexdigest()}  {name}\n"
            )
        assert last_whole_checkpoint(killed) == killed / "checkpoint-3"


def test_a_checkpoint_without_checksums_is_used(killed: Path) -> None:
    """As those of lorank 0.3."""
    (killed / "checkpoint-6/SHA256SUMS").unlink()
    assert last_whole_checkpoint(killed) == killed / "checkpoint-6"


def test_a_run_with_only_damaged_checkpoints_does_not_restart(killed: Path) -> None:
    for folder in killed.glob("checkpoint-*"):
        (folder / "optimizer.pt").write_bytes(b"")
    before = sorted(killed.rglob("*"))
    with pytest.raises(
        ValueError, match="has no checkpoint that is whole .in the newest, optimizer.pt is missing or damaged"
    ):
        resume(killed)
    assert before == sorted(killed.rglob("*"))
