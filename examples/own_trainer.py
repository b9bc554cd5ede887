"""A method in a Trainer script of your own: two lines more than without it.

python examples/own_trainer.py [METHOD]          (or: torchrun --nproc-per-node 8 examples/own_trainer.py)
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import lorank

method = sys.argv[1] if len(sys.argv) > 1 else "cola"
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
model = lorank.convert(AutoModelForCausalLM.from_config(shape), method)  # the one line that changes the model

text = Path(__file__).read_bytes()
rows = [{"input_ids": (ids := list(text[i : i + 64])), "labels": ids} for i in range(0, len(text) - 64, 8)]


class MethodTrainer(Trainer):
    """For methods that act between steps; CoLA, SLTrain, CR-Net and MASA need the plain Trainer only."""

    def create_optimizer(self, *args, **kwargs):
        super().create_optimizer(*args, **kwargs)
        lorank.step_hook(self.model, self.optimizer, steps=self.args.max_steps, seed=self.args.seed)
        return self.optimizer


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=30, learning_rate=3e-3, logging_steps=10, report_to="none", save_strategy="no"
    )
    MethodTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows)).train()
    model.save_pretrained(f"{folder}/model")
    AutoModelForCausalLM.from_pretrained(f"{folder}/model")
