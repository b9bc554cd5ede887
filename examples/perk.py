"""PERK: write facts into an adapter by four gradient steps, then answer without the facts.

python examples/perk.py [STEPS]     (250 steps take twenty seconds on a CPU)

A text is 8 facts, each a segment: KEY is VALUE. A question asks for the value of a key, in other words than the facts do, and the model
answers without the text. Four steps from an untrained adapter tell it something; from a start that was learned for this, more.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorank
from lorank.adapters.perk import called, parameters_of, written

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 250
RATE = 0.05
INNER, KEPT, KEYS, VALUES, FACTS = 4, 2, 16, 8, 8
IS, WHAT = KEYS + VALUES, KEYS + VALUES + 1

torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=WHAT + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)
shape._attn_implementation = "eager"  # it can be differentiated twice
model = LlamaForCausalLM(shape)
draw = torch.Generator().manual_seed(1)


def text_and_questions(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Facts KEY IS VALUE and questions WHAT KEY VALUE, each [8, 3]."""
    keys = torch.randperm(KEYS, generator=draw)[:FACTS]
    values = KEYS + torch.randint(VALUES, (FACTS,), generator=draw)
    facts = torch.stack([keys, torch.full_like(keys, IS), values], 1)
    return facts, torch.stack([torch.full_like(keys, WHAT), keys, values], 1)


def answer(phi, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the last token, and how often it is the most likely value."""
    logits = called(model, phi, input_ids=rows[:, :2]).logits[:, -1]
    return torch.nn.functional.cross_entropy(logits, rows[:, 2]), (logits.argmax(1) == rows[:, 2]).float().mean()


def after_writing(facts: torch.Tensor, questions: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    phi = written(lambda phi: answer(phi, facts)[0], start, rates, kept=kept)
    return answer(phi, questions)


def right() -> float:
    """Share of 40 texts' questions; the same texts in every call."""
    draw = torch.Generator().manual_seed(2)
    return sum(after_writing(*text_and_questions(draw), kept=0)[1].item() for _ in range(40)) / 40


# A base that knows some facts, and both ways to say them.
rows = torch.cat([text for _ in range(2) for text in text_and_questions(draw)])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(30):
    optimizer.zero_grad()
    answer({}, rows)[0].backward()
    optimizer.step()

lorank.convert(model, lorank.LoRA(rank=16, alpha=16, rank_stabilised=True))
start = parameters_of(model)
rates = [{name: torch.tensor(RATE, requires_grad=True) for name in start} for _ in range(INNER)]
learned = [*start.values(), *(rate for step in rates for rate in step.values())]
optimizer = torch.optim.Adam(learned, lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
print(f"right answers: {right():.0%} from an untrained adapter, {1 / VALUES:.0%} by chance")
for step in range(1, STEPS + 1):
    loss, _ = after_writing(*text_and_questions(draw), kept=KEPT)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss of answers {loss.item():.3f}")
print(f"right answers: {right():.0%} from the start that was learned")
