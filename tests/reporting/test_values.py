"""Numbers for people: what is counted, in the singular where it is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import stepdistill
from stepdistill.monitoring.validation_line import line_of
from stepdistill.reporting.values import any_of, counted

NOUNS = "updates|steps|images|prompts|pictures|samples|pairs|processes|rows|lines|shards|channels"
UNCOUNTED = re.compile(r"\{[^{}]*\} (" + NOUNS + r")\b(?!/)")
# Never one, or a list of several: by what stands there.
MANY = {
    *("{LEAST_IMAGES} images", "{len(files)} images", "{NUM_STEPS} steps", "{list(counts)} steps"),
    *("{facts['manifold_images']} images", "{self.pictures:,} pictures", "{spec.num_steps} steps"),
    *("{count} rows", "{_SEED} steps"),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (counted(1, "update"), "1 update"),
        (counted(0, "image"), "0 images"),
        (counted(10_000, "update"), "10,000 updates"),
        (counted(1, "process"), "1 process"),
        (counted(2, "process"), "2 processes"),
        (any_of((1,), "step"), "1 step"),
        (any_of((1, 2), "step"), "1 or 2 steps"),
        (any_of((1, 4), "step", "and"), "1 and 4 steps"),
    ],
)
def test_one_is_no_plural(text: str, expected: str) -> None:
    assert text == expected


def test_every_count_in_a_text_is_counted() -> None:
    root, wrong = Path(stepdistill.__file__).parent, []
    for file in sorted(root.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            texts = [one[0] for one in UNCOUNTED.finditer(line)] if 'f"' in line else []
            wrong += [f"{file.relative_to(root)}:{number}: {t}" for t in texts if t not in MANY]
    assert not wrong


def test_a_run_s_own_validation_is_told_in_the_singular() -> None:
    one = {"steps": 1, "prompts": ["a"], "images": 1, "share": 0.01}
    assert line_of(one).startswith("validation: every update on 1 prompt of 1 image (")
    several = {"steps": 20, "prompts": ["a", "b"], "images": 4, "share": 0.01}
    assert line_of(several).startswith("validation: every 20 updates on 2 prompts of 4 images (")
