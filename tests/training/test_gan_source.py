"""A data source of the discriminator's own: prompts for the student, real images for the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.resume import resumed_differs
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir
from support.samples import COUNT, dataset_of, image_folder, told

from stepdistill import DistributionMatchingTrainer, TrainConfig
from stepdistill.cli import main
from stepdistill.config.files import parse_run_config
from stepdistill.core.method import Setting
from stepdistill.core.path import VPPath
from stepdistill.core.types import Batch
from stepdistill.data.images import ImageFolderDataset
from stepdistill.families.registry import load_family
from stepdistill.methods import judge
from stepdistill.methods.dmd2 import DMD2
from stepdistill.planning.forecast import forecast
from stepdistill.trainers import DistillationTrainer
from stepdistill.training.batches import BatchMaker
from stepdistill.training.feed import Feed

GAN = {"num_steps": 1, "critic_steps": 2, "gan": {"weight_g": 1e-2}}
PROMPTS = [f"thing {i}" for i in range(3)]
SHAPE = (4, 8, 8)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


class Real(TinyData):
    """Samples of one value each, told by it."""

    def __init__(self, count: int = 5) -> None:
        self.items = [
            {"prompt": f"real {i}", "x0": torch.full(SHAPE, float(i))} for i in range(count)
        ]


def trainer_of(teacher, folder, data=PROMPTS, gan_dataset=None, options=GAN, **more: Any) -> Any:
    args = TrainConfig(
        output_dir=str(folder), train_batch_size=2, max_train_steps=2, checkpointing_steps=0,
        disable_progress_bar=True, tuning={"rank": 2}, **more,
    )  # fmt: skip
    return DistributionMatchingTrainer(
        teacher, args, data, "dmd2", options, gan_dataset=gan_dataset
    )


@pytest.fixture
def batches(monkeypatch) -> list[Batch]:
    """Fills with the batches that a trainer makes."""
    made: list[Batch] = []
    make = BatchMaker.__call__

    def noting(*args: Any) -> Batch:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(BatchMaker, "__call__", noting)
    return made


# ------------------------------------------------------------------- who reads what
@pytest.mark.full
def test_each_loss_reads_its_own_source(teacher, tmp_path, batches, monkeypatch) -> None:
    """Prompts of the one, x0 and their prompts of the other, drawn for the head's updates alone."""
    judged, disc_loss = [], judge.disc_loss

    def judging(nets: Any, gan: Any, ctx: Any, path: Any, real: Any, *rest: Any) -> Any:
        judged.append(real)
        return disc_loss(nets, gan, ctx, path, real, *rest)

    monkeypatch.setattr(judge, "disc_loss", judging)
    trainer = trainer_of(teacher, tmp_path, gan_dataset=Real())
    trainer.train()
    for_head = [False, True, True] * 2  # the student's update, then two of fake and head
    assert [batch.gan is not None for batch in batches] == for_head
    assert all(batch.x0 is None for batch in batches)
    assert {prompt.split()[0] for batch in batches for prompt in batch.prompts} == {"thing"}
    assert len(judged) == 4
    for real in judged:
        numbers = [int(row.mean()) for row in real.x0]
        assert torch.equal(real.x0, torch.stack([torch.full(SHAPE, float(n)) for n in numbers]))
        expected = trainer.family.encode([f"real {n}" for n in numbers])
        assert torch.allclose(real.cond["prompt_embeds"], expected["prompt_embeds"], atol=1e-5)
    assert (trainer.feed.seen, trainer.gan_feed.seen) == (6, 4)


@pytest.mark.full
def test_a_rollout_from_data_keeps_the_run_s_own_images(teacher, tmp_path, batches) -> None:
    data = TinyData(SHAPE, "prompt", ("x0",))
    trainer_of(teacher, tmp_path, data, Real(), {**GAN, "rollout": "data"}).train()
    own = {float(item["x0"].sum()) for item in data.items}
    assert all({float(row.sum()) for row in batch.x0} <= own for batch in batches)
    assert sum(batch.gan is not None for batch in batches) == 4


def test_without_one_the_run_s_own_data_are_real(teacher, tmp_path) -> None:
    data = TinyData(SHAPE, "prompt", ("x0",))
    trainer = trainer_of(teacher, tmp_path, data)
    batch = trainer.batches(next_raw(trainer))
    assert batch.gan is None
    assert batch.real == (batch.x0, batch.cond)
    assert trainer.gan_feed is None
    assert "gan" not in trainer.facts["data"]


