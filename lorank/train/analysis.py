"""`analyze` for saved models: load, look, write results.json, analysis.html and suggested.yaml."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoConfig

import lorank
from lorank.analysis import analyze
from lorank.conversion import converted_with
from lorank.ranks import Suggestion, read_budget, suggest_ranks
from lorank.report.analysis import analysis_page
from lorank.train.evaluation import open_for_evaluation
from lorank.train.recipe import Recipe
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
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`lorank.analysis.analyze` for a run folder, model folder or hub name on any source of text that training takes.

    Returns:
        What is in out/results.json. Beside it are analysis.html and, with a budget, suggested.yaml.

    Raises:
        ValueError: as `evaluate_folder`; an alpha that is no part; a budget that cannot be met.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not a part of the energy between 0 and 1; give for example 0.95")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if budget is not None:
        read_budget(budget, 0)  # a mistake is told of before the work
    say("loading the model and the text")
    form: dict[str, Any] = {"documents": documents, "text_column": text_column, "seed": seed}
    loaded, batches, _ = open_for_evaluation(
        model, data=data, sequence_length=sequence_length, batch_size=batch_size, max_tokens=tokens, **form
    )
    if torch.cuda.is_available():
        loaded.to("cuda")  # type: ignore[arg-type]
    found = analyze(loaded, batches, tokens=tokens, gradient_batches=gradient_batches, say=say)
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
