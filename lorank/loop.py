"""What a training loop asks of a model's methods: an optimizer, a hook between steps, a schedule, and the step to the next task."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lorank.adapters.blocks import Contextual
from lorank.conversion import as_method, check_module, method_of
from lorank.fields import Beta, Fraction, NonNegative, Share, Whole, check_value, whole_steps
from lorank.method import Dense, Method, Patterns, StepHook, check_combination, warmup_cosine
from lorank.optim.groups import Decay, plain_groups
from lorank.optim.plain import AdamW
from lorank.rewriting import REWRITTEN, converted_with


def optimizer(
    model: nn.Module,
    method: Method | type[Method] | str | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay: Decay = "matrices",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    targets: Patterns = None,
    exclude: Patterns = None,
) -> Optimizer:
    """The optimizer of a method over the trained parameters of a model, dense or converted.

    Args:
        method: a method that decides how weights move, ``GaLore(rank=128)``, its class or its name. Default: the optimizer that the
            model's own method needs (SwitchLoRA), or AdamW.
        decay: "matrices" exempts norms, biases and embeddings from weight decay; "all" exempts nothing.
        targets, exclude: regular expressions that choose which linear layers are projected. Default: all.

    Raises:
        ValueError: the method does not decide how weights move, it cannot be combined with the model's own, or a pattern
            matches nothing.
    """
    check_module(model)
    for name, value, kind in (
        ("lr", lr.item() if isinstance(lr, Tensor) else lr, NonNegative),
        ("weight_decay", weight_decay, NonNegative),
        ("decay", decay, Decay),
        ("betas", betas, tuple[Beta, Beta]),
        ("eps", eps, NonNegative),
    ):
        check_value(name, value, kind)
    own = method_of(model) or Dense()
    chosen = AdamW() if method is None else as_method(method)
    if "method" in chosen.answers() and "optimizer" in chosen.answers():  # SwitchLoRA brings its own
        if chosen.name != own.name:
            raise ValueError(
                f"{chosen.name} also changes the weights; convert the model with it, and leave method out here"
            )
        chosen = AdamW()
    if chosen.key != "optimizer" and "optimizer" not in chosen.answers():
        hint = (
            "; lorank.evolution.eggroll.Eggroll estimates gradients in your own loop"
            if chosen.key == "gradient"
            else ""
        )
        raise ValueError(
            f"{chosen.name} does not decide how weights move; use adamw, muon or galore, for example{hint}"
        )
    check_combination([own, chosen])
    mover = own if "optimizer" in own.answers() else chosen
    if (targets or exclude) and (mover is own or not hasattr(mover, "rank")):
        raise ValueError(f"{mover.name} projects nothing; leave out targets and exclude")
    groups = mover.parameter_groups(model, plain_groups(model, weight_decay, decay), targets, exclude)
    made: Any = mover.optimizer(groups, lr=lr, betas=betas, eps=eps)
    made.lorank_method = chosen  # it may also need a hook or a schedule
    return made


def step_hook(model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int = 0) -> StepHook | None:
    """Let the methods of a model and its optimizer act between the steps, in any training loop.

    Args:
        model: the converted model, also inside DDP, ``torch.compile`` or another module.
        optimizer: what moves its parameters, also inside accelerate's wrapper.
        steps: optimizer steps of the whole run.
        seed: seed of the method's random draws during the run.

    Returns:
        The hook, which is already active, for its `state_dict`; None if no method needs one.

    Raises:
        ValueError: the method cannot work with this optimizer or with so few steps, the optimizer has a hook already, `model` is only a
            part of a converted model, or the optimizer moves none of the model's parameters.
    """
    _check_steps(steps)
    check_value("seed", seed, Whole)
    inner, moving = converted_inside(model), _unwrapped(optimizer)
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in moving.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer must move parameters of the model, but it moves none of this {type(model).__name__}; give the model itself, not a "
            "copy, and make its optimizer after wrapping it"
        )
    for method in _methods(inner, moving):
        if not method.has_hook:
            continue
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                f"{method.name} cannot act on parameters that FullyShardedDataParallel has flattened; use DDP or train on one device"
            )
        if (hook := method.hook(model if inner is None else inner, moving, steps=steps, seed=seed)) is not None:
            hook.owner = method.name
            return hook
    return None


def next_task(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Tell the methods of a model and its optimizer that one task has ended and the next begins.

    What they do then is theirs: MoRAM adds ranks and freezes the older ones, CoDyRA merges what its gates have left and begins anew.
    Other methods change nothing. A hook between steps counts from 0 again, so `lorank.step_hook` is called once, with the steps of
    one task.

    Args:
        model: the converted model, also inside DDP or another module.
        optimizer: what moves its parameters. It goes on, without what it remembers of those that begin anew.

    Raises:
        ValueError: `model` is only a part of a converted model.
    """
    inner, moving = converted_inside(model), None if optimizer is None else _unwrapped(optimizer)
    for method in _methods(inner, moving):
        method.next_task(model if inner is None else inner, moving)
    if (hook := getattr(moving, "lorank_hook", None)) is not None:
        hook.next_task()


