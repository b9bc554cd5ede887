"""A method in a Trainer script of your own. It saves checkpoints and, started again, continues from the last one.

python examples/own_trainer.py [METHOD [FOLDER]]     (or: torchrun --nproc-per-node 8 examples/own_trainer.py METHOD FOLDER)

METHOD: cola, relora, switchlora, galore, ... or a combination: cola+galore
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import lorank
from lorank.table import find


class MethodTrainer(Trainer):
    """For methods that bring an optimizer or a learning rate, or act between steps.

    CoLA, SLTrain, CR-Net and MASA need only the plain Trainer.
    """

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = lorank.optimizer(model or self.model, *mover, lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """`num_training_steps` is right even if epochs are counted and `args.max_steps` is -1."""
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


names = (sys.argv[1] if len(sys.argv) > 1 else "cola").split("+")
structure = [name for name in names if find(name).key == "method"]  # what the weights are
mover = [name for name in names if find(name).key == "optimizer"]  # how they move
temporary = tempfile.TemporaryDirectory()
folder = sys.argv[2] if len(sys.argv) > 2 else temporary.name

set_seed(0)
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)
if structure:
    lorank.convert(model, structure[0])  # the one line that changes the model

text = Path(__file__).read_bytes()
rows = [{"input_ids": (ids := list(text[i : i + 64])), "labels": ids} for i in range(0, len(text) - 64, 16)]
arguments = TrainingArguments(
    output_dir=folder,
    num_train_epochs=1,
    learning_rate=1e-2 if mover else 3e-3,
    warmup_steps=3,
    save_steps=10,
    logging_steps=10,
    report_to="none",
)
trainer = MethodTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
model.save_pretrained(f"{folder}/model")
AutoModelForCausalLM.from_pretrained(f"{folder}/model")
