"""`stages/repro.py` on small pipelines of shell stages. They synchronize through named pipes, never by sleeping."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
import zc.lockfile
from conftest import REPOSITORY
from repro import usual_jobs
from small_pipelines import ENVIRONMENT, finish, init_dvc, repro, start

from rrcm.utils.provenance import available_cores

pytestmark = pytest.mark.thorough  # starts schedulers and DVC

CORES = available_cores()
DIAMOND = {
    "last": {"cmd": "cat left right > last", "deps": ["left", "right"], "outs": ["last"]},
    "right": {"cmd": "cat first > right; echo right >> right", "deps": ["first"], "outs": ["right"]},
    "left": {"cmd": "cat first > left; echo left >> left", "deps": ["first"], "outs": ["left"]},
    "first": {"cmd": "echo first > first", "outs": ["first"]},
    "lonely": {"cmd": "echo lonely > lonely", "outs": ["lonely"]},
}
SLOW = """\
import signal, sys
from pathlib import Path

if Path("go").exists():
    sys.exit(not Path("slow").write_bytes(Path("first").read_bytes()))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
Path("started").write_text("here")
signal.sigwait({signal.SIGTERM})
Path("saved").touch()
sys.exit(1)
"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return init_dvc(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def make(empty, tmp_path):
    """A function that makes a DVC repository with the given stages in tmp_path/NAME."""

    def build(stages: dict, name: str = "pipeline") -> Path:
        folder = shutil.copytree(empty, tmp_path / name)
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        return folder

    return build


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def outputs(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*names, "dvc.lock")}


def slow_pipeline(make, name: str = "pipeline", script: str = "slow.py") -> Path:
    """first -> slow -> last. Without the file `go`, slow writes into the pipe `started` and waits to be stopped.

    Scripts in stages/ are forked from the scheduler, if there are enough of them (stages/warm.py).
    """
    others = [f"other{i}" for i in range(2 * script.startswith("stages/"))]
    folder = make(
        {
            "first": DIAMOND["first"],
            **{each: {"cmd": f"python stages/{each}.py", "deps": ["first"], "outs": [each]} for each in others},
            "slow": {"cmd": f"python {script}", "deps": ["first", *others], "outs": ["slow"]},
            "last": {"cmd": "cat slow > last", "deps": ["slow"], "outs": ["last"]},
        },
        name,
    )
    (folder / "stages").mkdir()
    (folder / script).write_text(SLOW)
    for each in others:
        (folder / f"stages/{each}.py").write_text(f"open({each!r}, 'w').close()\n")
    os.mkfifo(folder / "started")
    return folder


def test_one_or_two_jobs_and_dvc_itself_give_the_same_bytes(make):
    folders = [make(DIAMOND, name) for name in ("one", "two", "dvc")]
    for jobs, folder in (("1", folders[0]), ("2", folders[1])):
        assert "5 ran, 0 restored from the cache, 0 up to date" in repro(folder, "--jobs", jobs)
    subprocess.run(["dvc", "repro", "-q"], cwd=folders[2], env=ENVIRONMENT, check=True)
    assert (folders[0] / "last").read_text() == "first\nleft\nfirst\nright\n"
    first, *others = [outputs(folder, *DIAMOND) for folder in folders]
    assert others == [first, first]


def test_a_second_run_starts_nothing_and_lost_outputs_come_from_the_cache(make):
    folder = make(DIAMOND)
    repro(folder)
    made = outputs(folder, *DIAMOND)
    for log in (folder / "runs/logs").glob("*.log"):
        log.unlink()
    assert "0 ran, 0 restored from the cache, 5 up to date" in repro(folder)
    assert not list((folder / "runs/logs").glob("*.log"))
    for name in ("left", "last", "dvc.lock"):
        (folder / name).unlink()
    assert "2 ran, 3 restored from the cache, 0 up to date" in repro(folder)  # DVC caches no run without dependencies
    assert outputs(folder, *DIAMOND) == made


