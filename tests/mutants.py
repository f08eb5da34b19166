"""Would a wrong operator turn a test red? Every arithmetic operator and comparison, one at a time.

    python tests/mutants.py                              # core, losses and methods
    python tests/mutants.py losses stepdistill/core/path.py --seconds 600 --results FILE

A mutant is one changed operator of a file (CHANGES), made in memory and never written. Of the tests
of the file's room (tests/core for stepdistill/core) those that run the changed line are run until
one fails: the quick ones first, where those named like the file count as ten times as quick. Every
mutant has a process of its own, forked from one that has collected the room's tests, and the
functions of the file get their changed code there. Which tests run which line is found by a run
without any mutant, the room being imported with a note before each statement, and stands beside the
results (a survey, by test file). What runs while the room is imported can't be changed so late:
such a mutant's process is forked from one that has imported the libraries alone, and imports the
room itself.

Results are lines of JSON in --results. A run that was stopped goes on there; a change of the file
(or, for survivors, of the room's tests) makes a result old, and it is made again. A survivor costs
all the tests that run its line: with --tests-seconds the later ones are left out, and a mutant that
passes the others is listed as undecided. Survivors that no test could notice stand with their
reason in equivalent_mutants.yaml, count as not noticed, and are run with --equivalents alone.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import functools
import gc
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("core", "losses", "methods")
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.yaml"
NOTE = "__note_line_of_mutants__"
OURS = (str(ROOT / "stepdistill"), str(ROOT / "tests"))  # by file: their imports run mutants
CHANGES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.USub: ast.UAdd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


# ---------------------------------------------------------------------------------- the mutants
@dataclass(frozen=True)
class Mutant:
    """One operator of a file: the `index`-th in the order of `operators`."""

    path: Path
    source: str = field(repr=False)
    index: int
    line: int
    id: str

    @property
    def room(self) -> str:
        return self.path.parent.name

    def code(self) -> CodeType:
        """The file's, with the operator changed."""
        tree = ast.parse(self.source)
        change(list(operators(tree))[self.index][0])
        return compile(tree, str(self.path), "exec", dont_inherit=True)


Place = tuple[Any, str, int | None]  # the node, the field that holds the operator, where in it


def operators(tree: ast.AST, name: str = "", line: int = 0) -> Iterator[tuple[Place, str, int]]:
    """(place, qualified name of the function or class around it, line where its statement begins).

    Annotations are left out.
    """
    line = tree.lineno if isinstance(tree, ast.stmt) else line
    if isinstance(tree, ast.BinOp | ast.AugAssign | ast.UnaryOp) and type(tree.op) in CHANGES:
        yield (tree, "op", None), name, line
    if isinstance(tree, ast.Compare):
        yield from (((tree, "ops", i), name, line) for i in range(len(tree.ops)))
    if isinstance(tree, ast.ClassDef | ast.FunctionDef):
        name = f"{name}.{tree.name}".lstrip(".")
    for key, value in ast.iter_fields(tree):
        if key not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from operators(child, name, line)


def change(place: Place, back: ast.AST | None = None) -> ast.AST:
    """Put the other operator there (or `back`); the one that stood there."""
    node, key, at = place
    held: ast.AST = getattr(node, key) if at is None else getattr(node, key)[at]
    other = back or CHANGES[type(held)]()
    if at is None:
        setattr(node, key, other)
    else:
        getattr(node, key)[at] = other
    return held


def mutants_of(path: Path) -> list[Mutant]:
    """Ids name the place by its code, not by its line, so that they outlive edits elsewhere."""
    made: list[Mutant] = []
    seen: Counter[str] = Counter()
    source = path.read_text()
    for index, (place, name, line) in enumerate(operators(ast.parse(source))):
        node, before = place[0], ast.unparse(place[0])
        held = change(place)
        told = f"{path.parent.name}/{path.name} {name}: {before} -> {ast.unparse(node)}"
        change(place, held)
        seen[told] += 1
        again = f" #{seen[told]}" if seen[told] > 1 else ""
        made.append(Mutant(path, source, index, line, told + again))
    return made


