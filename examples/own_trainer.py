"""A method in a Trainer script of your own; it saves checkpoints and, started again, goes on from the last.

python examples/own_trainer.py [METHOD [FOLDER]]     (or: torchrun --nproc-per-node 8 examples/own_trainer.py METHOD FOLDER)

METHOD is one such as cola, relora, switchlora, or a low-rank optimizer: galore, fira, dct-adamw, trion.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import lorank
from lorank.table import find
from lorank.optim import find_optimizer, low_rank_groups


class MethodTrainer(Trainer):
    """For methods with an optimizer or a learning rate of their own, or that act between steps, and for low-rank optimizers.

    CoLA, SLTrain, CR-Net and MASA need the plain Trainer only.
    """

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            trained = model or self.model
            if low_rank:
                self.optimizer = low_rank(low_rank_groups(trained, 16), lr=self.args.learning_rate)
            else:
                AdamW = method.adamw or torch.optim.AdamW  # SwitchLoRA has one of its own
                self.optimizer = AdamW(trained.parameters(), lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """`num_training_steps` is right also where epochs are counted and `args.max_steps` is -1."""
        if self.lr_scheduler is None:
            made = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper keeps it there
            self.hook = lorank.step_hook(self.model, made, steps=num_training_steps, seed=self.args.seed)
            warmup = self.args.get_warmup_steps(num_training_steps)
            multiplier = lorank.lr_schedule(self.model, steps=num_training_steps, warmup_steps=warmup)
            self.lr_scheduler = LambdaLR(self.optimizer, multiplier)
        return self.lr_scheduler

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.hook and self.args.should_save:
            save_file(self.hook.state_dict(), f"{output_dir}/hook.safetensors")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.hook and checkpoint:
            self.hook.load_state_dict(load_file(f"{checkpoint}/hook.safetensors"))


name = sys.argv[1] if len(sys.argv) > 1 else "cola"
temporary = tempfile.TemporaryDirectory()
folder = sys.argv[2] if len(sys.argv) > 2 else temporary.name

set_seed(0)
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)
if not (low_rank := find_optimizer(name)):  # with a low-rank optimizer the weights stay as they are
    method = find_method(name)()
    lorank.convert(model, method)  # the one line that changes the model

text = Path(__file__).read_bytes()
rows = [{"input_ids": (ids := list(text[i : i + 64])), "labels": ids} for i in range(0, len(text) - 64, 16)]
arguments = TrainingArguments(
    output_dir=folder,
    num_train_epochs=1,
    learning_rate=1e-2 if low_rank else 3e-3,
    warmup_steps=3,
    save_steps=10,
    logging_steps=10,
    report_to="none",
)
trainer = MethodTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
model.save_pretrained(f"{folder}/model")
AutoModelForCausalLM.from_pretrained(f"{folder}/model")
