"""EGG as a model of transformers: its parameters, and the arithmetic of lorank/evolution/egg.py over a sequence."""

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lorank.evolution.egg import LIMIT, ONE, Member, position, score, weights
from lorank.fields import Bounds, Count, check_value
from lorank.needed import not_copied, write_needs

VOCABULARY = 256
WIDEST = (2**24 - 1) // (4 * LIMIT**2)
"""Sums over a wider layer could pass 2²⁴, beyond which float32 cannot count."""


class EggConfig(PretrainedConfig):
    """Width and depth only; the vocabulary is the 256 bytes."""

    model_type = "lorank_egg"
    register_for_auto_class = classmethod(not_copied)

    def __init__(self, hidden_size: int = 256, num_hidden_layers: int = 6, **kwargs: Any):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, VOCABULARY
        kwargs.pop("vocab_size", None)
        super().__init__(**{"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, **kwargs})
        self.check()

    def check(self) -> None:
        """Raises ValueError for a shape that cannot be built."""
        check_value("hidden_size", self.hidden_size, Annotated[int, Bounds(least=1, most=WIDEST)])
        check_value("num_hidden_layers", self.num_hidden_layers, Count)
        if self.vocab_size != VOCABULARY:
            raise ValueError(
                f"vocab_size must be {VOCABULARY}, because EGG reads bytes, got {self.vocab_size}; use tokenizer=bytes"
            )


def _int8(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)


class EggLayer(nn.Module):
    """The parameters of `layer`."""

    stands_for_linear = True
    """It then counts as a block."""

    def __init__(self, D: int):
        super().__init__()
        self.ln1, self.ln2, self.bf, self.bh = _int8(D), _int8(D), _int8(D), _int8(D)
        self.wf, self.uf, self.wh, self.uh = _int8(D, D), _int8(D, D), _int8(D, D), _int8(D, D)
        self.m1, self.m2 = _int8(4 * D, D), _int8(D, 4 * D)


class EggForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. Its `forward` is called like that of transformers' language models; it recomputes instead of caching."""

    config_class = EggConfig
    _is_stateful = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    """It has no attention, so any implementation suits it."""
    voting_pairs: int | None = None
    """Pairs of members that vote on the weights; EGGROLL sets it, and the optimizer `Votes` reads it."""

    def __init__(self, config: EggConfig):
        config.check()
        super().__init__(config)
        D = config.hidden_size
        self.embedding, self.head, self.ln = _int8(256, D), _int8(256, D), _int8(D)
        self.layers = nn.ModuleList(EggLayer(D) for _ in range(config.num_hidden_layers))
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """It computes in float32; its parameters are int8."""
        return torch.float32

    @torch.no_grad()
    def init_weights(self) -> None:
        """round(16 N(0, 1)) for matrices, 16 for norms, 0 for biases; parameters that were loaded keep their values."""
        for name, p in self.named_parameters():
            if p.is_meta or getattr(p, "_is_hf_initialized", False):
                continue
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, device=p.device).mul_(ONE).round_().clamp_(-LIMIT, LIMIT))
            else:
                p.fill_(ONE if name.rpartition(".")[2].startswith("ln") else 0)

    initialize_weights = init_weights

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("is_main_process", True):
            write_needs(self.config, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def weights(self, noise: Member) -> dict[str, Any]:
        """The weights that `position` reads."""
        layers: Any = self.layers
        return {**weights(self, noise), "layers": [weights(layer, noise) for layer in layers]}

    def begin(self, K: int, R: int) -> list[Tensor]:
        """The states [K, R, D] before a document, by layer."""
        D, device = self.config.hidden_size, self.embedding.device
        return [torch.zeros(K, R, D, device=device) for _ in self.layers]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Iterator[Tensor]:
        """Those [1, batch, 256] of each position of ids [batch, T], one after the other."""
        states, w = self.begin(1, len(ids)), self.weights({})
        for at in ids.T:
            found, states = position(at[None], states, w)
            yield found

    @torch.no_grad()
    def fitness(
        self, ids: Tensor, noise: Member, states: list[Tensor] | None = None, score: Any = score
    ) -> tuple[Tensor, list[Tensor]]:
        """Integer log-likelihood [K, R] of bytes [K, R, T] in sixteenths of a bit (int64, the sum over a row's T - 1), and
        the states in which it ends. It begins in the given states; `score` may be compiled."""
        total = torch.zeros(ids.shape[:2], dtype=torch.int64, device=ids.device)
        states, w = self.begin(*ids.shape[:2]) if states is None else states, self.weights(noise)
        columns = ids.permute(2, 0, 1).contiguous()
        for at, target in itertools.pairwise(columns):
            found, states = score(at, target, states, w)
            total += found
        return total, states

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits in nats, of bytes [batch, T], and the mean loss over labels (-100: none) one position later."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("EGG reads from the left; use padding on the right")
        logits = torch.stack(list(self.logits(input_ids)), dim=2)[0] * (math.log(2) / ONE)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"input_ids": input_ids}

    def get_input_embeddings(self) -> Any:
        """An object whose `weight` has a row for each byte."""
        return _Lookup(self.embedding)

    def get_output_embeddings(self) -> Any:
        return None

    def flops_per_token(self) -> int:
        """FLOPs of one member's forward pass: two per multiply-add of the products."""
        D, layers = self.config.hidden_size, self.config.num_hidden_layers
        return 2 * (12 * D * D * layers + 256 * D)


class _Lookup(nn.Module):
    """What transformers takes for an embedding; it is not part of the model."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


def register() -> None:
    """Make the model known to the Auto classes; see `lorank.auto`."""
    AutoConfig.register(EggConfig.model_type, EggConfig, exist_ok=True)
    AutoModelForCausalLM.register(EggConfig, EggForCausalLM, exist_ok=True)


register()