def noting(path: Path) -> CodeType:
    """The file's code with a call of NOTE ("FILE:LINE") before each statement."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for key, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                statements: list[ast.stmt] = []
                for each in value:
                    text = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
                    future = isinstance(each, ast.ImportFrom) and each.module == "__future__"
                    if not text and not future:  # both have to stand first
                        note = ast.parse(f"{NOTE}({f'{path}:{each.lineno}'!r})").body[0]
                        for part in ast.walk(note):
                            ast.copy_location(part, each)
                        statements.append(note)
                    statements.append(each)
                setattr(node, key, statements)
    return compile(tree, str(path), "exec", dont_inherit=True)


def swap(mutant: Mutant, functions: list[FunctionType]) -> None:
    """Give the functions of the file, which is imported, their changed code."""

    def within(code: CodeType) -> Iterator[CodeType]:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from within(constant)

    changed = {(code.co_name, code.co_firstlineno): code for code in within(mutant.code())}
    assert functions, f"no function of {mutant.path} is loaded"
    for each in functions:
        each.__code__ = changed[each.__code__.co_name, each.__code__.co_firstlineno]


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a file with other code, under its own name and path."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        super().__init__(name, str(path))
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class Importer(importlib.abc.MetaPathFinder):
    """Imports these files of the package with other code."""

    def __init__(self, codes: dict[Path, CodeType]) -> None:
        self.codes = codes

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        stem = ROOT.joinpath(*name.split("."))
        for where in (stem.with_suffix(".py"), stem / "__init__.py"):
            if where in self.codes:
                loader = Loader(name, where, self.codes[where])
                return importlib.util.spec_from_file_location(name, where, loader=loader)
        return None


# ------------------------------------------------------------------------------------ the tests
@dataclass
class Seen:
    """What a run of a room's tests without any mutant showed."""

    seconds: dict[str, float] = field(default_factory=dict)  # of each test
    lines: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # FILE:LINE: tests
    failed: list[str] = field(default_factory=list)

    def runs(self, mutant: Mutant) -> set[str]:
        """The tests that run its statement; with "" if an import or a shared fixture does."""
        return self.lines.get(f"{mutant.path}:{mutant.line}", set())

    def tests_of(self, mutant: Mutant, seconds: float) -> tuple[list[str], bool]:
        """(those to run, in order, as many as take that long; whether these are all)."""
        runs, named = self.runs(mutant), f"/test_{mutant.path.stem}"
        tests = [test for test in self.seconds if test in runs or "" in runs]
        tests.sort(key=lambda test: self.seconds[test] * (0.1 if named in test else 1.0))
        sums = accumulate(self.seconds[test] for test in tests)
        first = [test for test, until in zip(tests, sums, strict=True) if until <= seconds]
        return first or tests[:1], len(first) == len(tests)


class Watch:
    """A pytest plugin that notes which tests run which statements of a room, imported from now."""

    def __init__(self, room: str) -> None:
        self.seen, self.now = Seen(), ""
        setattr(builtins, NOTE, self.note)
        files = (ROOT / "stepdistill" / room).rglob("*.py")
        sys.meta_path.insert(0, Importer({path: noting(path) for path in files}))

    def note(self, line: str) -> None:
        self.seen.lines[line].add(self.now)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.now, start = item.nodeid, time.process_time()
        try:
            return (yield)
        finally:
            self.now, self.seen.seconds[item.nodeid] = "", time.process_time() - start

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before, self.now = self.now, self.now if fixturedef.scope == "function" else ""
        try:
            return (yield)
        finally:
            self.now = before

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.seen.failed.append(report.nodeid)


class Loop:
    """A pytest plugin that gives `work` what was collected, in place of running it."""

    def __init__(self, work: Callable[[pytest.Session], Any]) -> None:
        self.work, self.result = work, None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.result = self.work(session)
        return True


def run_tests(session: pytest.Session, tests: list[str]) -> str:
    """The first of these tests that fails, or "" where all pass."""
    failed: list[str] = []

    class Failures:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    session.config.pluginmanager.register(Failures())
    by_id = {item.nodeid: item for item in session.items}
    for test, following in zip(tests, [*tests[1:], None], strict=True):
        session.config.hook.pytest_runtest_protocol(
            item=by_id[test], nextitem=by_id[following] if following else None
        )
        if failed:
            break
    return failed[0] if failed else ""


