"""Make noise-image pairs with the teacher's solver, or of real images, for reflow."""

from __future__ import annotations

from stepdistill.config.places import Here
from stepdistill.config.teacher import TeacherOptions
from stepdistill.core.options import Count, Guidance, PairSolver, Seed


class Options(TeacherOptions):
    prompts_file: Here | None = None
    """Noises are solved to images of these prompts."""
    train_data_dir: Here | None = None
    """Of a model that reads images beside the prompt, a folder of captions with these (first frames
    of videos, images to edit)."""
    invert: Here | None = None
    """Or a folder of real images, inverted to noises (rf++)."""
    pairs_dir: str
    """Folder of the set; a call that was cut off goes on there."""
    num_pairs: Count | None = None
    """Needed with prompts_file; none means all rows of a folder."""
    num_steps: Count = 50
    """Steps of the teacher's solver."""
    solver: PairSolver = "ddim"
    """First order, or second without further calls (multistep, Adams and Bashforth's): on the
    demo's teacher 16 of its steps are nearer to the exact end than 32 of ddim."""
    guidance: Guidance = 1.0
    """null + g (cond - null)."""
    resolution: Count | None = None
    """Height and width in px; none means the model's own size."""
    batch_size: Count = 16
    """Pairs solved at once; the last bits of a network depend on it."""
    seed: Seed = 0
    """Pair i starts from noise of seed + i."""


def run(options: Options) -> None:
    from stepdistill.pairs.teacher import make_pairs

    given = options.model_dump(exclude=set(TeacherOptions.model_fields))
    where = (given.pop("prompts_file"), given.pop("pairs_dir"))
    print(make_pairs(options.source, *where, **given))
