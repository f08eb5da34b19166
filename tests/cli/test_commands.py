"""Files, flags, unknown names, --help and mistakes are the same in every command."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepdistill.cli import __file__ as cli_file
from stepdistill.cli import commands, main
from stepdistill.cli import compare as compare_command
from stepdistill.config.files import parse_run_config
from stepdistill.config.flags import parse_options
from stepdistill.config.run import RunConfig

TEACHER = ["--pretrained_model_name_or_path", "me/x"]
# Of each command: what it can't do without, and one option with two values, as typed and as read.
CALLS: dict[str, tuple[list[str], str, tuple[Any, Any]]] = {
    "cache": ([*TEACHER, "--cache_dir", "c"], "seed", (1, 2)),
    "check": (["dir"], "base_quantization", ("int8", "nf4")),
    "compare": (["--output_dir", "out"], "processes", (2, 3)),
    "demo": ([], "seconds", (1.5, 2.5)),
    "decoder": (["--student", "dir", "--train_data_dir", "dir"], "seed", (1, 2)),
    "doctor": ([], "format", ("json", "markdown")),
    "evaluate": (["--teacher", "dir", "--student", "a"], "seeds", ((1, 2), (3,))),
    "export": (["run", "out"], "num_steps", (2, 4)),
    "features": (["train", "--train_data_dir", "dir"], "seed", (1, 2)),
    "list": ([], "", (None, None)),
    "merge": (["a:0.5", "b", "--output", "out"], "method", ("cat", "linear")),
    "multi_student": ([*TEACHER, "--method", "dmd2"], "num_students", (2, 3)),
    "particles": ([], "gradients", (("sds:100", "vsd"), ("csd",))),
    "optimise_latent": (["dir", "--prompt", "a", "--structure", "AB"], "seed", (1, 2)),
    "pairs": ([*TEACHER, "--pairs_dir", "p"], "guidance", (2.5, 3.0)),
    "plan": (
        ["--pretrained_model_name_or_path", "sdxl", "--method", "dmd2"],
        "memory_gb",
        (24.0, 48.0),
    ),
    "push": (["folder", "me/name"], "dry_run", ("a", "b")),
    "recipes": ([], "", (None, None)),
    "report": (["run"], "", (None, None)),
    "sample": (["dir", "--prompt", "a"], "seed", (1, 2)),
    "train": ([*TEACHER, "--method", "dmd2"], "role_learning_rates", ({"fake": 1e-4}, {"fake": 2})),
    "widen": (["--model", "dir"], "output_dir", ("a", "b")),
}
WITH_OPTIONS = [name for name, (_, option, _) in CALLS.items() if option]


@pytest.fixture
def places(monkeypatch, tmp_path) -> None:
    """A working folder with all that CALLS name."""
    for name in ("dir", "run", "folder", "a", "b"):
        (tmp_path / name).mkdir()
        for file in ("model_index.json", "run.json", "distillation.json"):
            (tmp_path / name / file).write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch, places) -> list[Any]:
    """The options that each command was run with; none does its work."""
    from importlib import import_module

    found: list[Any] = []
    for name in commands():
        monkeypatch.setattr(import_module(f"stepdistill.cli.{name}"), "run", found.append)
    return found


def typed(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def test_every_command_is_called_here() -> None:
    assert set(CALLS) == set(commands())


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_flags_lie_over_the_last_file_over_the_first(name, ran, tmp_path) -> None:
    needed, option, (one, two) = CALLS[name]
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text(json.dumps({option: two}))
    files[1].write_text(json.dumps({option: one}))
    main([name, *needed, f"--{option}", *typed(two)])
    main([name, *needed, "--config", *map(str, files)])
    main([name, *needed, "--config", str(files[1]), f"--{option}", *typed(two)])
    assert [getattr(options, option) for options in ran] == [two, one, two]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_an_unknown_flag_names_the_nearest(name, ran) -> None:
    needed, option, (one, _) = CALLS[name]
    with pytest.raises(SystemExit, match=rf"^error: .*Nearest: .*'{option}'") as ended:
        main([name, *needed, f"--{option}x", *typed(one)])
    assert "\n" not in str(ended.value)
    assert not ran


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_an_unknown_key_of_a_file_names_the_nearest(name, ran, tmp_path) -> None:
    needed, option, (one, _) = CALLS[name]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({f"{option}x": one}))
    with pytest.raises(SystemExit, match=rf"^error: .*Nearest: .*'{option}'") as ended:
        main([name, *needed, "--config", str(tmp_path / "a.yaml")])
    assert "\n" not in str(ended.value)
    assert not ran


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("flags", [["--config", "nowhere.yaml"], ["--nothing_like_it", "1"]])
def test_mistakes_are_one_line_and_status_1(name, flags) -> None:
    with pytest.raises(SystemExit, match=r"^error: ") as ended:
        main([name, *CALLS[name][0], *flags])
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("name", [name for name, (needed, _, _) in CALLS.items() if needed])
def test_what_is_missing_is_named(name) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*(expected|required)") as ended:
        main([name])
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("name", CALLS)
def test_help_tells_the_command_and_its_options(name, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help", "all"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert commands()[name] in told
    assert f"--{CALLS[name][1]}" in told


@pytest.mark.parametrize("name", ["train", "plan"])
def test_help_shows_what_matters_first(name, capsys) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    flags = set(re.findall(r"^  --(\S+)", told, re.MULTILINE)) - {"config"}
    assert flags == {
        *RunConfig.first,
        *({"num_gpus", "gpu", "memory_gb"} if name == "plan" else ()),
    }
    assert len(RunConfig.first) == 20
    assert "--watchdog" not in told
    assert re.search(rf"\d+ more options: stepdistill {name} --help all", told)


def test_mistakes_and_the_list_need_no_torch(tmp_path) -> None:
    """One process for all: none of these may import torch, so a later one finds it absent."""
    gone = str(tmp_path / "gone")
    calls = [
        ["list"],
        ["train", "--method", "dmd3", *TEACHER],
        ["train", "--method", "dmd2", "--pretrained_model_name_or_path", gone],
        ["train", "--method", "dmd2", *TEACHER, "--max_steps", "3"],
        ["train", "--method", "dmd2", *TEACHER, "--data.prompts_file", gone],
        ["train", "--recipe", "sdxl-dmd2-lora-5step", *TEACHER],
        ["cache", *TEACHER, "--data.train_data_dir", gone],
        ["plan", "--method", "dmd2", "--pretrained_model_name_or_path", "sdx"],
        ["pairs", "--pretrained_model_name_or_path", str(tmp_path), "--pairs_dir", "p"],
        ["export", gone, "out"],
        ["report", gone],
        ["sample", gone, "--prompt", "a cat"],
        ["optimise_latent", gone, "--prompt", "a bell"],
        ["decoder", "--student", gone, "--train_data_dir", gone],
        ["widen", "--model", gone, "--output_dir", "o"],
        ["push", gone, "me/x"],
        ["check", gone],
        ["merge", gone, f"{gone}:0.5", "--output", "o"],
        ["evaluate", "--teacher", gone, "--student", "me/x"],
        ["evaluate", "--teacher", "me/x", "--student", "./x"],
        ["compare", "--teacher", "me/x", "--reference", gone, "--output_dir", "c"],
        ["particles", "--pretrained_model_name_or_path", gone],
        ["particles", "--gradients", "sdss:7"],
        ["train", "--help"],
    ]
    code = f"""