def collected(where: list[str], *plugins: Any) -> None:
    """Collect the default tests of these files, with these plugins."""
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-p", "no:benchmark", "-q", "--tb=no", "-m", "not full and not every and not gpu"]
    pytest.main([*options, "--rootdir", str(ROOT), *where], plugins=list(plugins))


# -------------------------------------------------------------------------------- the processes
def forked(work: Callable[..., Any], *args: Any) -> tuple[int, Path]:
    """(pid of a child that runs work(*args), the file that will hold what it returned as JSON)."""
    handle, name = tempfile.mkstemp(suffix=".json")
    child = os.fork()
    if child:
        os.close(handle)
        return child, Path(name)
    try:
        os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.write(handle, json.dumps(work(*args)).encode())
    except BaseException:
        os.write(handle, json.dumps({"failed": traceback.format_exc()}).encode())
    finally:
        os._exit(0)
    raise AssertionError


def answer(out: Path) -> Any:
    """What a child that has ended returned, or None."""
    text = out.read_text()
    out.unlink()
    return json.loads(text) if text else None


def result_of(child: int, out: Path) -> Any:
    os.waitpid(child, 0)
    return answer(out)


def limit(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))


def late(
    mutant: Mutant,
    tests: list[str],
    limit_s: float,
    session: pytest.Session,
    functions: dict[str, list[FunctionType]],
) -> str:
    """The test that notices the mutant where the room is imported."""
    limit(limit_s)
    swap(mutant, functions[str(mutant.path)])
    return run_tests(session, tests)


def early(mutant: Mutant, tests: list[str], limit_s: float) -> str:
    """The test that notices the mutant, the room being imported with it."""
    limit(limit_s)
    sys.meta_path.insert(0, Importer({mutant.path: mutant.code()}))
    found: list[str] = []
    loop = Loop(lambda session: found.append(run_tests(session, tests)))
    collected(list(dict.fromkeys(file_of(test) for test in tests)), loop)
    return found[0] if found else "the import"


@dataclass
class Results:
    """Results by a mutant's id; `add` writes one down."""

    file: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> None:
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            one = json.loads(line)
            self.found[one["id"]] = one

    def current(self, mutant: Mutant) -> bool:
        """Is its result still that of this file, and a survivor's that of these tests?"""
        old = self.found.get(mutant.id)
        if old is None or old["file"] != digest(mutant.source):
            return False
        if old["result"] == "survived":
            return bool(old["tests"] == tests_of_room(mutant.room))
        return bool(old["result"] == "noticed")

    def add(self, mutant: Mutant, result: str, by: str, seconds: float, usage: Any = None) -> None:
        """usage: resources that its process took; `seconds` are on the clock."""
        cpu = usage.ru_utime + usage.ru_stime if usage else 0.0
        one = {"id": mutant.id, "result": result, "by": by, "seconds": round(seconds, 1)}
        one |= {
            "cpu": round(cpu, 1),
            "file": digest(mutant.source),
            "tests": tests_of_room(mutant.room),
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(one) + "\n")


@dataclass(frozen=True)
class Budget:
    jobs: int
    until: float
    tests_seconds: float

    def run(
        self, mutants: list[Mutant], seen: Seen, results: Results, attempt: Any, *args: Any
    ) -> None:
        """`attempt` each mutant in a process of its own; none is begun after `until`."""
        waiting = list(mutants)
        going: dict[int, tuple[Mutant, Path, float, float, bool]] = {}
        while going or (waiting and time.time() < self.until):
            while waiting and len(going) < self.jobs and time.time() < self.until:
                mutant = waiting.pop(0)
                tests, everything = seen.tests_of(mutant, self.tests_seconds)
                if not tests:
                    results.add(mutant, "survived", "no test runs it", 0)
                    continue
                limit_s = 20 + 4 * sum(seen.seconds[test] for test in tests)
                child, out = forked(attempt, mutant, tests, limit_s, *args)
                going[child] = (mutant, out, time.time(), limit_s, everything)
            for child, (mutant, out, start, limit_s, everything) in list(going.items()):
                seconds = time.time() - start
                if seconds > 20 * limit_s:  # it waits for something
                    os.killpg(child, signal.SIGKILL)
                ended, _, usage = os.wait4(child, os.WNOHANG)
                if ended:
                    del going[child]
                    by = answer(out)
                    if isinstance(by, dict):  # not a test's failure, but this tool's
                        raise SystemExit(f"{mutant.id}: {by['failed']}")
                    told = "a time limit or a crash" if by is None else by
                    passed = "survived" if everything else "undecided"
                    results.add(mutant, "noticed" if told else passed, told, seconds, usage)
            time.sleep(0.005)


