"""The same server and clients in Flower: its simulation engine, or a deployment with `flwr run`.

Flower is imported when it is needed: pip install 'lorank[federated]'.
"""

import contextvars
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorank.federated.client import Client
from lorank.federated.exchange import Memory, Package, as_json
from lorank.federated.local import answered
from lorank.federated.server import Server
from lorank.federated.settings import Settings, Share, shares_of_text
from lorank.train.watching import tell

LOOK = 0.2
"""Seconds between two looks for answers."""
MISSING = "lorank federated runs in Flower's simulation engine: pip install 'lorank[federated]', or use --engine local"


def flower() -> Any:
    """The package flwr, without its reports to its makers unless FLWR_TELEMETRY_ENABLED asks for them, and without a tip of its engine.

    Raises:
        ValueError: it is not installed.
    """
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")
    try:
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp
    except ImportError:
        raise ValueError(MISSING) from None
    return flwr


class Grid:
    """Clients that Flower reaches; a node is Flower's number of one."""

    def __init__(self, grid: Any, settings: Settings, repeats: bool = False):
        self.grid, self.settings, self.repeats, self.begun = grid, settings, repeats, False
        self.stopped = threading.Event()
        """Set by whoever no longer waits for this thread, so that it ends, too."""

    def nodes(self) -> Sequence[int]:
        """Before the first round, waits until all clients are there, or the timeout has passed."""
        found, until = [*self.grid.get_node_ids()], time.monotonic() + self.settings.timeout
        while not self.begun and len(found) < self.settings.clients and time.monotonic() < until:
            tell("waiting for clients", len(found), self.settings.clients, "clients")
            self._wait(LOOK)
            found = [*self.grid.get_node_ids()]
        self.begun = True
        return sorted(found)

    def ask(self, packages: Mapping[Any, Package], what: str) -> dict[Any, Package | str]:
        app = flower().app
        kinds = {"hello": app.MessageType.QUERY, "train": app.MessageType.TRAIN, "evaluate": app.MessageType.EVALUATE}
        sent: dict[str, Any] = {}
        answers: dict[Any, Package | str] = {}
        for node, package in packages.items():
            kind = kinds[package.values["do"]]
            message = app.Message(content=record_of(package), message_type=kind, dst_node_id=node)
            sent |= {id: node for id in self.grid.push_messages([message]) if id is not None}
        waiting, until = {*sent}, time.monotonic() + self.settings.timeout
        while waiting and time.monotonic() < until:
            for reply in self.grid.pull_messages(waiting):  # of a node that is gone, Flower's server is the sender
                waiting.discard(reply.metadata.reply_to_message_id)
                answers[sent[reply.metadata.reply_to_message_id]] = _read(reply)
            tell(what, len(answers), len(packages), "clients")
            self._wait(LOOK if waiting else 0)
        late = f"it did not answer within {self.settings.timeout:g} seconds"
        for node in packages.keys() - answers.keys():
            answers[node] = late if node in sent.values() else "Flower could not send it the message"
        return answers

    def _wait(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise KeyboardInterrupt


def _read(reply: Any) -> Package | str:
    """A package from anybody's message, or why it is none."""
    if reply.has_error():
        lines = [line for line in str(reply.error.reason).splitlines() if line.strip()]
        reason = lines[-1].rpartition("Message: ")[2].strip(" '>") if lines else "its app failed"
        return reason if len(reason) < 200 else f"{reason[:200]} ..."
    try:
        package = package_of(reply.content)
    except Exception as error:  # whatever somebody sent
        return f"its message cannot be read: {type(error).__name__}: {error}"
    said = package.values.get("error")
    return package if said is None else str(said)


def record_of(package: Package) -> Any:
    """As Flower sends it: arrays, and the values as JSON."""
    app = flower().app
    arrays = app.ArrayRecord({name: app.Array(tensor.contiguous().numpy()) for name, tensor in package.tensors.items()})
    return app.RecordDict({"arrays": arrays, "values": app.ConfigRecord({"json": as_json(package.values)})})


def package_of(record: Any) -> Package:
    """Of a record."""
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in record["arrays"].items()}
    values = json.loads(record["values"]["json"])
    if not isinstance(values, dict):
        raise ValueError(f"values must be an object, got {values!r}")
    return Package(values, tensors)


