"""Hostile programs: every one is contained, and none passes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stillhouse.sandbox import Limits, ProgramTests, check_program, hides_files, supervisor
from tests.children import end, start

QUICK = Limits(timeout=4.0, cpu_seconds=1, memory=256 << 20)
TESTS = ProgramTests("assert double(2) == 4\nassert double(5) == 10")

NEVER_PASSES = {
    "leaves with success": "import os\nos._exit(0)",
    "raises SystemExit": "import sys\nsys.exit(0)",
    "returns what equals everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
        "def double(x): return Any()"
    ),
    "returns a number that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __index__(self): return 4\n"
        "    def __int__(self): return 4\ndef double(x): return Any(7)"
    ),
    "pretends to be another class": (
        "class Any:\n    __class__ = int\n    def __eq__(self, other): return True\n"
        "def double(x): return Any()"
    ),
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = None\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\n"
        "def double(x): return 0"
    ),
    "patches the worker": (
        "import sys\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if 'sandbox' in name:\n"
        "        for key in list(vars(module)): setattr(module, key, lambda *a, **k: True)\n"
        "def double(x): return 0"
    ),
    "forges answers": (
        "import os\n"
        "for pipe in range(3, 64):\n"
        "    try: os.write(pipe, b'{\"value\": null}\\n' * 3 + b'{\"value\": 4}\\n' * 9)\n"
        "    except OSError: pass\n"
        "def double(x): return 0"
    ),
    "forges a result": (
        "import os\n"
        "for pipe in range(0, 64):\n"
        "    try: os.write(pipe, b'{\"passed\": true}\\n')\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "answers in no language": "import os\n[os.write(3 + n, b'\\xff' * 100) for n in range(1)]\ndouble = 3",
    "nests without end": "def double(x):\n    a = []\n    a.append(a)\n    return a",
    "counts without end": "import itertools\ndef double(x): return itertools.count()",
    "searches its memory for the tests": (
        "import gc, sys\n"
        "def double(x):\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, dict)]\n"
        "    found = [v for d in texts for v in list(d.values()) if isinstance(v, str)]\n"
        "    found = [v for v in found if 'double(5) ==' in v]\n"
        "    return 2 * x if [f for f in found if 'gc.get_objects' not in f] else 0"
    ),
    "raises in its own text": (
        "class Bad(Exception):\n    def __str__(self): raise self\ndef double(x): raise Bad()"
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", NEVER_PASSES.values(), ids=NEVER_PASSES)
def test_nothing_but_right_values_passes(program):
    result = check_program(program, TESTS, QUICK)
    assert not result.passed
    assert result.status != "passed"


ENDED = {
    "loops": ("while True: pass", {"timeout"}),
    "sleeps": ("import time\ntime.sleep(1000)", {"timeout"}),
    "ignores the signal of the processor limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"timeout", "failed", "crashed"},
    ),
    "takes memory": ("held = []\nwhile True: held.append(bytearray(1 << 20))", {"memory", "timeout"}),
    "prints gigabytes": ("while True: print('x' * 1_000_000)", {"failed"}),
    "prints gigabytes and goes on": (
        "while True:\n    try: print('x' * 1_000_000)\n    except OSError: pass",
        {"timeout", "failed"},
    ),
    "writes many files": (
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').write('x' * 900_000)",
        {"disk"},
    ),
    "makes many empty files": (
        "n = 0\nwhile True:\n    n += 1\n    try: open(str(n), 'w').close()\n    except OSError: pass",
        {"disk", "timeout"},
    ),
    "makes threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        {"failed", "memory", "threads"},
    ),
    "makes threads with hardly any memory": (
        "import _thread, time\n_thread.stack_size(32768)\n"
        "while True:\n    try: _thread.start_new_thread(time.sleep, (99,))\n    except Exception: pass",
        {"threads", "timeout"},  # the latter where the kernel refuses them
    ),
}


@pytest.mark.parametrize(("program", "reasons"), ENDED.values(), ids=ENDED)
def test_what_does_not_end_is_ended(program, reasons):
    assert check_program(program, TESTS, QUICK).status in reasons
    left = psutil.Process().children(recursive=True)
    assert not [process for process in left if "stillhouse.sandbox" in str(process.cmdline())]


REFUSED = {
    "forks": "os.fork()",
    "starts a program": "import subprocess; subprocess.run(['/bin/true'])",
    "replaces itself": "os.execv('/bin/true', ['true'])",
    "spawns": "os.posix_spawn('/bin/true', ['true'], {})",
    "opens a socket": "import socket; socket.socket()",
    "opens a socket of the machine": "import socket; socket.socket(socket.AF_UNIX)",
    "makes a pair of sockets": "import socket; socket.socketpair()",
    "kills its parent": "os.kill(os.getppid(), 9)",
    "names its parent for a signal": "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "chooses the signal": "import fcntl; fcntl.fcntl(os.pipe()[0], 10, 9)",
    "asks a file for signals": "import fcntl; fcntl.ioctl(os.pipe()[0], 0x5452, b'\\1\\0\\0\\0')",
    "stops everybody": "os.kill(-1, 19)",
    "signals its group's leader": "os.killpg(os.getpgid(0), 15)",
    "reads the password file": "open('/etc/passwd').read()",
    "reads environments": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "reads its own memory map": "open('/proc/self/maps').read()",
    "lists the root": "os.listdir('/')",
    "lists a home": "os.listdir(HOME)",
    "reads a file of the user": "open(SECRET).read()",
    "writes a file of the user": "open(SECRET, 'w').write('mine')",
    "appends to a file of the user": "open(SECRET, 'a').write('mine')",
    "cuts a file of the user": "os.truncate(SECRET, 0)",
    "deletes a file of the user": "os.remove(SECRET)",
    "renames a file of the user": "os.rename(SECRET, 'mine')",
    "links to a file of the user": "os.link(SECRET, 'mine')",
    "points to a file of the user and reads": "os.symlink(SECRET, 'mine'); open('mine').read()",
    "changes the mode of a file": "os.chmod(SECRET, 0o777)",
    "changes the time of a file": "os.utime(SECRET, (0, 0))",
    "changes the owner of a file": "os.chown(SECRET, 0, 0)",
    "changes an attribute of a file": "os.setxattr(SECRET, 'user.x', b'1')",
    "writes beside its folder": "open('../mine', 'w').write('x')",
    "writes to the temporary folder": "open('/tmp/stillhouse-hostile', 'w').write('x')",
    "makes a folder": "os.mkdir('mine')",
    "makes a pipe with a name": "os.mkfifo('mine')",
    "changes the root": "os.chroot('.')",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "changes the limits of its parent": (
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"
    ),
    "becomes somebody": "os.setuid(0)",
    "slows the others": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "makes memory without a name": "os.memfd_create('mine')",
    "calls the kernel itself": (
        "import ctypes; lib = ctypes.CDLL(None, use_errno=True)\n"
        "if lib.syscall(ctypes.c_long(41), 2, 1, 0) < 0 and lib.kill(os.getppid(), 9) < 0: raise OSError"
    ),
    "shares memory with a file": (
        "import mmap\nfile = open('a', 'w+b')\nfile.truncate(4096)\nmmap.mmap(file.fileno(), 4096)"
    ),
    "keeps many deleted files open": (
        "held = []\nfor n in range(64):\n    held.append(open('a', 'w+b'))\n    os.remove('a')"
    ),
    "traces its parent": (
        "import ctypes; lib = ctypes.CDLL(None, use_errno=True)\n"
        "if lib.ptrace(16, os.getppid(), 0, 0) < 0: raise OSError"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED)
def test_attempts_on_the_machine_are_refused(attempt, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the user's own")
    before = secret.stat()
    # A refusal is turned into a pass, so this test fails where an attempt succeeds.
    body = "\n".join("    " + line for line in attempt.splitlines())
    program = (
        f"import os\nHOME, SECRET = {str(Path.home())!r}, {str(secret)!r}\ntry:\n{body}\n"
        "except (OSError, ValueError, RuntimeError): refused = True\nelse: refused = False\n"
    )
    result = check_program(program, ProgramTests("assert refused"), QUICK)
    assert result.passed, result
    assert secret.read_text() == "the user's own"
    assert (secret.stat().st_mode, secret.stat().st_mtime, secret.stat().st_uid) == (
        before.st_mode, before.st_mtime, before.st_uid,
    )  # fmt: skip
    assert not Path("/tmp/stillhouse-hostile").exists()


LOOKS = {
    "stat": "os.stat(SECRET)",
    "exists": "1 / os.path.exists(SECRET)",
    "access": "1 / os.access(SECRET, os.F_OK)",
    "a handle that opens nothing": "os.open(SECRET, os.O_PATH)",
    "the way up": "os.stat('../../../../../../..' + SECRET)",
    "a link": "os.readlink('/proc/self/exe')",
    "the password file": "os.stat('/etc/passwd')",
    "the other process's folder": "os.stat('../checker')",
}


@pytest.mark.parametrize("attempt", LOOKS.values(), ids=LOOKS)
def test_nothing_outside_can_even_be_looked_at(attempt, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the user's own")
    program = (
        f"import os\nHOME, SECRET = {str(Path.home())!r}, {str(secret)!r}\n"
        f"try: {attempt}\nexcept (OSError, ZeroDivisionError): refused = True\nelse: refused = False\n"
    )
    # Where the kernel gives no process a root of its own, the sandbox says so and this is what is open.
    assert check_program(program, ProgramTests("assert refused"), QUICK).passed == hides_files()


def test_where_the_kernel_gives_no_root_of_its_own_all_else_holds(monkeypatch):
    monkeypatch.setattr(supervisor, "hides_files", lambda: False)
    assert check_program("def double(x): return 2 * x", TESTS, QUICK).passed
    reads = "import os\ntry: open('/etc/passwd')\nexcept OSError: double = lambda x: 2 * x"
    assert check_program(reads, TESTS, QUICK).passed
    program, reasons = ENDED["makes threads with hardly any memory"]
    assert check_program(program, TESTS, QUICK).status in reasons


def test_a_few_threads_and_files_are_no_offence():
    program = (
        "import threading, tempfile, os\ndone = []\n"
        "threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "files = [open(str(n), 'w+') for n in range(6)]\nos.remove('0')\n"
        "def double(x): return x * len(done) // 4"
    )
    assert check_program(program, TESTS, QUICK).passed


def test_nothing_of_the_environment_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    handle = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(handle, True)
    program = (
        "import os, sys\nenvironment = dict(os.environ)\nargs = list(sys.argv)\nopened = []\n"
        "for number in range(64):\n    try: os.fstat(number)\n"
        "    except OSError: continue\n    opened.append(number)\n"
    )
    tests = (
        "assert 'hunter2' not in str(environment) and len(environment) <= 1, environment\n"
        f"assert len(opened) <= 5, opened\nassert {handle} not in opened or {handle} < 5\n"
    )
    try:
        assert check_program(program, ProgramTests(tests), QUICK).passed
    finally:
        os.close(handle)


KILLS_BY_FILE = (
    "import os, fcntl\nread, write = os.pipe()\n"
    "for request, value in ((8, os.getppid()), (10, 9), (4, os.O_NONBLOCK | os.O_ASYNC)):\n"
    "    try: fcntl.fcntl(read, request, value)\n    except OSError: pass\n"
    "os.write(write, b'x')\n"
)


def _check(program: str) -> None:
    assert check_program(program, ProgramTests("assert True"), Limits(timeout=60.0)).passed


def test_the_parent_outlives_a_file_that_signals_it() -> None:
    assert end(start(_check, KILLS_BY_FILE)) == 0


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    child = start(_check, "import time\ntime.sleep(50)")
    parent = psutil.Process(child.pid)
    while len(inside := parent.children(recursive=True)) < 2:
        assert child.is_alive()
    time.sleep(0.2)
    parent.kill()
    _, alive = psutil.wait_procs(inside, timeout=20)
    assert not alive
    end(child)


def test_a_process_whose_parent_died_before_it_was_confined_ends() -> None:
    limits = "memory=1 << 29, cpu_seconds=1, file_size=1, threads=1, own_root=False"
    call = f"confine('/tmp', parent=0, {limits})"
    code = f"from stillhouse.sandbox.confine import confine\n{call}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "the parent has died" in ran.stderr


def test_its_folder_is_empty_its_own_and_gone_afterwards(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os\nthere = os.listdir('.')\nopen('a.txt', 'w').write('2')\n"
        "def double(x): return x * int(open('a.txt').read())"
    )
    tests = ProgramTests("assert there == ['printed'] and double(4) == 8")
    assert check_program(program, tests, QUICK).passed
    assert list(tmp_path.iterdir()) == []


def test_a_test_that_is_hostile_itself_is_contained(tmp_path):
    mark = tmp_path / "mark"
    result = check_program("x = 1", ProgramTests(f"open({str(mark)!r}, 'w').write('x')"), QUICK)
    assert (result.passed, mark.exists()) == (False, False)
    assert not check_program("x = 1", ProgramTests("import os\nos._exit(0)"), QUICK).passed
    start = time.monotonic()
    assert check_program("x = 1", ProgramTests("while True: pass"), QUICK).status in ("timeout", "crashed")
    assert time.monotonic() - start < 60
