"""The trials of reliability.py: each is one attempt to make Stillhouse lose, double or believe something."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.children import end, start
from tests.remote.test_lies import VOCAB, Liar
from tests.sandbox.test_hostile import ENDED, NEVER_PASSES, QUICK, TESTS
from tests.servers import serving
from tests.small_runs import differences, outcome, tree, write_data
from tests.workshop import YAML, make_models, make_workshop

from stillhouse import commands, recipes
from stillhouse.core.types import Prompt
from stillhouse.data import load_data
from stillhouse.engines import Sampling, ServerConfig, TokenizerInfo
from stillhouse.errors import StillhouseError
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.runs.checks import preflight
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve
from stillhouse.sandbox import check_program
from stillhouse.teachers.store.maintenance import list_stores, verify

Trial = dict[str, Any]
TOLD = os.fdopen(os.dup(2), "w")
"""Where a process that is otherwise quiet tells what it was not to run into."""
EVENTS = frozenset({"open", "os.rename", "os.remove", "shutil.rmtree", "os.mkdir"})
LENGTH = {
    "max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "log_every": 1, "save_every": 2,
    "validate_every": 3, "validate_rouge": False,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "distillm": {"responses": {"student_share": 0.7}},
    "distillm_released": {"responses": {"student_share": 0.7, "capacity": 8, "minimum_fill": 4}},
}
"""So short a run would never generate with these recipes' own values."""
CACHED = "teacher={kind: cache, of: {kind: live, path: teacher}, folder: store}"
VERBS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "run.yaml", "-o", "written.jsonl", "--chunk", "4"),
    "curate": ("curate", "given.jsonl", "-o", "kept.jsonl", "-f", "empty"),
    "eval": ("eval", "student", "teacher", "--data", "valid.jsonl", "--template", "plain", "-o", "compared"),
    "cache build": ("cache", "build", "run.yaml", CACHED, "responses=fixed"),
}


class TrialPart:
    """One kind of trial."""

    def close(self) -> None:
        """Stop what it has started."""


