"""Read a RunConfig from YAML files and flags: files merge left to right, flags come last.

An unknown key is an error that names the nearest keys. Flags, types and --help come from the
config classes through pydantic-settings; there is no parser of our own.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Method, MethodConfig
from stepdistill.methods import METHODS


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `update` laid over it, nested mappings key by key."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Errors: ValueError for a missing file or another shape."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config: expected a YAML file, got {str(path)!r}, which is not there.")
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ValueError(f"{path}: expected valid YAML, got {' '.join(str(err).split())}.") from err
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(loaded).__name__}.")
    return loaded


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every option of a config class as a dotted name."""
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += field_names(info.annotation, f"{prefix}{name}.")
    return names


def explain(err: ValidationError, model: type[BaseModel], where: str) -> ValueError:
    """One ValueError that lists what is wrong, with the nearest names for unknown keys."""
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, field_names(model), n=3, cutoff=0.4)
            lines.append(f"expected a known option, got {key!r}. Nearest: {near or 'none'}.")
        elif item["type"] == "missing":
            lines.append(f"expected {key}, got nothing. Set it in a config file or as --{key}.")
        elif item["type"] == "value_error":  # a rule of ours, which says it all
            lines.append(f"{item['ctx']['error']}".rstrip(".") + ".")
        else:
            lines.append(f"{key}: {item['msg']}, got {item['input']!r}.")
    return ValueError(f"{where}: " + " ".join(lines))


def resolve_method(
    name: str, options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """(a name in METHODS, options) of a method called by that or by a user's name for it.

    What a user's name stands for lies under the options given. Errors: ValueError naming the
    nearest.
    """
    given, plain = dict(options or {}), name.lower().replace("-", "_")
    if plain in METHODS:
        return plain, given
    aliases = {alias: cls for cls in METHODS.values() for alias in cls.aliases}
    if plain in aliases:
        return aliases[plain].name, merge(aliases[plain].aliases[plain], given)
    near = difflib.get_close_matches(plain, [*METHODS, *aliases], n=3, cutoff=0.3)
    raise ValueError(
        f"method: expected one of {sorted(METHODS)}, got {name!r}. Nearest: {near or 'none'}."
    )


def method_class(name: str) -> type[Method[Any]]:
    """The method of that name, see `resolve_method`."""
    return METHODS[resolve_method(name)[0]]


def method_config(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """The validated Config of a method. Errors: ValueError naming unknown keys' neighbours."""
    name, options = resolve_method(name, options)
    cls = METHODS[name]
    try:
        return cls.Config(**options)
    except ValidationError as err:
        raise explain(err, cls.Config, f"method_config of {name}") from err


class _FlagsOverFiles(BaseSettings):
    """Settings whose only sources are flags and the merged files; never the environment."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_exit_on_error=False,
        cli_implicit_flags=True,
        cli_kebab_case=False,
        cli_avoid_json=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def parse_run_config(argv: Sequence[str], prog: str = "stepdistill", method: str = "") -> RunConfig:
    """The RunConfig that `--config a.yaml b.yaml --flag value ...` describes.

    Args: method: the default method of the launcher, where neither file nor flag names one.
    Errors: ValueError for unknown or malformed options; SystemExit for --help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="+", default=[])
    first.add_argument("--method")
    known, rest = first.parse_known_args(list(argv))
    values: dict[str, Any] = {"method": method} if method else {}
    for path in known.config:
        values = merge(values, read_yaml(path))
    if known.method:
        values["method"] = known.method
    name = values.get("method")
    if name:
        name, options = resolve_method(str(name), values.get("method_config"))
        values |= {"method": name, **({"method_config": options} if options else {})}
    fields: dict[str, Any] = {
        key: (info.annotation, info) for key, info in RunConfig.model_fields.items()
    }
    if name:
        config = METHODS[name].Config
        fields["method_config"] = (config, config())
    flags: Any = create_model("RunConfig", __base__=_FlagsOverFiles, **fields)
    try:
        parsed = flags(_cli_parse_args=_spelt_out(rest), _cli_prog_name=prog, **values)
    except ValidationError as err:
        raise explain(err, flags, "config") from err
    except SettingsError as err:
        raise _unknown_flags(err, rest, flags) from err
    try:
        return RunConfig(**parsed.model_dump())
    except ValidationError as err:
        raise explain(err, RunConfig, "config") from err


def _spelt_out(argv: Sequence[str], switch: str = "gradient_checkpointing") -> list[str]:
    """The flags with a value beside the one switch that takes a third (auto): --X is --X true."""
    spelt: list[str] = []
    for arg, after in pairwise([*argv, "--"]):
        if arg == f"--no-{switch}":
            spelt += [f"--{switch}", "false"]
        else:
            spelt += [arg, "true"] if arg == f"--{switch}" and after.startswith("--") else [arg]
    return spelt


def _unknown_flags(err: Exception, argv: Sequence[str], model: type[BaseModel]) -> ValueError:
    names = field_names(model)
    flags = [arg.split("=")[0][2:] for arg in argv if arg.startswith("--")]
    unknown = [flag for flag in flags if flag not in names and f"{flag[3:]}" not in names]
    near = {flag: difflib.get_close_matches(flag, names, n=3, cutoff=0.4) for flag in unknown}
    if not unknown:
        return ValueError(f"flags: {err}.")
    return ValueError(f"flags: expected known options, got {unknown}. Nearest: {near}.")