# ---- the apps


def apps(
    settings: Settings | None = None,
    out: Path | None = None,
    *,
    repeatable: bool = False,
    run: Callable[[Server, Any], object] | None = None,
    say: Callable[[str], object] = print,
) -> tuple[Any, Any]:
    """Flower's ServerApp and ClientApp.

    Args:
        settings: None: what the app's run config says, which has the names of `Settings`.
        out: None: the run config's "out".
        repeatable: noise from the seed, which the server knows: for simulations alone.
        run: what the server does; default: all rounds, and the model is saved.

    Raises:
        ValueError: Flower is not installed.
    """
    flwr = flower()
    server_app, client_app = flwr.serverapp.ServerApp(), flwr.clientapp.ClientApp()

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        config = {**context.run_config}
        folder = out or Path(str(config.pop("out", "runs/federated")))
        chosen = settings or Settings.from_dict(config)
        server = Server(chosen, folder, say)
        link = Grid(grid, chosen, repeatable)
        if run is not None:
            run(server, link)
        else:
            server.run(link)
            say(f"model: {server.save_model()}")

    def answer(message: Any, context: Any) -> Any:
        package = package_of(message.content)
        memory = _memory(context)
        try:
            found = answered(_client(package, context, repeatable), package, memory)
        except (ValueError, OSError) as error:
            found = str(error)
        _remember(context, memory)
        reply = found if isinstance(found, Package) else Package({"error": found})
        return flwr.app.Message(content=record_of(reply), reply_to=message)

    client_app.train()(answer)
    client_app.evaluate()(answer)
    client_app.query()(answer)
    return server_app, client_app


def _client(package: Package, context: Any, repeatable: bool) -> Client:
    """Who answers: its own model, data and name if its node's config has them, else what the server says and its partition.

    Raises:
        ValueError: it is no simulation, and the node has no data: a server is not let choose files of another machine.
    """
    node, settings = {**context.node_config}, Settings.from_dict(package.values["settings"])
    index = int(node.get("partition-id", 0))
    if "data" in node:
        share = Share(tuple(str(node["data"]).split(",")))
    elif "num-partitions" not in node:
        raise ValueError("its SuperNode must be started with its text: --node-config \"data='...' partition-id=0\"")
    else:
        share = shares_of_text(settings.data, settings.clients)[index]
    name = str(node.get("name", f"client {index}"))
    return Client(str(node.get("model", settings.model)), share, name, index, repeatable=repeatable)


def _memory(context: Any) -> Memory:
    if "values" not in context.state:
        return Memory()
    saved = package_of(context.state)
    return Memory(saved.values["version"], saved.values["rounds"], saved.tensors)


def _remember(context: Any, memory: Memory) -> None:
    record = record_of(Package({"version": memory.version, "rounds": memory.rounds}, memory.merged))
    for name, part in record.items():
        context.state[name] = part


# ---- simulation


def simulate(
    settings: Settings,
    out: Path,
    run: Callable[[Server, Any], object],
    say: Callable[[str], object],
    clients: Any = None,
) -> None:
    """All clients on this machine, in processes of Flower's simulation engine.

    Args:
        run: what the server does.
        clients: another ClientApp than that of `apps`.

    Raises:
        ValueError: Flower or its engine is not installed, or what `Server` raises.
    """
    flower()
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError:
        raise ValueError(MISSING) from None
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    failed: list[BaseException] = []
    here, stopped = contextvars.copy_context(), threading.Event()

    def inside(server: Server, link: Any) -> None:
        link.stopped = stopped
        try:
            here.run(run, server, link)
        except BaseException as error:
            failed.append(error)

    server_app, client_app = apps(settings, out, repeatable=True, run=inside, say=say)
    cores = os.cpu_count() or 1
    resources = {"num_cpus": 1, "num_gpus": 1.0 / settings.clients if torch.cuda.is_available() else 0.0}
    init = {"num_cpus": min(cores, settings.clients), "include_dashboard": False, "log_to_driver": False}
    try:
        run_simulation(
            server_app,
            clients or client_app,
            settings.clients,
            backend_config={"client_resources": resources, "init_args": init},
        )
    except BaseException:
        stopped.set()  # its thread is not ended by an interrupt
        raise
    if failed:
        raise failed[0]