def next_raw(trainer: Any) -> dict[str, Any]:
    trainer.feed.open(None, trainer.accelerator)
    return next(trainer.feed)


def test_the_record_names_both(teacher, tmp_path) -> None:
    gan = ImageFolderDataset(image_folder(tmp_path / "images"), 16)
    facts = trainer_of(teacher, tmp_path / "run", gan_dataset=gan).facts["data"]
    assert (facts["source"], facts["items"]) == ("PromptDataset", 3)
    assert facts["gan"]["items"] == COUNT
    assert facts["gan"]["sha256"] == gan.fingerprint()


def test_rows_of_the_two_sources_are_not_confused(make_family) -> None:
    """Images without a content hash are known by their row's number, which both sources count."""
    family = make_family("sd_v")
    maker = BatchMaker(family, torch.device("cpu"))
    raws = [
        {"index": [0, 1], "prompt": ["a", "b"], "image": torch.full((2, 3, 16, 16), value)}
        for value in (-1.0, 1.0)
    ]
    batch = maker(raws[0], True, raws[1])
    assert batch.gan is not None
    assert torch.equal(batch.gan[0][0], family.latents(raws[1]["image"][:1])[0])
    assert not torch.equal(batch.gan[0], batch.x0)


# ------------------------------------------------------------------- order and resume
@pytest.mark.sampled("images", "rows")
@pytest.mark.parametrize("kind", ["images", "tars", "rows", "stream"])
def test_its_stream_is_split_and_resumed_as_the_main_one(kind, tmp_path) -> None:
    data = dataset_of(kind, tmp_path)

    def numbers(batch: int, rank: int = 0, world: int = 1, start: int = 0, name="gan") -> Any:
        feed = Feed(data, TrainConfig(train_batch_size=batch), name)
        feed.seen = start
        feed.open(None, SimpleNamespace(process_index=rank, num_processes=world))
        return [told(next(feed)) for _ in range(12 - start)]

    whole = numbers(4)
    ranks = [numbers(2, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert not set(map(tuple, ranks[0])) & set(map(tuple, ranks[1]))
    assert numbers(4, start=5) == whole[5:]
    assert numbers(4, name="") != whole  # of one set for both, an order of its own
    assert sorted(n for batch in whole[: COUNT // 4] for n in batch) == list(range(COUNT))


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_cut_off_anywhere_goes_on_exactly(workers, tmp_path, tmp_path_factory) -> None:
    """Of 24 tar samples 2 an update of the head: the second epoch begins within the run."""
    gan = dataset_of("tars", tmp_path)
    gan.size_px = 16
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    options |= {"gan_dataset": gan, "max_train_steps": 4}
    teacher = teacher_dir("sd3", tmp_path_factory)
    differ, update, total = resumed_differs(
        "dmd2_two_sources", teacher, "lora", tmp_path / "runs", **options
    )
    assert not differ, f"cut off at update {update} of {total}: {differ[:5]}"


# ------------------------------------------------------------------- cache
@pytest.mark.full
def test_the_cache_holds_both(teacher, tmp_path, monkeypatch) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    flags = ["--pretrained_model_name_or_path", str(teacher), "--cache_dir", str(tmp_path / "c")]
    flags += ["--data.prompts_file", str(tmp_path / "p.txt"), "--resolution", "16"]
    flags += ["--data.gan.train_data_dir", str(image_folder(tmp_path / "images"))]
    main(["cache", *flags])
    flags += ["--method", "dmd2", "--method_config.gan.weight_g", "0.01", "--max_train_steps", "2"]
    flags += ["--method_config.num_steps", "1", "--disable_progress_bar", "--tuning.rank", "2"]
    run = parse_run_config([*flags, "--output_dir", str(tmp_path / "cached")])
    trainer = DistillationTrainer.from_config(run)
    disk = trainer.batches.disk
    assert (len(disk.prompts), len(disk.latents)) == (len(PROMPTS) + COUNT, COUNT)
    null = trainer.family.null(1)

    def refuse(*_args: Any) -> None:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.family, "null", lambda bsz: null)
        patch.setattr(trainer.family, "encode", refuse)
        patch.setattr(trainer.family, "latents", refuse)
        trainer.train()
    again = run.model_copy(update={"cache_dir": None, "output_dir": str(tmp_path / "plain")})
    plain = DistillationTrainer.from_config(again)
    plain.train()
    ours, theirs = (fingerprint(t.bank.members("student")) for t in (trainer, plain))
    assert ours == theirs


# ------------------------------------------------------------------- bad input, plan
def test_prompts_alone_are_no_real_samples(teacher, tmp_path, no_loading) -> None:
    with pytest.raises(ValueError, match=r"data\.gan: expected real samples .*--data\.gan"):
        trainer_of(teacher, tmp_path, gan_dataset=["a", "b"])


def test_real_samples_need_their_prompts(teacher, tmp_path, no_loading) -> None:
    silent = [{"x0": torch.zeros(SHAPE)}]

    class Untold(TinyData):
        def __init__(self) -> None:
            self.items = silent

    with pytest.raises(ValueError, match=r"with their prompts or labels, got \['x0'\]"):
        trainer_of(teacher, tmp_path, gan_dataset=Untold())


def test_a_gan_without_any_images(teacher, tmp_path, no_loading) -> None:
    with pytest.raises(ValueError, match=r"fields \['cond', 'real'\].*data\.gan\.train_data_dir"):
        trainer_of(teacher, tmp_path)


def test_a_source_that_no_loss_reads_is_told_and_left_alone(teacher, tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"data\.gan has no effect: no loss of dmd2.*weight_g"):
        trainer = trainer_of(teacher, tmp_path, gan_dataset=Real(), options={"num_steps": 1})
    assert trainer.gan_feed is None
    assert "gan" not in trainer.facts["data"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prompts_file", "p"], "expected a source of images .*got prompts_file 'p'"),
        (["image_column", "photo"], r"got none beside \['image_column'\]"),
        (["tar_shards", "a", "--data.gan.train_data_dir", "b"], "data.gan: expected one source"),
        (["streaming"], r"data\.gan: expected dataset_name beside streaming"),
    ],
)
def test_flags_that_name_no_source(flags, message) -> None:
    told = ["--pretrained_model_name_or_path", "m", "--method", "dmd2"]
    with pytest.raises(ValueError, match=message):
        parse_run_config([*told, f"--data.gan.{flags[0]}", *flags[1:]])


def test_a_saved_config_repeats_itself() -> None:
    told = ["--pretrained_model_name_or_path", "m", "--method", "dmd2"]
    run = parse_run_config([*told, "--data.gan.train_data_dir", "d"])
    assert type(run).model_validate_json(run.model_dump_json()).data == run.data


@pytest.mark.full
def test_the_plan_counts_the_same_work(tmp_path_factory) -> None:
    told = ["--pretrained_model_name_or_path", str(teacher_dir("sd3", tmp_path_factory))]
    told += ["--method", "dmd2", "--method_config.num_steps", "1"]
    told += ["--method_config.gan.weight_g", "0.01", "--tuning.rank", "2"]
    one = forecast(parse_run_config([*told, "--data.train_data_dir", "d"]))
    two = ["--data.prompts_file", "p", "--data.gan.train_data_dir", "d"]
    assert forecast(parse_run_config([*told, *two])).phases == one.phases


@pytest.mark.full
def test_what_it_learns_depends_on_the_source(teacher, tmp_path) -> None:
    found = []
    for name, count in (("a", 5), ("b", 5), ("c", 3)):
        trainer = build_trainer(
            "dmd2_two_sources", teacher, "lora", tmp_path / name, gan_dataset=Real(count)
        )
        trainer.train()
        found.append(fingerprint(trainer.bank.members("disc")))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_the_family_s_first_frames_are_asked_of_both(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_i2v", tmp_path_factory)
    shape = load_family(teacher).sample_shape()
    data = TinyData(shape, "prompt", (), beside="image")
    with pytest.raises(ValueError, match="expected items with an image, the video's first frame"):
        trainer_of(teacher, tmp_path, data, TinyData(shape, "prompt", ("x0",)))


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_the_published_recipes_take_it(name) -> None:
    told = ["--recipe", f"{name}-dmd2-gan"]
    told += ["--pretrained_model_name_or_path", "m", "--data.prompts_file", "p"]
    run = parse_run_config([*told, "--data.gan.tar_shards", "laion"])
    method: Any = DMD2(DMD2.Config(**run.method_config), Setting(VPPath.from_betas(BETAS)))
    assert method.needs == {"cond", "real"}
    assert method.config.gan.weight_g == {"sdxl": 5e-3, "sd15": 1e-3}[name]
    assert len(method.sampler().times) == {"sdxl": 4, "sd15": 1}[name]
