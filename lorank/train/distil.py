"""A teacher: a trained model whose predictions are a term of the loss, besides the text's own next tokens.

    loss = −1/N Σ log q(next token)  +  w/N Σ KL(p ‖ q)      p, q the teacher's and the student's distributions over the vocabulary

Both sums are over the N predicted tokens, in nats. The teacher is frozen and runs forward once for each batch.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at temperature 1. A student that is
an integer base with a low-rank correction, distilled from its float parent, is what Chai et al., INT2.1, arXiv 2306.08162,
repair; their loss has other terms that are not published in detail.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorank.loss import IGNORED
from lorank.train.data.sources import weighted
from lorank.train.recipe import Recipe
from lorank.train.saved import NoTokenizer, load_model


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, items: Tensor | int) -> Tensor:
    """Σ KL(p ‖ q) / items over positions whose next label [b, n] counts, from logits [b, n, V], in fp32."""
    counted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(student.device) != IGNORED
    q, p = student[counted].float().log_softmax(-1), teacher[counted].float().log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True) / items


class Teacher:
    """The teacher of a recipe's run.

    Raises:
        ValueError: there is no such model, its weight is not positive, or it reads other tokens than the student.
    """

    def __init__(self, recipe: Recipe, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        assert recipe.distil is not None
        name, self.weight = weighted(recipe.distil)
        if not self.weight > 0:
            raise ValueError(f"distil must be TEACHER or TEACHER:WEIGHT with a positive weight, got {recipe.distil!r}")
        try:
            self.model, own = load_model(name)
        except NoTokenizer:
            raise ValueError(
                f"distil must be a model with its tokenizer, by which it is known to read the student's tokens, and {name!r} has none that "
                "can be read; save the run's tokenizer there, if it is the same"
            ) from None
        rows: list[int] = [one.get_output_embeddings().weight.shape[0] for one in (student, self.model)]
        if own.get_vocab() != tokenizer.get_vocab() or rows[0] != rows[1]:
            raise ValueError(
                f"distil must be a model with the student's vocabulary, got {name!r}: a distribution over other tokens teaches nothing; "
                "give the run the teacher's tokenizer, or start from the teacher (--start-from)"
            )
        self.model.requires_grad_(False)

    def term(self, logits: Tensor, inputs: Mapping[str, Any], items: Tensor | int) -> Tensor:
        """w Σ KL(p ‖ q) / items of a batch, from the student's logits."""
        self.model.to(logits.device)  # type: ignore[arg-type]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            taught = self.model(**given, use_cache=False).logits
        return self.weight * divergence(logits, taught, inputs["labels"], items)
