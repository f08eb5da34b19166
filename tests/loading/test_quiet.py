"""Only what is listed is hidden, and warnings of ours are a line each."""

from __future__ import annotations

import logging
import warnings

import pytest

from stepdistill.loading import quiet


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quiet.quieten()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("There are modules in UNet2DConditionModel that should be kept in float32: []. Cast", 0),
        ("There are modules in UNet2DConditionModel that should be kept in float32: ['x']", 1),
        ("something else", 1),
    ],
)
def test_a_log_record_is_hidden_by_its_message(text, shown) -> None:
    logger, seen = logging.getLogger("diffusers.models.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.error("%s", text)  # libraries may be told to be silent below that
    logger.removeHandler(handler)
    assert len(seen) == shown


def test_a_warning_is_hidden_by_its_message() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.quieten()
        told = "The configuration file of this scheduler: X {\n} is outdated. `steps_offset` should"
        warnings.warn(told, FutureWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["another"]


def test_warnings_of_ours_are_one_line() -> None:
    assert warnings.formatwarning("no", UserWarning, quiet.__file__, 3) == "warning: no\n"
    assert "UserWarning" in warnings.formatwarning("no", UserWarning, "/elsewhere.py", 3)


def test_bars_of_libraries_are_drawn_again_after() -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    both, before = (of_diffusers, of_transformers), of_diffusers.is_progress_bar_enabled()
    of_diffusers.enable_progress_bar()
    of_transformers.disable_progress_bar()  # by the user
    with quiet.without_bars("diffusers", "transformers"):
        assert [one.is_progress_bar_enabled() for one in both] == [False, False]
    assert [one.is_progress_bar_enabled() for one in both] == [True, False]
    of_transformers.enable_progress_bar()
    if not before:
        of_diffusers.disable_progress_bar()
