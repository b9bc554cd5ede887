"""A teacher's predictions as a term of the loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorank.train.distil import Teacher, divergence
from lorank.train.folder import read_recipe
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.saved import load_model


def test_the_divergence_is_that_of_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(2, 4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2, -100, 3], [1, 2, 3, 4]])  # three and three predicted, less the one that is ignored
    wanted = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=p[row, at]), torch.distributions.Categorical(logits=q[row, at])
        )
        for row, at in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    )
    torch.testing.assert_close(divergence(q, p, labels, 7).double(), wanted / 7, rtol=1e-5, atol=0)
    own = q.clone().requires_grad_()
    same = divergence(own, q, labels, 7)
    same.backward()
    assert same.abs() < 1e-6 and own.grad.abs().max() < 1e-6  # a student equal to its teacher learns nothing


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distil") / "parent"
    text = folder.with_suffix(".txt")
    text.write_text("".join(f"the {i}th brown fox counts {i * i} lazy dogs\n" for i in range(200)))
    recipe = Recipe(
        method="dense",
        data=str(text),
        tokenizer="bytes",
        sequence_length=32,
        batch_size=4,
        steps=8,
        lr=1e-2,
        save_every=0,
    )
    pretrain(recipe, folder, on_cpu=True)
    return folder


def test_a_student_comes_nearer_to_its_teacher(
    parent: Path, tmp_path: Path, in_this_process: Callable[..., tuple[int, str, str]]
) -> None:
    text = parent.with_suffix(".txt")
    apart = {}
    for weight in ("1e-6", "20"):
        flags = ("--data", text, "--tokenizer", parent, "--sequence-length", 32, "--batch-size", 4, "--steps", 8)
        weight = f"{float(weight):f}"
        code, _, error = in_this_process(
            "pretrain", "--method", "low-rank", "--distil", f"{parent}:{weight}", *flags, "--out", tmp_path / weight
        )
        assert code == 0, error
        assert read_recipe(tmp_path / weight / "recipe.yaml").distil == f"{parent}:{weight}"
        ids = torch.randint(97, 122, (4, 32), generator=torch.Generator().manual_seed(0))
        student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / weight, parent))
        with torch.no_grad():
            apart[weight] = divergence(student(ids).logits, teacher(ids).logits, ids, 1).item()
    assert apart["20.000000"] < 0.9 * apart["0.000001"]


def test_what_teaches_nothing_is_refused(parent: Path, tmp_path: Path) -> None:
    student, tokenizer = load_model(str(parent))
    with pytest.raises(ValueError, match="with a positive weight, got"):
        Teacher(Recipe(distil=f"{parent}:0"), student, tokenizer)
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="distil must be a model with its tokenizer, .* has none"):
        Teacher(Recipe(distil=str(tmp_path)), student, tokenizer)
    other, _ = load_model(str(parent))
    other.resize_token_embeddings(len(tokenizer) + 40)
    with pytest.raises(ValueError, match="must be a model with the student's vocabulary"):
        Teacher(Recipe(distil=str(parent)), other, tokenizer)
