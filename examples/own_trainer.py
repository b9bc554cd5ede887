"""A method in a Trainer script of your own. It saves checkpoints and, started again, continues from the last one.

python examples/own_trainer.py [METHOD [FOLDER]]     (or: torchrun --nproc-per-node 8 examples/own_trainer.py METHOD FOLDER)

METHOD: cola, relora, switchlora, galore, ... or a combination: cola+galore
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import lorank
from lorank.table import find


class MethodTrainer(lorank.TrainerMixin, Trainer):
    """For methods that bring an optimizer or a learning rate, or act between steps.

    CoLA, SLTrain, CR-Net and MASA need only the plain Trainer.
    """


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
rows = [{"input_ids": (ids := list(text[i : i + 64])), "labels": ids} for i in range(0, len(text) - 64, 8)]
arguments = TrainingArguments(
    output_dir=folder,
    num_train_epochs=1,
    learning_rate=1e-2 if mover else 3e-3,
    warmup_steps=3,
    save_steps=10,
    logging_steps=10,
    report_to="none",
)
trainer = MethodTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_list(rows), moved_by=mover[0] if mover else None
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
model.save_pretrained(f"{folder}/model")
AutoModelForCausalLM.from_pretrained(f"{folder}/model")
