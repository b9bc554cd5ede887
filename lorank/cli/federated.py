"""lorank federated: one model from several owners of text."""

from pathlib import Path
from typing import Any

import click

import lorank
from lorank.cli.flags import SEED, SETTINGS, Folder

WHOLE, POSITIVE = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)
RESUME_WITH = ("rounds",)


@click.command(context_settings=SETTINGS)
@click.argument("model", required=False)
@click.option(
    "--data",
    metavar="SHARDS",
    default=None,
    help="Text of the clients: files, folders or globs with commas, dealt to them in turn; of one folder its files, of one file its "
    "sequences.",
)
@click.option("--method", default="flora", metavar="RULE", help="average, flora, ffa, fedsvd or best.")
@click.option("--clients", type=WHOLE, default=4, help="Owners of text.")
@click.option("--rounds", type=WHOLE, default=5, help="How often the server asks them.")
@click.option(
    "--rank", default="8", metavar="RANK", help="Of the factors; one for each client with commas (flora, best)."
)
@click.option("--alpha", type=POSITIVE, default=16.0, help="The low-rank term is multiplied by alpha / rank.")
@click.option("--steps", type=WHOLE, default=20, help="Optimizer steps of a client in a round.")
@click.option("--batch-size", type=WHOLE, default=8, help="Sequences in a step; under privacy, on average.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=128, help="Tokens of a sequence.")
@click.option("--lr", type=POSITIVE, default=1e-3, help="Learning rate.")
@click.option(
    "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", help="Of the clients, new in each round."
)
@click.option("--down", type=POSITIVE, default=1.0, help="Share of the numbers that go down, the largest ones.")
@click.option("--up", type=POSITIVE, default=1.0, help="Share of the numbers that go up.")
@click.option("--epsilon", type=POSITIVE, default=None, help="Privacy that all rounds may cost; the noise follows.")
@click.option(
    "--noise", type=click.FloatRange(min=0), default=None, help="Instead of --epsilon: noise in units of --clip."
)
@click.option(
    "--clip", type=POSITIVE, default=1.0, help="The most that a gradient may be; under privacy, that of a sample."
)
@click.option("--delta", type=POSITIVE, default=1e-5, help="Of epsilon; well below 1 / sequences of a client.")
@click.option(
    "--accountant",
    type=click.Choice(["rdp", "opacus-rdp", "opacus-prv"]),
    default="rdp",
    help="Who counts epsilon; the last two need Opacus.",
)
@click.option("--text-column", default="text", help="Of jsonl, json, parquet and csv files.")
@click.option("--seed", type=SEED, default=0, help="Of factors, batches and, in a simulation, noise.")
@click.option("--timeout", type=POSITIVE, default=3600.0, help="Seconds after which a client is left out of a round.")
@click.option(
    "--engine",
    type=click.Choice(["flower", "local"]),
    default="flower",
    help="Flower's simulation engine, a process for each core; or this process, one client after another.",
)
@click.option("--out", type=Folder(), default=None, help="Folder of the run.", show_default="runs/federated-METHOD")
@click.option(
    "--resume",
    type=Folder(),
    metavar="RUN",
    default=None,
    help="Go on with this run, as it began; or with more --rounds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def federated(
    context: click.Context,
    model: str | None,
    data: str | None,
    engine: str,
    out: str | None,
    resume: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train one model on the text of several owners, who send low-rank factors and keep the text.

    MODEL is a run, a folder or a hub name of a dense model. In each round every client trains factors on its text from what the server
    sent, and the server makes one state of them by a rule. The clients are simulated on this machine; examples/federated in lorank's
    repository runs the same server and clients on several.

    OUT gets the state after each round, federated.json with the losses of each client, bytes and epsilon, report.html, and in OUT/model
    the dense model. Losses are those on each client's held-out text. They are measured before training and are not private.
    """
    from lorank.cli.console import results_console, shown_work
    from lorank.federated.local import Local, clients_of
    from lorank.federated.server import FILE, Server, is_done
    from lorank.federated.settings import Settings
    from lorank.report.federated import federated_page, federated_table
    from lorank.train.folder import absolute_name, read_json, write_whole

    given = [
        name
        for name in ("model", "data", *settings)
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    done = False
    if resume:
        if wrong := [name for name in given if name not in RESUME_WITH]:
            raise ValueError(
                f"--resume goes on with the settings of {resume}; leave out {wrong[0]}, or begin another run"
            )
        folder = Path(resume)
        saved = read_json(folder / FILE, settings=dict, rounds=list)
        chosen = Settings.from_dict({**saved["settings"], **{name: settings[name] for name in given}})
        done = is_done(chosen, saved["rounds"])
    elif model is None or data is None:
        raise ValueError("a model and text must be given: lorank federated MODEL --data SHARDS, or --resume RUN")
    else:
        sources = ",".join(map(absolute_name, data.split(",")))
        chosen = Settings.from_dict({"model": absolute_name(model), "data": sources, **settings})
        folder = Path(out or f"runs/federated-{chosen.method}")
        if (folder / FILE).exists():
            raise ValueError(f"{folder} has a run; go on with it by --resume {folder}, or choose another --out")
    console = results_console()
    found: list[Server] = []

    def run(server: Server, link: Any) -> None:
        server.run(link)
        found.append(server)

    def say(line: str) -> None:
        if not as_json:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    clients = [] if done else clients_of(chosen)  # refuses text that cannot be dealt, before an engine starts
    with shown_work():
        if done or engine == "local":
            run(Server(chosen, folder, say), Local(clients))
        else:
            from lorank.federated.flower import simulate

            simulate(chosen, folder, run, say)
        place = found[0].save_model()
    results = read_json(folder / FILE)
    write_whole(folder / "report.html", federated_page(results, f"lorank {lorank.__version__}"))
    if as_json:
        click.echo((folder / FILE).read_text())
    else:
        console.print(federated_table(results), highlight=False)
        console.print(
            f"model: [bold]{place}[/bold]\nreport: [bold]{folder / 'report.html'}[/bold]",
            highlight=False,
            soft_wrap=True,
        )
