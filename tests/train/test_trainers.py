"""Trainers of other libraries, as they are, with adapters: transformers' Trainer and TRL's SFTTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorank
from lorank.train.data.tokenizers import byte_tokenizer

COMMON: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


def check(trainer: Any, before: dict[str, Tensor], checkpoint: Path, tokens: Tensor) -> None:
    """The frozen weights are as they were, what was added has moved, and the checkpoint is the model."""
    model = trainer.model
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_transformers_trainer_trains_an_adapter(small: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = lorank.convert(small("llama"), "lora")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(6, 1)]
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **COMMON), train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    check(trainer, before, tmp_path / "checkpoint-3", tokens)


def test_it_takes_an_optimizer_whose_method_acts_between_steps(small: Any, tokens: Tensor, tmp_path: Path) -> None:
    """Once for each step, not for each micro-batch."""
    model = lorank.convert(small("llama"), "smora")
    optimizer = lorank.optimizer(model, lr=1e-2)
    hook = lorank.step_hook(model, optimizer, steps=3)
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(6, 1)]
    arguments = TrainingArguments(str(tmp_path), **COMMON)
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    assert hook is not None and hook.step == 3
    steps = torch.stack([m.steps for name, m in model.named_modules() if name.endswith("router")])
    assert steps.any() and steps.abs().max() <= 3


@pytest.mark.filterwarnings("default")  # TRL's are its own
def test_sft_trainer_trains_adapters(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}

    class Mine(lorank.TrainerMixin, trl.SFTTrainer):
        """For what acts between steps."""

    for method, kind in (("lora", trl.SFTTrainer), ("osft", Mine)):
        torch.manual_seed(0)
        model = lorank.convert(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)), method)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        args = trl.SFTConfig(str(tmp_path / method), **COMMON, max_length=32, bf16=False)
        rows = Dataset.from_list([{"prompt": f"{i} and {i} is ", "completion": f"{2 * i}"} for i in range(16)])
        trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        check(trainer, before, tmp_path / method / "checkpoint-3", torch.arange(20)[None])
        assert method == "lora" or trainer.hook.step == 3