def work_on(room: str, mutants: list[Mutant], results: Results, budget: Budget) -> dict[str, Any]:
    """Run the room's mutants; those left to `early`, with what was seen and imported."""
    watch = Watch(room)

    def work(session: pytest.Session) -> dict[str, Any]:
        surveys = Surveys(results.file.with_suffix(".survey.json"), room, mutants)
        tests = [item.nodeid for item in session.items if not surveys.current(file_of(item.nodeid))]

        def survey() -> dict[str, Any]:
            run_tests(session, tests)
            lines = {line: sorted(runs) for line, runs in watch.seen.lines.items()}
            return {"seconds": watch.seen.seconds, "lines": lines, "failed": watch.seen.failed}

        if tests:
            survey_of_tests = result_of(*forked(survey))
            if survey_of_tests is None or survey_of_tests["failed"]:
                return {"failed": (survey_of_tests or {}).get("failed") or ["a crash"]}
            surveys.add({file_of(test) for test in tests}, survey_of_tests)
        everything = surveys.merged()
        seen = seen_of(everything)
        left = [mutant.id for mutant in mutants if "" in seen.runs(mutant)]
        others = [mutant for mutant in mutants if mutant.id not in left]
        gc.unfreeze()  # conftest has frozen what was imported
        functions: dict[str, list[FunctionType]] = {str(mutant.path): [] for mutant in mutants}
        for each in gc.get_objects():
            if isinstance(each, FunctionType) and each.__code__.co_filename in functions:
                functions[each.__code__.co_filename].append(each)
        gc.freeze()  # a collection in a child would copy all of the memory
        budget.run(others, seen, results, late, session, functions)
        files = [(name, getattr(m, "__file__", None) or "") for name, m in sys.modules.items()]
        names = [name for name, file in files if not file.startswith(OURS)]
        return {**everything, "failed": [], "left": left, "libraries": names}

    loop = Loop(work)
    collected([f"tests/{room}"], watch, loop)
    return loop.result or {"failed": ["the collection"]}


def file_of(test: str) -> str:
    return test.partition("::")[0]


def seen_of(survey: dict[str, Any]) -> Seen:
    return Seen(survey["seconds"], {line: set(runs) for line, runs in survey["lines"].items()})


class Surveys:
    """What was seen of each test file of a room, good while that file and the mutated ones stay."""

    def __init__(self, file: Path, room: str, mutants: list[Mutant]) -> None:
        self.file, self.room = file, room
        self.by_file = json.loads(file.read_text()) if file.exists() else {}
        sources = sorted((ROOT / "stepdistill" / room).rglob("*.py"))
        self.sources = {path.name: digest(path.read_text()) for path in sources}
        self.mutated = {mutant.path.name for mutant in mutants}

    def current(self, name: str) -> bool:
        one = self.by_file.get(name)
        return (
            one is not None
            and one["test"] == digest((ROOT / name).read_text())
            and all(one["sources"].get(each) == self.sources[each] for each in self.mutated)
        )

    def add(self, files: set[str], survey: dict[str, Any]) -> None:
        """Write down the survey's part of each of these test files."""
        for name in files:
            seconds = {test: s for test, s in survey["seconds"].items() if file_of(test) == name}
            lines = {
                line: [test for test in runs if file_of(test) in ("", name)]
                for line, runs in survey["lines"].items()
            }
            one = {"test": digest((ROOT / name).read_text()), "sources": self.sources}
            one |= {"seconds": seconds, "lines": {k: v for k, v in lines.items() if v}}
            self.by_file[name] = one
        self.file.write_text(json.dumps(self.by_file))

    def merged(self) -> dict[str, Any]:
        """The surveys of all test files of the room that are current."""
        seconds: dict[str, float] = {}
        lines: dict[str, set[str]] = defaultdict(set)
        for name in filter(self.current, [n for n in self.by_file if (ROOT / n).exists()]):
            if Path(name).parent.name == self.room:
                seconds |= self.by_file[name]["seconds"]
                for line, runs in self.by_file[name]["lines"].items():
                    lines[line] |= set(runs)
        return {"seconds": seconds, "lines": {line: sorted(runs) for line, runs in lines.items()}}


