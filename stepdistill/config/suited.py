"""Settings that suit the model at hand: the one path by which every command settles them.

A small model's recipe, what a recipe says of networks of the model's kind, the model's own
guidance, and what a method's file asks of a model that can't: each is changed only where a file of
ours has said it, and told. What the user has said (a file of one's own, a flag) stays, and is
refused where the model can't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stepdistill.config.guidance import guided
from stepdistill.config.layers import Layer, for_network, merge
from stepdistill.config.method_names import resolve_method
from stepdistill.config.model_at_hand import ModelAtHand

if TYPE_CHECKING:
    from stepdistill.core.method import Method


class HasMethod(Protocol):
    """A run's settings, as far as they are settled here."""

    @property
    def method(self) -> str: ...

    @property
    def method_config(self) -> Mapping[str, Any]: ...


R = TypeVar("R", bound=HasMethod)
Why = Mapping[str, str]  # option of the method -> what has settled it
Read = Callable[[Sequence[Layer], ModelAtHand], tuple[R, Why]]


def suited(
    cls: type[Method[Any]],
    layers: Sequence[Layer],
    options: Mapping[str, Any],
    at_hand: ModelAtHand,
) -> tuple[dict[str, Any], Why]:
    """The method's options, of these layers, as they suit the model."""
    changed, said = guided(cls, layers, options, at_hand.family, at_hand.abilities.has_null)
    why, made = dict.fromkeys(changed, said), merge(options, changed)
    for name, (value, reason) in cls.Config.unfit(made, at_hand.abilities).items():
        if _is_ours(layers, name):
            made[name], why[name] = value, reason
    return made, why


def _is_ours(layers: Sequence[Layer], option: str) -> bool:
    """Whether the last file to say an option of the method, if any, is one of configs/."""
    saying = [one for one in layers if option in (one.values.get("method_config") or {})]
    return not saying or bool(saying[-1].kind)


def settled(
    read: Read[R],
    run: R,
    layers: Sequence[Layer],
    at_hand: ModelAtHand,
    by_size: bool = False,
    otherwise: Sequence[Layer] = (),
    called: str = "",
    flags: str = "--recipe or --config NAME",
) -> tuple[R, list[str]]:
    """(the run under the model at hand, a line about each thing that was settled). Warns of a
    recipe for another model.

    Args: read: the run of some files for a model, and what `suited` has settled. run: that of
        `layers`, nothing of the model known. by_size: whether a small model gets its recipe where
        there are no layers. otherwise: the layers where it gets none. called: the user's name of
        the method; what it stands for lies over such a recipe. flags: what a user sets another
        recipe by.
    """
    lines: list[str] = []
    if by_size and not layers:
        layers, lines = at_hand.recipe_by_size(run.method, called, flags)
        stands_for = resolve_method(called)[1] if called else {}
        if layers and stands_for:
            layers = [*layers, Layer("--method", {"method_config": stands_for}, kind="methods")]
        layers = layers or otherwise
        run, _ = read(layers, ModelAtHand()) if layers else (run, {})
    at_hand.check_recipe(layers)
    whole = for_network(layers, kind := at_hand.abilities.kind)
    added = [layer for layer in whole if layer not in layers]
    made, why = read(whole, at_hand)
    if added and made == read(layers, at_hand)[0]:
        added = []  # the user has said otherwise
    before, after = dict(run.method_config), dict(made.method_config)
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        if after[name] != before.get(name):
            change = f"{name} {_shown(after[name])} in place of {_shown(before.get(name))}"
            by_reason.setdefault(reason, []).append(change)
    lines += [f"{', '.join(_options(one.values))}, as the network answers {kind}" for one in added]
    return made, [*lines, *(f"{', '.join(names)}, as {why}" for why, names in by_reason.items())]


def _options(values: Mapping[str, Any]) -> list[str]:
    """Options in words, those of groups by their own names."""
    made: list[str] = []
    for name, value in values.items():
        made += _options(value) if isinstance(value, Mapping) else [f"{name} {_shown(value)}"]
    return made


def _shown(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # a file's, as a flag's
