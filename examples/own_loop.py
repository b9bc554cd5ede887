"""A method in a training loop of your own: convert, make the optimizer, let the method act between its steps.

python examples/own_loop.py [METHOD]     METHOD: cola, relora, switchlora, galore, ... or a combination: cola+galore
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lorank
from lorank.table import find

STEPS = 30
names = (sys.argv[1] if len(sys.argv) > 1 else "cola").split("+")
structure = [name for name in names if find(name).key == "method"]  # what the weights are
mover = [name for name in names if find(name).key == "optimizer"]  # how they move
if len(names) > len(structure + mover):
    sys.exit(
        "a loop of your own makes EGGROLL's gradients with lorank.evolution.eggroll.Eggroll; see docs/methods/eggroll.md"
    )

torch.manual_seed(0)
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape).train()
if structure:
    lorank.convert(model, structure[0])
optimizer = lorank.optimizer(model, *mover, lr=1e-2 if mover else 3e-3)  # AdamW unless a method says otherwise
rates = lorank.lr_schedule(model, steps=STEPS, warmup_steps=3, optimizer=optimizer)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
lorank.step_hook(model, optimizer, steps=STEPS)  # ReLoRA merges, SST draws anew; for most methods it does nothing

text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
for step in range(STEPS):
    starts = torch.randint(len(text) - 64, (8,))
    batch = torch.stack([text[start : start + 64] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss  # which shifts the labels itself
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step}  loss {loss.item():.3f}")