import sys
from stepdistill.cli import main
for call in {calls!r}:
    try:
        main(call)
    except SystemExit as end:
        print(end)
print(sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = done.stdout
    assert told.splitlines()[-1] == "[]"
    assert "hyper_sd" in told
    assert "got 'dmd3'. Nearest: ['dmd" in told
    named = re.findall(r"^error: (\S+): expected", told, re.MULTILINE)
    assert named == [
        *("method", "pretrained_model_name_or_path", "flags", "data.prompts_file", "--recipe"),
        *("data.train_data_dir", "pretrained_model_name_or_path", "pretrained_model_name_or_path"),
        *("run_dir", "run_dir", "model_dir", "model_dir", "student", "model"),
        *("folder", "model_dir", "sources"),
        *("teacher", "student", "reference", "pretrained_model_name_or_path"),
    ]
    assert "gradients: expected KIND or KIND:GUIDANCE with one of sds," in told
    assert "got ['max_steps']. Nearest: {'max_steps': ['max_train_steps'" in told


def test_a_wrong_command_names_the_nearest() -> None:
    with pytest.raises(
        SystemExit, match=r"^error: expected a command, got 'trian'. Nearest: train"
    ):
        main(["trian"])
    with pytest.raises(SystemExit, match=r"^error: expected a command, got ''"):
        main([])


def test_help_lists_every_command_and_imports_none(capsys) -> None:
    code = "import sys; from stepdistill.cli import main; main(['--help'])"
    code += "; print(sorted({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *told, imported = done.stdout.strip().splitlines()
    assert imported == "[]"
    assert all(any(line.split()[:1] == [name] for line in told) for name in CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_networks_are_imported_by_run_alone(name) -> None:
    """At the top of a command's file stand options; --help and mistakes must not wait for more."""
    tree = ast.parse((Path(cli_file).parent / f"{name}.py").read_text())
    modules = {
        node.module.removeprefix("stepdistill.")
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stepdistill.")
    }
    plain = {"core.options", "comparison.budget", "demo.emoji.budget"}
    plain |= {"planning.costs", "planning.recipes"}
    rooms = {module.split(".")[0] for module in modules - plain}
    assert rooms <= {"config", "evaluation", "particles"}


def test_help_of_options_imports_no_network() -> None:
    code = "import sys; from stepdistill.cli import main\n"
    code += "try: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_process_of_a_mistake_leaves_with_status_1() -> None:
    command = [sys.executable, "-m", "stepdistill.cli", "report", "--formt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


# ------------------------------------------------------------------ how values are typed
def run_of(*argv: str) -> Any:
    return parse_run_config([*TEACHER, "--method", "dmd2", *argv])


@pytest.mark.parametrize(
    "argv",
    [
        ["--role_learning_rates.fake", "1e-4"],
        ["--role_learning_rates.fake=1e-4"],
        ["--role_learning_rates", "fake=1e-4"],
        ["--role_learning_rates", '{"fake": 1e-4}'],
    ],
)
def test_a_key_of_a_mapping(argv) -> None:
    assert run_of(*argv).role_learning_rates == {"fake": 1e-4}


def test_keys_lie_over_those_of_a_file(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("role_learning_rates: {fake: 1.0, disc: 2.0}\n")
    flags = ["--role_learning_rates.fake", "3", "--role_learning_rates.student", "4"]
    rates = run_of("--config", str(file), *flags).role_learning_rates
    assert rates == {"fake": 3.0, "disc": 2.0, "student": 4.0}


def test_a_key_in_a_key() -> None:
    flags = ["--tuning.student", "full", "--tuning.student_config.block_out_channels", "[8, 16]"]
    assert run_of(*flags).tuning.student_config == {"block_out_channels": [8, 16]}


@pytest.mark.parametrize("argv", [["0.4", "0.2"], ["0.4,0.2"], ["[0.4, 0.2]"]])
def test_lists_of_numbers(argv) -> None:
    run = run_of("--method_config.num_steps", "2", "--method_config.student_times", *argv)
    assert tuple(run.method_config["student_times"]) == (0.4, 0.2)


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["a cat, sitting", "a dog"], ["a cat, sitting", "a dog"]),
        (['["a cat, sitting", "a dog"]'], ["a cat, sitting", "a dog"]),
        (["a", "--validation_prompts", "b"], ["a", "b"]),
        (["[photo] of a cat"], ["[photo] of a cat"]),
        (["[3, 7]"], ["3", "7"]),
    ],
)
def test_lists_of_texts(argv, prompts) -> None:
    assert run_of("--validation_prompts", *argv).validation_prompts == prompts


def test_names_may_be_split_at_commas() -> None:
    run = run_of("--report_to", "tensorboard,wandb", "--tuning.target_modules", "to_q,to_k", "to_v")
    assert run.report_to == ["tensorboard", "wandb"]
    assert run.tuning.target_modules == ("to_q", "to_k", "to_v")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--gradient_checkpointing"], True),
        (["--no-gradient_checkpointing"], False),
        (["--gradient_checkpointing", "auto"], "auto"),
        (["--gradient_checkpointing=false"], False),
    ],
)
def test_a_switch_of_three(argv, value) -> None:
    assert run_of(*argv, "--seed", "3").gradient_checkpointing == value