def set_context(model: nn.Module, value: Any) -> None:
    """Say what the adapter of a model follows from now on, until the next call: for MTLoRA a task, for PETALface a quality, for
    RecLoRA a user's vector.

    Args:
        model: the converted model, also inside DDP or another module.
        value: one for all samples, or a tensor with one for each; None: as before the first call.

    Raises:
        ValueError: the model has no such adapter, or the value does not fit it.
    """
    inner = converted_inside(model)
    method = None if inner is None else method_of(inner)
    if not isinstance(method, Contextual) or inner is None:
        kind = type(model).__name__ if method is None else f"one with {method.name}"
        raise ValueError(f"model must have an adapter that follows a context, such as mtlora, got {kind}")
    given = None if value is None else method.context(value)
    for layer in method.layers(inner).values():
        layer.context.value = given  # type: ignore[union-attr]


def lr_schedule(
    model: nn.Module,
    *,
    steps: int,
    warmup_steps: float = 0,
    min_lr_ratio: float = 0.1,
    optimizer: Optimizer | None = None,
) -> Callable[[int], float]:
    """Multiplier of the learning rate by steps done, for ``torch.optim.lr_scheduler.LambdaLR``: the one that a model's
    method needs (ReLoRA and SST climb again after each restart), or else a linear warm-up and a cosine.

    Args:
        model: the converted model, also inside DDP, ``torch.compile`` or another module.
        warmup_steps: whole steps, or a fraction of `steps`.
        optimizer: one of `lorank.optimizer`, whose method may need a schedule too.

    Raises:
        ValueError: there are no steps, the method's cycles do not fit into them, or `model` is only a part of a converted model.
    """
    own = own_schedule(model, steps=steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio, optimizer=optimizer)
    return own or (lambda step: warmup_cosine(step, steps, whole_steps(warmup_steps, steps), min_lr_ratio))


def own_schedule(
    model: nn.Module, *, steps: int, warmup_steps: float, min_lr_ratio: float, optimizer: Optimizer | None
) -> Callable[[int], float] | None:
    """`lr_schedule` of a method that needs its own; None if any will do."""
    _check_steps(steps)
    check_value("warmup_steps", warmup_steps, Share)
    check_value("min_lr_ratio", min_lr_ratio, Fraction)
    warmup = whole_steps(warmup_steps, steps)
    for method in _methods(converted_inside(model), optimizer and _unwrapped(optimizer)):
        if (own := method.schedule(steps, warmup, min_lr_ratio)) is not None:
            return own
    return None


def converted_inside(model: nn.Module) -> nn.Module | None:
    """The converted model that a module is or wraps; None for a dense one.

    Raises:
        ValueError: it is no module, it has no parameters, it contains several converted models, or parts or parameters of one without
            what `convert` recorded.
    """
    check_module(model)
    found = [
        m for m in model.modules() if "_lorank" in vars(m) or (isinstance(m, PreTrainedModel) and converted_with(m))
    ]
    outermost = found[:1]
    inside = {part for whole in outermost for part in whole.modules()}
    if apart := [m for m in found if m not in inside]:
        names = f"{type(outermost[0]).__name__} and {type(apart[0]).__name__}"
        raise ValueError(f"model must contain one converted model, got {names}; give each of them by itself")
    if outermost:
        return outermost[0]
    if any(
        "stands_for_linear" in vars(module) for module in model.modules()
    ):  # set by `rewrite`; EGG's class has it too
        raise ValueError(f"model must be the whole converted model, got only a {type(model).__name__} from it")
    own = set(map(id, model.parameters()))
    if any(converted_with(m) and not own.isdisjoint(map(id, m.parameters())) for m in list(REWRITTEN)):
        raise ValueError(
            f"model must be the converted model or a module around it, got a {type(model).__name__} that has its parameters but not its "
            "modules"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"model must have parameters, got a {type(model).__name__} without any; give the model that was converted"
        )
    return None


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside those of accelerate and Lightning, whose steps alone call its hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def _methods(inner: nn.Module | None, optimizer: Optimizer | None) -> list[Method]:
    """The methods of a converted model and of an optimizer that `optimizer` made."""
    found = [None if inner is None else method_of(inner), getattr(optimizer, "lorank_method", None)]
    return [method for method in found if method is not None]


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"steps must be the optimizer steps of the whole run, a positive integer, got {steps!r} (Trainer passes them to "
            "create_scheduler; its max_steps is -1 if it counts epochs)"
        )
