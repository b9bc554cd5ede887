"""The example for several nodes, shrunk to two processes of this machine: the commands of examples/slurm with a tiny model and text.

    python benchmarks/multi_node.py

The Slurm script is run by bash, with an srun and an scontrol that stand for Slurm's, first from the beginning and then to go on. accelerate gets
accelerate.yaml with the numbers of machines and processes changed. Losses are compared with those of one process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "slurm"
SMALL = "--size tiny --rank 32 --data text.txt --tokenizer bytes --sequence-length 32 --batch-size 4 --micro-batch-size 2 --warmup-steps 1"
SMALL += " --set vocab_size=300 --set eval_every=0 --set save_every=2 --set log_every=1 --set eval_tokens=64"
SMALL += " --set shape.hidden_size=32 --set shape.intermediate_size=64 --set shape.num_attention_heads=2"
SMALL += " --set shape.num_key_value_heads=2 --set shape.num_hidden_layers=2 --set documents=packed"


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss_nats_per_token"] for record in records if "loss_nats_per_token" in record]


def start(folder: Path, command: list[str], **env: str) -> None:
    given = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env={**given, "CUDA_VISIBLE_DEVICES": "", **env}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def shrunk(script: str, steps: int) -> str:
    """The Slurm script for two processes of one node, and a tiny model."""
    small = script.replace("--nproc-per-node 8", "--nproc-per-node 2").replace(
        "cola-7b --out", f"cola-7b {SMALL} --steps {steps} --out"
    )
    assert small.count("--nproc-per-node 2") == 1 and SMALL in small
    return small.replace('--resume "$RUN"', f'--resume "$RUN" --steps {steps}')


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("".join(f"line {i}: {i * i} lazy dogs\n" for i in range(300)))
        program(folder / "bin" / "srun", '#!/bin/sh\nexec "$@"\n')
        program(folder / "bin" / "scontrol", "#!/bin/sh\necho localhost\n")
        start(
            folder,
            [sys.executable, "-m", "lorank", "pretrain", "cola-7b", *SMALL.split(), "--steps", "4", "--out", "one"],
        )
        job = {
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1",
            "SLURM_JOB_ID": "1",
        }
        script = (EXAMPLE / "cola-m-7b.slurm").read_text()
        program(folder / "job.slurm", shrunk(script, 4))
        start(folder, ["bash", "job.slurm"], **job, RUN=str(folder / "slurm"))
        program(folder / "job.slurm", shrunk(script, 6))
        start(folder, ["bash", "job.slurm"], **job, RUN=str(folder / "slurm"))
        config = yaml.safe_load((EXAMPLE / "accelerate.yaml").read_text())
        (folder / "accelerate.yaml").write_text(
            yaml.safe_dump({**config, "num_machines": 1, "num_processes": 2, "use_cpu": True})
        )
        launch = [
            "accelerate",
            "launch",
            "--config_file",
            "accelerate.yaml",
            "--machine_rank",
            "0",
            "-m",
            "lorank",
            "pretrain",
        ]
        start(folder, [*launch, "cola-7b", *SMALL.split(), "--steps", "4", "--out", "accelerate"])
        runs = {name: losses(folder / name) for name in ("one", "slurm", "accelerate")}
        engines = {name: json.loads((folder / name / "run.json").read_text())["engine"] for name in runs}
    for name, found in runs.items():
        print(f"{name:10} {engines[name]:16} {'  '.join(f'{loss:.4f}' for loss in found)}")
    print(
        "the script was started twice, the second time for two steps more; bf16-pure, so losses agree within its precision"
    )


if __name__ == "__main__":
    main()