def test_null_is_none() -> None:
    assert run_of("--tuning.alpha", "null").tuning.alpha is None


def test_a_group_as_json_lies_under_its_flags() -> None:
    run = run_of("--tuning.rank", "8", "--tuning", '{"rank": 4, "student": "full"}')
    assert (run.tuning.rank, run.tuning.student) == (8, "full")


def test_positional_arguments_stand_anywhere(ran) -> None:
    main(["export", "--format", "lora", "run", "out"])
    main(["export", "run", "out", "--format", "lora"])
    main(["sample", "dir", "--prompt", "a, b", "c"])
    main(["merge", "--output", "out", "a:0.5", "b"])
    assert (ran[0].run_dir, ran[0].out_dir, ran[0].format) == ("run", "out", "lora")
    assert ran[1] == ran[0]
    assert (ran[2].model_dir, ran[2].prompt) == ("dir", ["a, b", "c"])
    assert ran[3].sources == ["a:0.5", "b"]


def test_compare_takes_a_run_s_keys_from_files_for_every_method(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 0.5\ntuning: {rank: 4}\nprocesses: 3\n")
    flags = ["--config", str(file), "--output_dir", "o", "--settings.seed", "1"]
    options = parse_options(compare_command.Options, flags, "compare")
    assert options.processes == 3
    assert options.settings == {"learning_rate": 0.5, "tuning": {"rank": 4}, "seed": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("command", ["export", "merge", "pairs", "evaluate", "sample"])
def test_a_signal_ends_a_command_where_it_is_with_one_line(
    command, number, monkeypatch, capsys, ctrl_c, places
) -> None:
    before, reached = signal.getsignal(number), []

    def run(_options: object) -> None:
        os.kill(os.getpid(), number)
        reached.append(True)

    monkeypatch.setattr(f"stepdistill.cli.{command}.run", run)
    with pytest.raises(SystemExit) as ended:
        main([command, *CALLS[command][0]])
    assert (ended.value.code, reached) == (75, [])
    told = capsys.readouterr().err
    assert told.startswith("stopped (")
    assert told.count("\n") == 1
    assert signal.getsignal(number) == before
