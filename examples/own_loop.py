"""A method in a training loop of your own: convert, build an optimizer, let the method act between its steps.

python examples/own_loop.py [METHOD]          METHOD: cola, relora, switchlora, ... or a low-rank optimizer: galore, trion, ...
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lorank
from lorank.table import find
from lorank.optim import find_optimizer, low_rank_groups

STEPS = 30
name = sys.argv[1] if len(sys.argv) > 1 else "cola"

torch.manual_seed(0)
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape).train()
if low_rank := find_optimizer(name):  # the weights stay as they are, their optimizer works at rank 16
    optimizer = low_rank(low_rank_groups(model, 16), lr=1e-2)
else:
    method = find_method(name)()
    lorank.convert(model, method)
    AdamW = method.adamw or torch.optim.AdamW  # SwitchLoRA has one of its own
    optimizer = AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lorank.lr_schedule(model, steps=STEPS, warmup_steps=3))
lorank.step_hook(
    model, optimizer, steps=STEPS
)  # merges for ReLoRA, swaps for SST; nothing for CoLA and for dense weights

text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
for step in range(STEPS):
    starts = torch.randint(len(text) - 65, (8,))
    batch = torch.stack([text[start : start + 65] for start in starts])
    loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step}  loss {loss.item():.3f}")
