"""A scheduler's configuration, held against its class before one is built from it.

Stock classes take whatever a file says: a string is true, a shift below 0 turns the grid around,
an offset beyond the table ends a run in the middle of its first sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers

from stepdistill.loading.paper import Rule, check_numbers, is_finite, whole_number

MAX_TIMESTEPS = 100_000  # of a noise table
# What a class that reads one of these makes a noise table of.
_TABLES = {"beta_start", "shift", "rho"}


def _between(low: float, high: float) -> Rule:
    return lambda v: is_finite(v) and low < v < high, f"a number between {low:g} and {high:g}"


def _one_of(*names: str) -> Rule:
    return lambda v: v in names, " or ".join(map(repr, names))


# Of their values none is looked at before it is used.
_RULES: dict[str, Rule] = {
    "num_train_timesteps": whole_number(1, MAX_TIMESTEPS),
    "steps_offset": whole_number(0, MAX_TIMESTEPS),
    "solver_order": whole_number(1, 3),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), whole_number(1, 2**31)),
    **dict.fromkeys(("beta_start", "beta_end", "shift_terminal"), _between(0, 1)),
    # An export of ours begins at 0, a table with zero terminal SNR ends at 1.
    "trained_betas": (lambda v: is_finite(v) and 0 <= v <= 1, "numbers from 0 to 1"),
    **dict.fromkeys(("shift", "flow_shift", "rho"), _between(0, 1000)),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "snr_shift_scale"), _between(0, 1e6)),
    **dict.fromkeys(("sample_max_value", "clip_sample_range"), _between(0, 1e6)),
    "dynamic_thresholding_ratio": (lambda v: is_finite(v) and 0 < v <= 1, "a number from 0 to 1"),
    "timestep_spacing": _one_of("leading", "linspace", "trailing"),
    "interpolation_type": _one_of("linear", "log_linear"),
}
# What stock classes look at themselves, and read in each other's files: solvers by other names.
_TRANSLATED = {"algorithm_type", "beta_schedule", "solver_type", "variance_type"}
_ADVICE = "Correct it, or save the pipeline with its scheduler anew."


def check_scheduler(cls: type[Any], config: Mapping[str, Any], where: str) -> None:
    """Errors: ValueError for a configuration of another kind of scheduler, a value of another type
    than the class reads, or numbers that make no noise table; file, rule and value are named.

    Args: config: as `load_config` reads it. where: the file.
    """
    _check_class(cls, config, where)
    parameters = _parameters(cls)
    takes = {k: p for k, p in parameters.items() if k in config}
    check_numbers(config, where, {k: rule for k, rule in _RULES.items() if k in takes})
    hints = get_type_hints(cls.__init__)
    for key, parameter in takes.items():
        value, default = config[key], parameter.default
        hint = hints.get(key)
        if hint is None or key in _TRANSLATED or value == default:
            continue
        # UniPC calls its sigma_max and shift_terminal truth values: they have rules above.
        if not _fits(hint, value) and not (default is None and bool in _known(hint)):
            raise ValueError(
                f"{where}: expected {key} to be {_rule(hint)}, got {value!r}. {_ADVICE}"
            )
    read = {k: config.get(k, p.default) for k, p in parameters.items()}
    _check_together(read, where)


def _parameters(cls: type[Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _check_class(cls: type[Any], config: Mapping[str, Any], where: str) -> None:
    """Errors: ValueError where the file was saved by a class that makes its table of other keys."""
    named = config.get("_class_name", cls.__name__)
    if named == cls.__name__:
        return
    saved = getattr(diffusers, named, None) if isinstance(named, str) else None
    if not isinstance(saved, type) or (
        _TABLES & _parameters(saved).keys() != _TABLES & _parameters(cls).keys()
    ):
        raise ValueError(
            f"{where}: expected a configuration of {cls.__name__}, which model_index.json names, "
            f"got _class_name {named!r}. {_ADVICE}"
        )


def _check_together(values: Mapping[str, Any], where: str) -> None:
    """Errors: ValueError for values that are right alone and wrong together."""
    steps, betas = values.get("num_train_timesteps"), values.get("trained_betas")
    if betas is not None and len(betas) != steps:
        raise ValueError(
            f"{where}: expected trained_betas of num_train_timesteps {steps}, got {len(betas)}. "
            f"{_ADVICE}"
        )
    for low, high in (
        ("beta_start", "beta_end"),
        ("steps_offset", "num_train_timesteps"),
        ("sigma_min", "sigma_max"),
        ("base_image_seq_len", "max_image_seq_len"),
    ):
        one, other = values.get(low), values.get(high)
        if one is None or other is None:
            continue
        if one > other or (one == other and low != "beta_start"):
            raise ValueError(
                f"{where}: expected {low} below {high}, got {one!r} and {other!r}. {_ADVICE}"
            )
    kind = values.get("prediction_type")
    if "use_flow_sigmas" in values and bool(values["use_flow_sigmas"]) != (
        kind == "flow_prediction"
    ):
        raise ValueError(
            f"{where}: expected prediction_type flow_prediction with use_flow_sigmas and no other, "
            f"got {kind!r} with use_flow_sigmas {values['use_flow_sigmas']!r}. {_ADVICE}"
        )
    if values.get("timestep_type") == "continuous" and kind == "v_prediction":
        raise ValueError(
            f"{where}: expected timestep_type discrete, got 'continuous', which tells the network "
            "log sigma in place of a table's index. Such teachers have no noise path here."
        )


_SIMPLE: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda v: v is None or isinstance(v, bool), "true or false"),
    int: (lambda v: type(v) is int, "a whole number"),
    float: (is_finite, "a finite number"),
    str: (lambda v: isinstance(v, str), "a text"),
    list: (lambda v: isinstance(v, list | tuple), "a list"),
    NoneType: (lambda v: v is None, "null"),
}


def _known(hint: Any) -> list[Any]:
    """Those of its alternatives that a configuration can hold: no array, no object."""
    every = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [one for one in every if one in _SIMPLE or get_origin(one) in (Literal, list)]


def _fits(hint: Any, value: Any) -> bool:
    """Whether it is of that type; one that no configuration can hold is not looked at."""
    for one in _known(hint):
        if get_origin(one) is Literal:
            fits = value in get_args(one)
        elif get_origin(one) is list:
            fits = isinstance(value, list | tuple) and all(
                _fits(get_args(one)[0], v) for v in value
            )
        else:
            fits = _SIMPLE[one][0](value)
        if fits:
            return True
    return not _known(hint)


def _rule(hint: Any) -> str:
    """The type in words."""
    words = []
    for one in _known(hint):
        if get_origin(one) is Literal:
            words += [repr(v) for v in get_args(one)]
        else:
            words.append(_SIMPLE[get_origin(one) or one][1])
    return " or ".join(words)
