"""`analyze` for saved models: load, look, write results.json, analysis.html and suggested.yaml."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from transformers import AutoConfig, DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

import lorank
from lorank.analysis import analyze
from lorank.conversion import converted_with
from lorank.ranks import Suggestion, read_budget, suggest_ranks
from lorank.report.analysis import analysis_page
from lorank.train.data import collate
from lorank.train.evaluation import text_for
from lorank.train.recipe import Recipe
from lorank.train.run import load_model
from lorank.train.trainer import write_whole


def analyze_folder(
    model: str,
    out: Path,
    *,
    data: str = "embedded",
    sequence_length: int = 256,
    documents: Literal["packed", "padded"] = "packed",
    text_column: str = "text",
    batch_size: int = 16,
    tokens: int = 50_000,
    gradient_batches: int = 1,
    alpha: float = 0.95,
    budget: str | None = None,
    seed: int = 42,
    tokenizer: str | None = None,
    memory: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`lorank.analysis.analyze` for a run folder, model folder or hub name on any source of text that training takes.

    Any model of transformers that reads one text: causal, masked (it is shown text as in training, with masks, and its gradients
    are those of guessing what they hide), or a body without a head, which has no loss and so no gradients.

    `memory` is the room in GiB for sums over activations, half of what is free by default; `tokenizer` another than the model's own.

    Returns:
        What is in out/results.json. Beside it are analysis.html and, with a budget, suggested.yaml.

    Raises:
        ValueError: as `evaluate_folder`, but that a model may see what is to come; an encoder-decoder; an alpha that is no part;
            a budget that cannot be met.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not a part of the energy between 0 and 1; give for example 0.95")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if budget is not None:
        read_budget(budget, 0)  # a mistake is told of before the work
    say("loading the model and the text")
    form: dict[str, Any] = {"documents": documents, "text_column": text_column, "seed": seed}
    loaded, words = load_model(model, tokenizer=tokenizer, of_any_kind=True)
    if words.eos_token_id is None and words.sep_token is not None:
        words.eos_token = words.sep_token  # what ends a text for BERT and its kin
    batches, _ = text_for(
        loaded,
        words,
        data=data,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=tokens,
        make_batch=_batches_for(loaded, words, seed),
        **form,
    )
    if torch.cuda.is_available():
        loaded.to("cuda")  # type: ignore[arg-type]
    if memory is None:
        room = (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available) / 2
    else:
        room = memory * 2**30
    found = analyze(loaded, batches, tokens=tokens, gradient_batches=gradient_batches, room_bytes=room, say=say)
    method = converted_with(loaded)
    results: dict[str, Any] = {
        "lorank": lorank.__version__,
        "model": model,
        "model_type": loaded.config.model_type,
        "method": method["method"] if method else "dense",
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "data": data,
        "sequence_length": sequence_length,
        "suggestion": None,
        **found.to_dict(alpha),
    }
    out.mkdir(parents=True, exist_ok=True)
    try:
        if budget is not None:
            suggestion = suggest_ranks(results["projections"], budget)
            recipe = suggested_recipe(model, loaded.config, suggestion, out, data, sequence_length)
            write_whole(out / "suggested.yaml", _as_yaml(recipe, results, suggestion))
            results["suggestion"] = {"budget": budget, **suggestion._asdict()}
    finally:  # a budget that cannot be met does not cost what was found
        say("writing the report")
        write_whole(out / "results.json", json.dumps(results))
        write_whole(out / "analysis.html", analysis_page(results))
    return results


def _batches_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Callable[..., dict[str, Any]] | None:
    """What makes a masked language model's batches of rows: 15 % of the tokens are to be guessed, as in BERT's training, and
    the same ones whenever the same rows come. Without a mask token there is nothing to guess: no labels. None: any other model."""
    if not type(model).__name__.endswith("ForMaskedLM"):
        return None
    vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore

    def make(rows: Any) -> dict[str, Any]:
        batch = collate(rows, vocab_size)
        labels = batch.pop("labels")
        if tokenizer.mask_token_id is None:
            return batch
        masker = DataCollatorForLanguageModeling(tokenizer, seed=seed)
        masker.generator = torch.Generator().manual_seed(seed + int(batch["input_ids"].sum()))
        ids, guessed = masker.torch_mask_tokens(batch["input_ids"].clone(), special_tokens_mask=labels == -100)
        return {**batch, "input_ids": ids, "labels": guessed}

    return make


def suggested_recipe(
    model: str, config: Any, suggestion: Suggestion, out: Path, data: str, sequence_length: int
) -> Recipe:
    """CoLA with the suggested ranks: of a run, its own recipe with nothing else changed; of any other model, its shape
    and tokenizer, and the text it was looked at with."""
    changes: dict[str, Any] = {"method": "cola", "rank": suggestion.table, "options": {}, "targets": [], "exclude": []}
    written = Path(model).expanduser() / "recipe.yaml"
    if written.exists():
        return dataclasses.replace(Recipe.read(written), **changes, checkpoint=None, checkpoint_every=1)
    place = str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else model
    shape = place
    if getattr(config, "lorank", None) is not None:  # a recipe wants the dense shape
        shape = str((out / "shape").resolve())
        settings = {name: value for name, value in config.to_dict().items() if name not in ("lorank", "model_type")}
        AutoConfig.for_model(config.model_type.removeprefix("lorank_"), **settings).save_pretrained(shape)
    return Recipe(
        model=shape,
        tokenizer=place,
        vocab_size=config.vocab_size,
        data=data,
        sequence_length=sequence_length,
        **changes,
    )


def _as_yaml(recipe: Recipe, results: dict[str, Any], suggestion: Suggestion) -> str:
    asked = yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=200, allow_unicode=True)
    part = suggestion.parameters / suggestion.dense_parameters
    return (
        f"# Suggested by lorank analyze {results['model']}: ranks in proportion to r({results['alpha']:g}) of each projection's\n"
        f"# output; {suggestion.parameters:,} parameters in the factors, {part * 100:.1f} % of the dense matrices' {suggestion.dense_parameters:,}.\n"
        "# Nothing else was tuned: learning rate and length are the analyzed run's, or lorank's defaults.\n" + asked
    )