def test_a_change_reruns_what_it_reaches_and_no_more(make):
    folder = make(DIAMOND)
    repro(folder)
    changed = DIAMOND | {"left": DIAMOND["left"] | {"cmd": "cat first > left; echo new >> left"}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": changed}, sort_keys=False))
    output = repro(folder)
    assert "left: ran" in output and "last: ran" in output and "2 ran" in output and "3 up to date" in output
    same = changed | {"first": DIAMOND["first"] | {"cmd": "echo first > ./first"}}  # another command, the same bytes
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": same}, sort_keys=False))
    assert "1 ran, 0 restored from the cache, 4 up to date" in repro(folder)


def test_only_targets_and_what_they_need_are_made(make):
    folder = make(DIAMOND)
    assert "2 ran" in repro(folder, "left")
    assert (folder / "left").exists() and not (folder / "right").exists() and not (folder / "lonely").exists()


def test_ready_stages_run_at_once_each_on_its_own_gpu(make):
    """Each waits for the other, so one after another they would never end."""
    ask = "echo $CUDA_VISIBLE_DEVICES"
    folder = make(
        {
            "ping": {"cmd": f"echo > there; cat back; {ask} > ping", "outs": ["ping"]},
            "pong": {"cmd": f"cat there; echo > back; {ask} > pong", "outs": ["pong"]},
            "wide": {"cmd": f"{ask} > wide # torchrun", "outs": ["wide"]},
        }
    )
    os.mkfifo(folder / "there")
    os.mkfifo(folder / "back")
    assert "3 stages, 2 at once" in repro(folder, CUDA_VISIBLE_DEVICES="3,7")
    assert {(folder / "ping").read_text(), (folder / "pong").read_text()} == {"3\n", "7\n"}
    assert (folder / "wide").read_text() == "3,7\n"


def test_a_launcher_sees_every_gpu_even_if_one_stage_runs_at_a_time(make):
    folder = make({"wide": {"cmd": "echo $CUDA_VISIBLE_DEVICES > wide # torchrun", "outs": ["wide"]}})
    repro(folder, "--jobs", "1", CUDA_VISIBLE_DEVICES="3,7")
    assert (folder / "wide").read_text() == "3,7\n"


@pytest.mark.parametrize(
    ("params", "environment", "jobs"),
    [
        ("threads: 1", {}, CORES),
        (f"threads: {CORES}", {}, 1),
        ("threads: null", {}, 1),
        ("", {"OMP_NUM_THREADS": "1"}, CORES),
        ("", {"OMP_NUM_THREADS": f"{CORES},1"}, 1),  # a number for each level of nested threads
        *[("", {"OMP_NUM_THREADS": text}, 1) for text in ("", "0", "all", ",")],
        *[(text, {"OMP_NUM_THREADS": ""}, 1) for text in ("threads: all", "threads: 0", "[1]", "\x00")],
    ],
)
def test_the_number_of_jobs_follows_from_the_threads_of_a_stage(tmp_path, monkeypatch, params, environment, jobs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "params.yaml").write_text(params)
    assert usual_jobs([]) == jobs


def test_a_failure_is_named_and_stops_the_rest(make):
    folder = slow_pipeline(make)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    stages["bad"] = {
        "cmd": "cat started > /dev/null; echo boom; exit 3",
        "deps": ["first"],
        "outs": ["bad"],
    }  # once slow is there
    stages["after"] = {"cmd": "echo > after", "deps": ["bad"], "outs": ["after"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    output = repro(folder, "--jobs", "2", status=1)
    assert "error: stage bad failed" in output and "  boom\n" in output and "runs/logs/bad.log" in output
    assert "Traceback" not in output
    assert (folder / "saved").exists(), "the other stage got no chance to save"
    assert not (folder / "after").exists() and not (folder / "last").exists()
    assert not processes_in(folder)


@pytest.mark.parametrize("signo, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("script", ["slow.py", "stages/slow.py"])
def test_stopped_or_killed_it_leaves_nothing_behind_and_goes_on(make, signo, status, script):
    undisturbed = slow_pipeline(make, "undisturbed", script)
    (undisturbed / "go").touch()
    repro(undisturbed)

    folder = slow_pipeline(make, script=script)
    process = start(folder)
    with (folder / "started").open() as pipe:
        pipe.read()
    process.send_signal(signo)
    finish(process, status)
    if signo == signal.SIGKILL:  # its children see to that alone; this waits for them
        repro(folder, "first")
    assert not processes_in(folder)
    assert (folder / "saved").exists()
    assert not (folder / "slow").exists()

    (folder / "go").touch()
    repro(folder)
    assert outputs(folder, "first", "slow", "last") == outputs(undisturbed, "first", "slow", "last")


def test_a_command_that_survives_everything_is_waited_for(make):
    """Scheduler and DVC killed, the command not: another run must not start it beside the old one."""
    folder = make({"slow": {"cmd": "sh slow.sh", "outs": ["slow"]}})
    # The kernel sends SIGHUP to a process group that has lost its parents while one of its processes was stopped.
    (folder / "slow.sh").write_text("trap '' HUP; echo $$ > started; cat never > slow\n")
    os.mkfifo(folder / "started")
    os.mkfifo(folder / "never")
    process = start(folder)
    command = psutil.Process(int((folder / "started").read_text()))
    parents = [parent for parent in command.parents() if parent.pid != os.getpid()]
    parents = parents[: [parent.pid for parent in parents].index(process.pid) + 1]
    for parent in parents:  # all at once, as far as they can tell: DVC learns of no death and passes nothing on
        parent.send_signal(signal.SIGSTOP)
        while parent.status() != psutil.STATUS_STOPPED:
            os.sched_yield()
    for parent in parents:
        parent.kill()
    finish(process, -9)
    if not command.is_running():
        pytest.skip("the shell of this machine ran the command in its own place")

    again = start(folder)
    while "still runs" not in again.stderr.readline():
        assert again.poll() is None
    (folder / "never").write_text("end\n")  # the old one ends
    assert (folder / "started").read_text()
    (folder / "never").write_text("new\n")
    finish(again)
    assert (folder / "slow").read_text() == "new\n"


@pytest.mark.parametrize("cut", ["", "first:\n", "md5: eb26", "deps:\n"])
def test_a_half_written_lock_file_is_put_back(make, cut):
    folder = make(DIAMOND)
    repro(folder)
    made = outputs(folder, *DIAMOND)
    text = made["dvc.lock"].decode()
    shutil.copy(folder / "dvc.lock", folder / "runs/logs/dvc.lock")  # as a run that is killed leaves it
    (folder / "dvc.lock").write_text(text[: text.index(cut) + len(cut)])
    output = repro(folder)
    assert "half-written" in output and "5 up to date" in output
    assert outputs(folder, *DIAMOND) == made
    assert not (folder / "runs/logs/dvc.lock").exists()


def test_killed_while_dvc_writes_its_first_lock_file_it_goes_on(make):
    """DVC empties the file first. There was none before that could be put back."""
    undisturbed, folder = make(DIAMOND, "undisturbed"), make(DIAMOND)
    repro(undisturbed)
    (folder / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"wait": {"cmd": "echo > started; cat never", "outs": ["wait"]}, **DIAMOND}})
    )
    for name in ("started", "never"):
        os.mkfifo(folder / name)
    process = start(folder, "wait")
    (folder / "started").read_text()
    (folder / "dvc.lock").touch()
    process.kill()
    finish(process, -9)
    shutil.copy(undisturbed / "dvc.yaml", folder / "dvc.yaml")
    assert "half-written" in repro(folder)
    assert outputs(folder, *DIAMOND) == outputs(undisturbed, *DIAMOND)


@pytest.mark.parametrize("text", ["", '{"read": {"first": [{"pid"'])
def test_killed_while_dvc_writes_its_list_of_readers_and_writers_it_goes_on(make, text):
    folder = make(DIAMOND)
    (folder / ".dvc/tmp").mkdir(exist_ok=True)
    (folder / ".dvc/tmp/rwlock").write_text(text)
    output = repro(folder)
    assert ".dvc/tmp/rwlock" in output and "5 ran" in output


def test_killed_before_the_lock_file_is_sorted_it_is_sorted_by_the_next_run(make):
    folder = make(DIAMOND)
    repro(folder)
    made = outputs(folder, *DIAMOND)
    lock = yaml.safe_load(made["dvc.lock"])
    lock["stages"] = dict(reversed(lock["stages"].items()))
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    assert "5 up to date" in repro(folder)
    assert outputs(folder, *DIAMOND) == made


NO_LOCKS = """\
import errno, fcntl

def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
"""


def test_on_a_file_system_without_locks_it_says_what_to_set_and_then_runs(make, tmp_path):
    """DVC itself says that another process has its lock."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text(NO_LOCKS)  # Python runs it at every start
    environment = {"PYTHONPATH": f"{tmp_path / 'without'}:{REPOSITORY}"}
    folder = make(DIAMOND)
    note, line = repro(folder, status=1, **environment).splitlines()
    assert note.startswith("note: ") and "runs/logs has no file locks (No locks available); start no second" in note
    setting = "rm -f .dvc/tmp/*lock; dvc config --local core.hardlink_lock true"
    assert line == f"error: {folder}/.dvc/tmp: has no file locks, which DVC needs; run `{setting}`"
    subprocess.run(setting, shell=True, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    printed = repro(folder, "--jobs", "2", **environment)
    assert "5 ran" in printed and printed.count("note: ") == 1
    assert (folder / "last").read_text() == "first\nleft\nfirst\nright\n"


def test_it_waits_for_another_dvc_command(make):
    folder = make(DIAMOND)
    (folder / ".dvc/tmp").mkdir(exist_ok=True)
    held = zc.lockfile.LockFile(str(folder / ".dvc/tmp/lock"))
    process = start(folder)
    while "another DVC command is at work here" not in process.stderr.readline():
        assert process.poll() is None
    held.close()
    assert "5 ran" in finish(process)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stages: {a: {cmd: 'true', nonsense: 1}}", "dvc.yaml"),
        ("stages: [", "dvc.yaml"),
        (
            "stages: {a: {cmd: 'true', deps: [b], outs: [c]}, b: {cmd: 'true', deps: [c], outs: [b]}}",
            "dependency and an output",
        ),
    ],
)
def test_an_invalid_pipeline_is_refused_in_one_line(make, text, message):
    folder = make({})
    (folder / "dvc.yaml").write_text(text)
    output = repro(folder, status=1)
    assert output.startswith("error: ") and message in output and output.count("\n") == 1


def test_outside_of_a_repository_and_for_unknown_targets_it_says_so_in_one_line(make, tmp_path):
    (tmp_path / "nothing").mkdir()
    output = repro(tmp_path / "nothing", status=1)
    assert output.startswith("error: ") and "not inside of a DVC repository" in output and output.count("\n") == 1
    output = repro(make(DIAMOND), "nope", status=1)
    assert output.startswith("error: ") and "nope" in output and output.count("\n") == 1
