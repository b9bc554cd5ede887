"""`analyze` for saved models: load, measure, suggest ranks; write results.json and suggested.yaml."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from transformers import AutoConfig, DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

import lorank
from lorank.analysis import Suggestion, analyze, suggest_ranks
from lorank.analysis.ranks import check_budget, read_budget, table_of
from lorank.method import Site
from lorank.rewriting import converted_with
from lorank.sites import base_prefix, find_sites, weight_reader
from lorank.train.data import collate
from lorank.train.evaluation import text_for, with_length
from lorank.train.folder import absolute, check_apart, write_whole
from lorank.train.methods import methods_of, written_out
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model
from lorank.train.text import Text, recipe_of_run, text_of
from lorank.whole import without_link


def analyze_folder(
    model: str,
    out: Path,
    *,
    tokens: int = 50_000,
    gradient_batches: int = 1,
    alpha: float = 0.95,
    budget: str | None = None,
    tokenizer: str | None = None,
    memory: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    **text: Any,
) -> dict[str, Any]:
    """`lorank.analysis.analyze` for a run folder, model folder or hub name: of a run on the text that it held out, or on any
    source of text that training reads.

    Works for any transformers model that reads one text: causal; masked, whose text is masked as in training and whose
    gradients are those of predicting the masked tokens; or a body without a head, which has no loss and so no gradients.

    Args:
        memory: GiB for sums over activations; default: half of what is free.
        tokenizer: another than the model's own.
        text: as `evaluate_folder`'s.

    Returns:
        The content of out/results.json. With a budget there is also suggested.yaml; if `lorank pretrain` cannot train
        that model, the suggestion gives the reason under "no_recipe" instead. Results of an earlier analysis are
        replaced, except that without a budget an earlier suggested.yaml stays.

    Raises:
        ValueError: as `evaluate_folder`, but the model need not be causal; an encoder-decoder; an alpha outside (0, 1);
            a budget that the shapes cannot meet, which is found before the work; a memory that is not positive.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, for example 0.95, got {alpha}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be a positive number of GiB, for example 8, got {memory:g}")
    if budget is not None:
        read_budget(budget, 0)  # an error here comes before the work
    say("loading the model and the text")
    chosen = text_of(model, **text)
    check_apart(out, chosen.data)
    loaded, words = load_model(model, tokenizer=tokenizer, of_any_kind=True)
    if words.eos_token_id is None and words.sep_token is not None:
        words.eos_token = words.sep_token  # ends a text for BERT and its kin
    make = _batches_for(loaded, words, chosen.seed)
    chosen = with_length(chosen, loaded)
    batches, _ = text_for(loaded, words, chosen, max_tokens=tokens, make_batch=make)
    if budget is not None:
        base = _recipe_for(model, loaded.config, out, chosen, tokenizer)
        target, refused = _target(base)
        sites = target.sites.values() if target else () if converted_with(loaded) else find_sites(loaded)
        if sites:
            check_budget(budget, [(site.d_in, site.d_out) for site in sites])
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
        "data": chosen.data,
        "text": str(chosen),
        "sequence_length": chosen.sequence_length,
        "suggestion": None,
        **found.to_dict(alpha),
    }
    recipe = None
    if budget is not None:
        try:
            suggestion, recipe = _suggestion(results["projections"], budget, loaded, target)
        except ValueError as error:  # from what the text showed; the rest of the analysis is kept
            results["notes"].append(f"no ranks: {error}")
        else:
            results["suggestion"] = {"budget": budget, **suggestion._asdict(), "no_recipe": refused}
    out.mkdir(parents=True, exist_ok=True)
    if budget is not None:
        (out / "suggested.yaml").unlink(missing_ok=True)
    write_whole(out / "results.json", json.dumps(results))
    if recipe is not None:
        write_whole(out / "suggested.yaml", _as_yaml(recipe, results, suggestion))
    return results


def _batches_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Callable[..., dict[str, Any]] | None:
    """Makes a masked language model's batches from rows; None for any other model.

    As in BERT's training 15 % of the tokens are masked, always the same ones for the same rows. Without a mask token
    there are no labels.
    """
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


