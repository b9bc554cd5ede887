"""lorank generate: text from a trained model."""

from typing import Any

import click

from lorank.cli.flags import SEED, SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, help="Tokens to write.")
@click.option("--temperature", type=float, default=0.8, help="0 always chooses the most likely token.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, help="Sample among the k most likely tokens; 0: all.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Sample within this probability mass."
)
@click.option("--seed", type=SEED, default=None, help="Makes sampling repeatable.")
def generate(model: str, **settings: Any) -> None:
    """Generate text with a model: MODEL is a run, a folder or a hub name."""
    from lorank.cli.console import results_console
    from lorank.speed.decoding import fast_decoding
    from lorank.train.generation import generate_text
    from lorank.train.saved import load_model

    results_console()
    loaded, tokenizer = load_model(model)
    click.echo(generate_text(fast_decoding(loaded), tokenizer, **settings))
