"""`stepdistill merge`: what two kinds of exports are merged by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepdistill.export.merge_adapters import merge_adapters, split_weight
from stepdistill.export.merge_pipelines import merge_pipelines


def merge_sources(sources: Sequence[str], out_dir: str | Path, method: str | None = None) -> Path:
    """Merge LoRA files by `merge_adapters`, two pipelines by `merge_pipelines`.

    Args: sources: `path[:weight]`; weights of pipelines sum to 1, by default a half each.
    """
    given = [split_weight(text) for text in sources]
    if not any((Path(path) / "model_index.json").is_file() for path, _ in given):
        return merge_adapters(sources, out_dir, method or "cat")
    weights = [weight for _, weight in given]
    if weights == [1.0, 1.0]:
        weights = [0.5, 0.5]
    if len(given) != 2 or method is not None or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(
            f"merge: expected two pipelines with weights that sum to 1 and no method, got "
            f"{list(sources)}" + (f" and method {method}." if method else ".")
        )
    return merge_pipelines(given[0][0], given[1][0], out_dir, weights[0])