class Target(NamedTuple):
    """The model that `lorank pretrain` would make low rank."""

    recipe: Recipe
    """Without ranks."""
    prefix: str
    """Prefix of its names, as `base_prefix`."""
    sites: dict[str, Site]
    """The projections that can be replaced."""
    others: list[Site]


def _recipe_for(model: str, config: Any, out: Path, text: Text, tokenizer: str | None) -> Recipe:
    """CoLA, still without ranks. For a run: its own recipe with the methods replaced. For any other model: its shape and
    attention, and the tokenizer and text of the analysis."""
    if (run := recipe_of_run(model)) is not None:
        methods = {
            "method": "cola",
            "optimizer": _plain_optimizer(run),
            "gradient": "autograd",
            "rank": None,
            "options": {},
        }
        return run.but({**methods, "targets": [], "exclude": [], "checkpoint": None, "checkpoint_every": 1})
    shape = model
    if getattr(config, "lorank", None) is not None:  # a recipe needs the dense shape
        shape = str(without_link(out / "shape"))
        without_link(out / "shape/config.json")
        settings = {name: value for name, value in config.to_dict().items() if name not in ("lorank", "model_type")}
        AutoConfig.for_model(config.model_type.removeprefix("lorank_"), **settings).save_pretrained(shape)
    attention = {"attention": kind} if (kind := config._attn_implementation) else {}
    form = {name: getattr(text, name) for name in ("data", "sequence_length", "documents", "text_column", "seed")}
    recipe = Recipe(
        model=shape, method="cola", tokenizer=tokenizer or model, vocab_size=config.vocab_size, **form, **attention
    )
    return absolute(recipe)


def _plain_optimizer(recipe: Recipe) -> str | dict:
    """The recipe's optimizer, or the rule that a low-rank one uses inside its subspace."""
    optimizer = methods_of(recipe).optimizer
    return getattr(optimizer, "rule", "adamw") if hasattr(optimizer, "rank") else written_out(recipe).optimizer


def _target(recipe: Recipe) -> tuple[Target | None, str | None]:
    """What a recipe would train, or why it cannot."""
    try:
        empty = empty_model(recipe.but({"method": "dense"}))
    except (ValueError, OSError) as error:
        return None, " ".join(str(error).split())[:200]
    sites = [site for site in find_sites(empty) if site.router is None]
    free = {site.name: site for site in sites if weight_reader(empty, site) is None}
    if not free:
        return None, f"the code of {weight_reader(empty, sites[0])} reads the weights of its projections itself"
    return Target(recipe, base_prefix(empty), free, [site for site in sites if site.name not in free]), None


def _suggestion(
    projections: list[dict[str, Any]], budget: str, loaded: PreTrainedModel, target: Target | None
) -> tuple[Suggestion, Recipe | None]:
    """Ranks, and the recipe with them. Projections that cannot be replaced, or that no text reached, stay dense."""
    if target is None:
        return suggest_ranks(projections, budget), None

    def called(name: str) -> str:
        return target.prefix + name.removeprefix(base_prefix(loaded))

    chosen = [one for one in projections if called(one["name"]) in target.sites]
    seen = {called(one["name"]) for one in chosen}
    dense = [site for site in (*target.sites.values(), *target.others) if site.name not in seen]
    found = suggest_ranks(chosen, budget, called=called)
    exclude = list(table_of([site._asdict() for site in dense], [0] * len(dense)))
    recipe = target.recipe.but({"rank": found.table, "exclude": exclude})
    empty_model(recipe)  # checks that every projection has a rank, and every pattern a projection
    return found, recipe


def _as_yaml(recipe: Recipe, results: dict[str, Any], suggestion: Suggestion) -> str:
    asked = yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=200, allow_unicode=True)
    part = suggestion.parameters / suggestion.dense_parameters
    return (
        f"# Suggested by lorank analyze {results['model']}. Ranks are chosen one at a time by how much output energy they save\n"
        f"# per parameter; {suggestion.parameters:,} parameters in the factors, {part * 100:.1f} % of the dense matrices' {suggestion.dense_parameters:,}.\n"
        "# Nothing else was tuned: learning rate and length are the analyzed run's, or lorank's defaults.\n" + asked
    )