# ---------------------------------------------------------------------------------- the command
def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def tests_of_room(room: str) -> str:
    """A digest of the room's tests as they are at the first call."""
    return digest(
        "".join(p.read_text() for p in sorted((ROOT / "tests" / room).rglob("test_*.py")))
    )


def files_of(where: list[str]) -> list[Path]:
    found: list[Path] = []
    for each in where:
        path = ROOT / "stepdistill" / each if each in ROOMS else Path(each).resolve()
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for path in found:
        if not path.is_file() or path.parent.parent != ROOT / "stepdistill":
            raise SystemExit(f"mutants: expected a room of {ROOMS} or a file of one, got {path}.")
    return found


def equivalents() -> dict[str, str]:
    """A mutant's id -> why no test can notice it."""
    return yaml.safe_load(EQUIVALENT.read_text()) or {}


def summary(mutants: list[Mutant], found: dict[str, dict[str, Any]]) -> str:
    """The score by room, survivors, and lines of EQUIVALENT that are no longer true."""
    known, told = equivalents(), []
    done = [mutant for mutant in mutants if mutant.id in found]
    for room in [*ROOMS, "all"]:
        ids = [m.id for m in mutants if room in (m.room, "all")]
        results = {each: found.get(each, {"result": "undecided"})["result"] for each in ids}
        ran = [each for each in ids if results[each] != "undecided" or each in known]
        noticed = [each for each in ran if results[each] == "noticed"]
        told += [
            f"{room}: {len(noticed)} of {len(ran)} noticed ({len(noticed) / max(len(ran), 1):.1%})"
            f", {sum(each in known for each in ids)} equivalent, {len(ids) - len(ran)} not run"
        ]
    for mutant in done:
        result, by = found[mutant.id]["result"], found[mutant.id]["by"]
        if result != "noticed" and mutant.id not in known:
            told.append(f"{result}: {mutant.id}" + f" ({by})" * bool(by))
        if result == "noticed" and mutant.id in known:
            told.append(f"listed as equivalent, but noticed by {by}: {mutant.id}")
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("where", nargs="*", default=list(ROOMS), help="rooms or files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after this")
    parser.add_argument(
        "--tests-seconds", type=float, default=float("inf"), help="of each mutant's tests at most"
    )
    parser.add_argument("--equivalents", action="store_true", help="run those of the list, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--results", type=Path, default=Path(tempfile.gettempdir(), "mutants.jsonl")
    )
    args = parser.parse_args()
    start, results = time.time(), Results(args.results.resolve())
    mutants = [mutant for path in files_of(args.where) for mutant in mutants_of(path)]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    budget = Budget(args.jobs, start + args.seconds, args.tests_seconds)
    results.read()
    known = {} if args.equivalents else equivalents()
    left = [each for each in mutants if each.id not in known and not results.current(each)]
    later: list[tuple[Seen, list[Mutant]]] = []
    libraries: dict[str, None] = {}
    for room in ROOMS:
        if those := [mutant for mutant in left if mutant.room == room]:
            found = result_of(*forked(work_on, room, those, results, budget))
            if found is None or found["failed"]:
                raise SystemExit(f"tests/{room} fails without any mutant: {found}")
            later.append((seen_of(found), [each for each in those if each.id in found["left"]]))
            libraries |= dict.fromkeys(found["libraries"])
    if later:
        for name in libraries:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.freeze()
        with tempfile.TemporaryDirectory() as cache:
            sys.pycache_prefix, sys.dont_write_bytecode = cache, False
            for seen, those in later:
                budget.run(those, seen, results, early)
    results.read()
    print(summary(mutants, results.found))
    print(f"{len(left)} mutants in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
