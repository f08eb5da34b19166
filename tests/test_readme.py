"""What the pages say is so: their code runs, their tables are the package's own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from benchmarks.letters_compared import KEPT as LETTERS
from benchmarks.same_budget import KEPT
from benchmarks.same_budget import table as same_budget
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from support.pages import COMMANDS, NAMES, README, ROOT, anchors, commands, links, page
from support.processes import LIMIT_S, run, run_script
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.comparison.results import read
from stepdistill.export.tool_rules import RULES
from stepdistill.families.registry import FAMILIES
from stepdistill.methods import METHODS
from stepdistill.planning.recipes import listed

METHODS_PAGE, FAMILIES_PAGE = (
    page("stepdistill/methods/README.md"),
    page("stepdistill/families/README.md"),
)
EXPORT_PAGE, PLANNING_PAGE = (
    page("stepdistill/export/README.md"),
    page("stepdistill/planning/README.md"),
)


def test_readme_is_for_the_person_who_arrives() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name) -> None:
    for link in links(page(name)):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_readme_or_contributing() -> None:
    seen = {"README.md", "CHANGELOG.md"}
    for start in ("README.md", "CONTRIBUTING.md"):
        seen |= {link.partition("#")[0] for link in links(page(start))}
    assert set(NAMES) <= seen


def test_quick_start_is_two_commands() -> None:
    assert '    pip install -e ".[demo]" && stepdistill demo ' in README
    assert '    pip install -e ".[dev]" && pytest ' in README


def test_python_example_runs(tmp_path, tmp_path_factory, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "teacher").symlink_to(teacher_dir("sd_v", tmp_path_factory))
    exec(compile(code.replace("max_train_steps=300", "max_train_steps=2"), "README", "exec"), {})
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_method_table_is_the_package_s() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| `(\w+)` \| ([^|]+) \|$", METHODS_PAGE, flags=re.MULTILINE
    )
    trainers = {cls.trainer for cls in METHODS.values()}
    told = {
        name: (trainer, status.strip()) for name, trainer, status in rows if trainer in trainers
    }
    own = {name: (cls.trainer, cls.status) for name, cls in METHODS.items()}
    assert told == own


def test_every_method_has_its_section_and_source() -> None:
    sections = dict(
        re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", METHODS_PAGE, re.MULTILINE | re.DOTALL)
    )
    assert set(sections) == set(METHODS)
    for name, text in sections.items():
        files = re.findall(r"`(\w+\.yaml)`", text)
        assert files, name
        assert all((ROOT / "configs/methods" / file).is_file() for file in files), name
        said = set(re.findall(r"\d{4}\.\d{5}", text))
        assert set(re.findall(r"\d{4}\.\d{5}", METHODS[name].paper)) <= said, name


def test_methods_are_compared_by_the_rows_that_are_kept() -> None:
    comparison = read(KEPT)
    assert "\n".join(same_budget(comparison, spread=False)) in README
    assert "\n".join(same_budget(comparison)) in METHODS_PAGE


@pytest.mark.parametrize(("prediction", "nth"), [("v", 0), ("epsilon", 1)])
def test_letters_are_compared_by_the_rows_that_are_kept(prediction, nth) -> None:
    told = page("tests/benchmarks/RESULTS.md").split("## Two teachers that are not the demo's")[1]
    tables = [part for part in told.split("\n\n") if part.startswith("| | 1 step |")]
    assert tables[nth].splitlines() == same_budget(read(LETTERS / prediction))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_a_picture_once(name) -> None:
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page(name))
    assert len(shown) == len(set(shown))


def numbers(table: str) -> dict[str, list[list[str]]]:
    """First cell of each row -> the numbers of its others, deviations left out."""
    rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| ")]
    plain = [
        (name.strip(), [re.sub(r" ± \S+", "", cell) for cell in cells]) for name, *cells in rows
    ]
    return {name: [re.findall(r"[\d.]+", cell) for cell in cells] for name, cells in plain}


def test_readme_s_figures_are_those_of_the_pages() -> None:
    for figures in numbers(README.split("| `dmd2` on |")[1].split("\n\n")[0]).values():
        for figure in [number for cell in figures for number in cell]:
            assert re.search(rf"\b{re.escape(figure)}\b", PLANNING_PAGE), figure


def test_recipe_table_is_the_package_s() -> None:
    table = (
        page("configs/README.md").split("| recipe | method | steps | data |")[1].split("\n\n")[0]
    )
    rows = re.findall(r"^\| `(\S+)` \| (`.+`) \| (.+) \| (\w+) \|$", table, flags=re.MULTILINE)
    assert rows == [
        (name, f"`{'`, `'.join(methods)}`", ", ".join(map(str, about.steps)) or "-", about.data)
        for name, (about, methods, _) in listed().items()
    ]


def test_family_table_is_the_package_s() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ((?:`\w+`[^|]*)+) \| [^|]+ \|$", FAMILIES_PAGE, flags=re.MULTILINE
    )
    told = {name: set(re.findall(r"`(\w+)`", classes)) for name, classes in rows}
    assert told == {name: set(family.pipelines) for name, family in FAMILIES.items()}


def test_users_names_are_told() -> None:
    said = METHODS_PAGE.split("Users' other names")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w+]+)`", said)) == {
        a for cls in METHODS.values() for a in cls.aliases
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_table_of_what_is_typed_is_the_package_s(name) -> None:
    table = FAMILIES_PAGE.split("| student of | typed")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", table, flags=re.MULTILINE)
    told = next((typed for who, typed in rows if f"`{name}`" in who), rows[-1][1])
    assert tuple(re.findall(r"`(num\w+|guid\w+)`", told)) == FAMILIES[name].typed


def test_table_of_tools_is_the_package_s() -> None:
    table = EXPORT_PAGE.split("| files that a tool reads whole |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.+`) \| (.*?) \|(.*?)\|(.*?)\|$", table, flags=re.MULTILINE)
    said = {
        name: tuple(tuple(re.findall(r"`(\w+)`", cell)) for cell in cells)
        for names, *cells in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    known = {k: r for k, r in RULES.items() if k != "sd2"}  # a Stable Diffusion to its family
    assert said == {k: (r.comfyui, r.a1111, r.sd_scripts) for k, r in known.items()}


def test_families_without_a_lora_loader_are_told() -> None:
    (said,) = re.findall(r"every family; (.*?), to which", EXPORT_PAGE, flags=re.DOTALL)
    names = {name.lower() for name in re.findall(r"\w+", said)} - {"and"}
    without = {name for name, family in FAMILIES.items() if not family.has_lora_loader()}
    assert names == {name.replace("_", "") for name in without}


@pytest.mark.parametrize(
    "path",
    sorted(
        {
            path
            for name in NAMES
            for path in re.findall(r"\b(?:train|configs)/[\w/]+\.(?:py|yaml)", page(name))
            if "NAME" not in path
        }
    ),
)
def test_every_named_file_exists(path) -> None:
    assert (ROOT / path).is_file()


def test_every_room_of_the_tree_exists() -> None:
    tree = page("CONTRIBUTING.md").split("## Where things are")[1].split("\n## ")[0]
    for name in re.findall(r"^      (\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / "stepdistill" / name).is_dir(), name


@pytest.mark.parametrize(
    "command", [["--help"], ["demo", "--help"], ["train", "--help"], ["list"]], ids=" ".join
)
def test_commands_answer(command) -> None:
    done = run(partial(main, command), COLUMNS="200")
    assert done.returncode == 0, done.stderr[-2000:]
    if command == ["list"]:
        assert all(name in done.stdout for name in METHODS)
    if command == ["train", "--help"]:
        assert "--tuning.student" in done.stdout


# Where each indented command of the pages is run: by CI's script, or by the test of that name.
RUN_BY = {
    r'pip install -e "\.\[\w+\]"': ".ci/run",
    r"accelerate launch train/distribution_matching\.py": "tests/test_readme.py",
    r"accelerate launch .*ddp\.yaml": "tests/test_launchers.py",
    r"ACCELERATE_USE_CPU=true accelerate launch .*cpu2\.yaml": "tests/test_launchers.py",
    r"accelerate launch .*fsdp2\.yaml": "tests/training/test_distributed.py",
    r"stepdistill particles ": "tests/particles/test_run.py",
    r"stepdistill (evaluate|compare) ": "tests/test_readme_evaluation.py",
    r"stepdistill (plan|train) --recipe ": "tests/test_readme.py",
    r"stepdistill (check DIR|export out|push out/lora)": "tests/test_readme.py",
    r"stepdistill plan .*path sdxl ": "tests/test_readme.py",
    r"stepdistill pairs .*path runs/high": "tests/export/test_experts.py",
    r"stepdistill (cache|train) .*--(cache_dir|data\.(tar|dataset))": (
        "tests/data/test_readme_commands.py"
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_somewhere(command) -> None:
    files = [file for pattern, file in RUN_BY.items() if re.match(pattern, command)]
    assert len(files) == 1, files
    if files == [".ci/run"]:
        told = re.split(r" +#|(?<=demo) ", command)[0]
        assert told in (ROOT / files[0]).read_text().replace(" --quiet", "")
    assert (ROOT / files[0]).is_file()


def run_here(command: str, *more: str) -> None:
    """One of the pages' `stepdistill` lines, with settings for a tiny model behind it."""
    main([*shlex.split(command.split("  #")[0])[1:], *more])