class Kills(TrialPart):
    """Runs of every recipe and other commands, killed at random file events and resumed, to equal ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kills"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "text.jsonl").exists():
            write_data(self.folder, rows=12, valid=3)
        self.names = [recipe.name for recipe in recipes.all_recipes()]

    def trial(self, number: int) -> Trial:
        """One run, or in every sixth trial another verb, killed once or more."""
        chance = random.Random(f"kills {number}")
        if number % 6 == 5:
            return self._verb(list(VERBS)[number // 6 % len(VERBS)], chance)
        return self._run(self.names[(number - number // 6) % len(self.names)], chance)

    def _run(self, recipe: str, chance: random.Random) -> Trial:
        straight = self.folder / f"{recipe}-straight"
        count = self.folder / f"{recipe}.events"
        if not count.exists():
            shutil.rmtree(straight, ignore_errors=True)
            code = end(start(run_child, self._tree(recipe, straight.name), False, None, str(count)))
            if code != 0:
                return {"what": recipe, "kills": 0, "failure": f"the straight run ended with {code}"}
        name = f"{recipe}-killed"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        kills = 0
        while True:
            kill = _kill(chance, int(count.read_text())) if kills == 0 or chance.random() < 0.3 else None
            resume = (self.folder / name / "state.json").exists()
            code = end(start(run_child, self._tree(recipe, name), resume, kill, None))
            if code == 0:
                break
            kills += 1
            if kill is None or code not in (-9, -15, 143):
                return {"what": recipe, "kills": kills, "failure": f"resumed, it ended with {code}"}
        found = differences(outcome(straight), outcome(self.folder / name))
        return {"what": recipe, "kills": kills, "failure": f"differs in {found[:3]}" if found else None}

    def _tree(self, recipe: str, name: str) -> dict[str, Any]:
        extra = EXTRA.get(recipe, {})
        made = tree(self.folder, name, recipe=recipe, **{**extra, "train": {**LENGTH, "lr": 1e-3}})
        if recipe == "sft":
            del made["teacher"]
        return made

    def _verb(self, verb: str, chance: random.Random) -> Trial:
        models = self.folder / "models"
        if not models.exists():
            make_models(models)
        straight, count = self.folder / f"verb-{verb}", self.folder / f"verb-{verb}.events"
        if not count.exists():
            self._workshop(straight, models)
            code = end(start(verb_child, str(straight), VERBS[verb], None, str(count)))
            if code != 0:
                return {"what": verb, "kills": 0, "failure": f"the straight command ended with {code}"}
        killed = self.folder / f"verb-{verb}-killed"
        self._workshop(killed, models)
        code = end(start(verb_child, str(killed), VERBS[verb], _kill(chance, int(count.read_text())), None))
        kills = int(code != 0)
        if code not in (0, -9, 143):
            return {"what": verb, "kills": kills, "failure": f"it ended with {code}"}
        if kills and (code := end(start(verb_child, str(killed), VERBS[verb], None, None))):
            return {"what": verb, "kills": kills, "failure": f"the same command then ended with {code}"}
        found = differences(_results(straight), _results(killed))
        return {"what": verb, "kills": kills, "failure": f"differs in {found[:3]}" if found else None}

    def _workshop(self, folder: Path, models: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_workshop(folder, models)
        shutil.copy(self.folder / "train.jsonl", folder / "given.jsonl")


def _kill(chance: random.Random, events: int) -> tuple[int, int]:
    """(number of the file event, signal): four of five by SIGKILL, the others by SIGTERM."""
    by = signal.SIGKILL if chance.random() < 0.8 else signal.SIGTERM
    return chance.randint(1, events), int(by)


def _results(folder: Path) -> dict[str, Any]:
    """What a verb leaves, but for times, packages and the rest of how it was made."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("compared/**/*.jsonl")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[str(path.relative_to(folder))] = [json.loads(line) for line in lines]
    for path in sorted(folder.glob("compared/**/evaluation/*.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        found[str(path.relative_to(folder))] = {
            k: v for k, v in metrics.items() if not k.endswith("_per_second")
        }
    if (folder / "store").is_dir():  # in how many shards the records are depends on the kill
        found["store"] = sorted((one.records, one.tokens) for one in list_stores(folder / "store"))
        found["damaged"] = [faults for _, _, faults in verify(folder / "store") if faults]
    return found


def _watch(kill: tuple[int, int] | None, below: str) -> list[int]:
    """Count file events from now on, in a list of one, and die at the chosen one."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not args or below not in str(args[0]):
            return
        seen[0] += 1
        if kill is not None and seen[0] == kill[0]:
            os.kill(os.getpid(), kill[1])

    sys.addaudithook(hook)
    return seen


def run_child(made: dict[str, Any], resume: bool, kill: tuple[int, int] | None, count: str | None) -> None:
    """A run in this process, which ends with its exit code."""
    _quiet()
    seen = _watch(kill, made["name"])
    try:
        result = execute(resolve(made), resume=resume)
    except KeyboardInterrupt:
        os._exit(143)
    except BaseException:  # noqa: BLE001  (the process must end here, whatever it was)
        print(traceback.format_exc(), file=TOLD, flush=True)
        os._exit(1)
    if count is not None:
        Path(count).write_text(str(seen[0]))
    os._exit(0 if result.signal is None else 128 + result.signal)


def verb_child(
    folder: str, arguments: tuple[str, ...], kill: tuple[int, int] | None, count: str | None
) -> None:
    """A command in this process, which ends with its exit code."""
    os.chdir(folder)
    _quiet()
    seen = _watch(kill, "")
    sys.argv = ["stillhouse", *arguments]
    code = 1
    try:
        commands.main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001  (the process must end here, whatever it was)
        print(traceback.format_exc(), file=TOLD, flush=True)
    if count is not None:
        Path(count).write_text(str(seen[0]))
    os._exit(code)


def _quiet() -> None:
    logging.disable()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class Starts(TrialPart):
    """Several processes that start the same run at the same moment: one goes on, the others are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "starts"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_data(self.folder, rows=8, valid=2)

    def trial(self, number: int) -> Trial:
        """Two or three processes."""
        name, processes = f"start-{number}", 2 + number % 2
        made = tree(self.folder, name, objective="reverse_kl", train={**LENGTH, "max_steps": 2})
        shutil.rmtree(self.folder / name, ignore_errors=True)
        codes = sorted(end(child) for child in [start(start_child, made) for _ in range(processes)])
        failure = None if codes == [0, *[2] * (processes - 1)] else f"they ended with {codes}"
        return {"what": f"{processes} processes", "failure": failure}


def start_child(made: dict[str, Any]) -> None:
    """A run in this process; exit code 2 where it was refused."""
    _quiet()
    try:
        execute(resolve(made))
    except StillhouseError as error:
        os._exit(error.exit_code)
    except BaseException:  # noqa: BLE001  (the process must end here, whatever it was)
        os._exit(1)
    os._exit(0)


JUNK: tuple[Any, ...] = (
    None, "", 0, -1, 1e309, float("nan"), True, [], {}, [None], {"kind": "jsd"}, "a" * 5000, "\ud800",
    "../..", 10**30, "\x00", {"": {}}, [[[]]], "package:nowhere/x", "1e400", "/dev/null", -0.5, "café",
    {"path": []},
)  # fmt: skip


class Fuzz(TrialPart):
    """Configurations and rows with junk in them: used, or refused in words; never a traceback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fuzz"
        if not (self.folder / "run.yaml").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            make_models(self.folder / "models")
            make_workshop(self.folder, self.folder / "models")
        self.tokenizer = load_tokenizer(TeacherModel(path=str(self.folder / "teacher")))

    def trial(self, number: int) -> Trial:
        """A configuration, or in every other trial a file of rows."""
        chance = random.Random(f"fuzz {number}")
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            (self._rows if number % 2 else self._config)(chance)
        except StillhouseError:
            return {"what": "refused", "failure": None}
        except Exception as error:  # noqa: BLE001  (what a trial is to find)
            return {"what": "traceback", "failure": f"{type(error).__name__}: {error}"[:200]}
        finally:
            os.chdir(before)
        return {"what": "used", "failure": None}

    def _config(self, chance: random.Random) -> None:
        name = chance.choice([recipe.name for recipe in recipes.all_recipes()])
        made = yaml.safe_load(YAML) | {"recipe": name}
        for _ in range(chance.randint(1, 3)):
            _spoil(
                made,
                chance,
                chance.choice(["train", "data", "objective", "responses", "evaluate", "student"]),
            )
        preflight(resolve(made).config)

    def _rows(self, chance: random.Random) -> None:
        rows = [json.loads(line) for line in Path("valid.jsonl").read_text(encoding="utf-8").splitlines()]
        for _ in range(chance.randint(1, 3)):
            row = chance.choice(rows)
            row[chance.choice([*row, "messages", "prompt", "response", "tools"])] = chance.choice(JUNK)
        text = "\n".join(json.dumps(row) for row in rows).encode()
        if chance.random() < 0.5:
            place = chance.randrange(len(text))
            text = text[:place] + chance.randbytes(chance.randint(0, 3)) + text[place + 1 :]
        Path("fuzzed.jsonl").write_bytes(text)
        config = resolve(
            {**yaml.safe_load(YAML), "data": {"train": "fuzzed.jsonl", "max_response": 8}}
        ).config
        load_data(config.data, self.tokenizer, needs={"responses"})


def _spoil(made: dict[str, Any], chance: random.Random, section: str) -> None:
    """Put junk at a random place of a section, which may not be there yet."""
    here = made.setdefault(section, {})
    keys = [*here, "kind", "path", "lr", "limit", "sampling", "schedule"] if isinstance(here, dict) else []
    if not keys or chance.random() < 0.2:
        made[section] = copy.deepcopy(chance.choice(JUNK))
    else:
        here[chance.choice(keys)] = copy.deepcopy(chance.choice(JUNK))


class Lies(TrialPart):
    """A server whose answers have junk at random places: an error, or an answer within what was asked."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(TeacherModel(path="package:stillhouse/demo/teacher"))
        self.liar = Liar(self.tokenizer)
        self.open = contextlib.ExitStack()
        service = self.open.enter_context(serving(self.liar))
        config = ServerConfig(url=service.url, backoff=0.001, retries=1)
        self.engine = config.build(None, TokenizerInfo.from_tokenizer(self.tokenizer))

    def close(self) -> None:
        """Stop the server; left to the end of the program, it would wait for a thread that is gone."""
        self.open.close()

    def trial(self, number: int) -> Trial:
        """One request."""
        chance = random.Random(f"lies {number}")
        self.liar.lie = lambda reply: _lie(reply, chance)
        prompt = Prompt("p", tuple(self.tokenizer("A mill", add_special_tokens=False)["input_ids"]), "A mill")
        sampling = Sampling(max_tokens=4, logprobs=True)
        try:
            [found] = self.engine.generate([prompt.token_ids], sampling, seed=number)
        except StillhouseError:
            return {"what": "refused", "failure": None}
        except Exception as error:  # noqa: BLE001  (what a trial is to find)
            return {"what": "traceback", "failure": f"{type(error).__name__}: {error}"[:200]}
        ids, values = found.token_ids, found.logprobs or ()
        right = len(ids) <= 4 and all(type(one) is int and 0 <= one < VOCAB for one in ids)
        right = right and all(value <= 1e-3 for value in values)
        return {"what": "used", "failure": None if right else f"kept {ids} {values}"[:200]}


def _lie(reply: dict[str, Any], chance: random.Random) -> Any:
    """Junk at one to three places of an answer, which is changed in place; sometimes junk instead of it."""
    if chance.random() < 0.1:
        return copy.deepcopy(chance.choice(JUNK[:14]))
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(reply)))
        holder[key] = copy.deepcopy(chance.choice((*JUNK, 999999, 2**70, [7] * 300, 0.7)))
    return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(items):
        yield value, key
        yield from _places(below)


class Programs(TrialPart):
    """Hostile programs, each with some lines in front that change nothing: none passes, and each ends."""

    def __init__(self, folder: Path) -> None:
        self.programs = {**NEVER_PASSES, **{name: program for name, (program, _) in ENDED.items()}}

    def trial(self, number: int) -> Trial:
        """One program."""
        name = list(self.programs)[number % len(self.programs)]
        chance = random.Random(f"programs {number}")
        before = "\n".join(
            f"x{chance.randrange(1000)} = {chance.random()}" for _ in range(chance.randint(0, 3))
        )
        result = check_program(f"{before}\n{self.programs[name]}", TESTS, QUICK)
        return {"what": name, "failure": "it passed" if result.passed else None}


PARTS: dict[str, Callable[[Path], Any]] = {
    "kills": Kills, "starts": Starts, "fuzz": Fuzz, "lies": Lies, "programs": Programs,
}  # fmt: skip