SMALL = ["--resolution", "32", "--tuning.rank", "2", "--train_batch_size", "1"]
SHORT = ["--max_train_steps", "1", "--gradient_accumulation_steps", "1", "--mixed_precision", "no"]


@pytest.fixture
def arrived(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """A folder with what README's commands name: a model, prompts, a LoRA of the user's."""
    teacher = teacher_dir("sdxl", tmp_path_factory).resolve()
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(teacher)
    Path("prompts.txt").write_text("a cat\na dog\n")
    pipe = DiffusionPipeline.from_pretrained(str(teacher))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights("style", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    next(Path("style").iterdir()).rename("style.safetensors")
    return tmp_path


@pytest.mark.full
def test_five_commands_for_a_fine_tune_run(arrived, capsys) -> None:
    check, _, train, export, push = [c for c in commands(README) if c.startswith("stepdistill")]
    with pytest.raises(SystemExit) as ended:
        run_here(check)
    assert ended.value.code == 0
    run_here(train, *SMALL, *SHORT)
    run_here(export)
    assert Path("out/lora/pytorch_lora_weights.safetensors").is_file()
    run_here(push)
    assert (arrived / "sent" / "README.md").is_file()


@pytest.mark.full
def test_plan_of_a_fine_tune_runs(arrived) -> None:
    (plan,) = [c for c in commands(README) if c.startswith("stepdistill plan")]
    with pytest.raises(SystemExit) as ended:
        run_here(plan, *SMALL)
    assert ended.value.code == 0


@pytest.mark.full
def test_the_recipe_s_page_s_command_runs(arrived) -> None:
    (train,) = commands(page("configs/README.md"))
    run_here(train, *SMALL, *SHORT, "--output_dir", "here")
    assert Path("here/pipeline/model_index.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize("starts", ["here", pytest.param("launcher", marks=pytest.mark.full)])
def test_first_launch_runs(starts, tmp_path, tmp_path_factory) -> None:
    (tmp_path / "DIR").symlink_to(teacher_dir("sd", tmp_path_factory).resolve())
    for name in ("configs", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (command,) = [c for c in COMMANDS if c.startswith("accelerate launch train/")]
    words = [*shlex.split(command)[2:], *SMALL, *SHORT]
    if starts == "here":
        done = run(partial(run_script, *words), cwd=tmp_path, ACCELERATE_USE_CPU="true")
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
        done = subprocess.run(
            [*launch, "--num_processes", "1", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


@pytest.mark.full
def test_plan_of_sdxl_runs(capsys) -> None:
    (command,) = commands(PLANNING_PAGE)
    with pytest.raises(SystemExit) as ended:
        run_here(command)
    assert ended.value.code == 0
    assert "GiB" in capsys.readouterr().out
