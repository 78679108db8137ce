"""``vlmeff eval`` by several processes, under torchrun and on Ray: the rows of one process, whoever dies on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vlmeff.errors import ConfigError, MissingExtraError, UnknownPresetError
from vlmeff.evaluation import ray_engine
from vlmeff.evaluation.benchmarks import get
from vlmeff.evaluation.ray_engine import evaluate_on_ray
from vlmeff.evaluation.runner import Interrupted, Progress, Settings, Shard, evaluate

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8
TIMES = ("preprocess_ms", "vision_ms", "score_ms", "ttft_ms", "e2e_ms", "peak_mem_bytes", "rank", "attempt")
RUNS = ["baseline", "fast", "fast-random"]
PATIENCE = 180  # seconds until a process counts as hung

slow = pytest.mark.slow
on_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'ray'")


def settings(output, **changes):
    return Settings(
        **{"model": "tiny-llava", "output": output, "limit": LIMIT, "controls": ("random",), "warmup": 0, **changes}
    )


def read(output):
    """{run: lines of its merged file}."""
    found = {}
    for file in sorted((output / "tiny-llava" / "easy_vqa").glob("*/samples.jsonl")):
        found[file.parent.name.rsplit("-", 1)[0]] = [json.loads(line) for line in file.open(encoding="utf-8")]
    return found


def untimed(output):
    """The same without what differs from one execution to the next."""
    return {
        name: [{k: v for k, v in row.items() if k not in TIMES} for row in rows] for name, rows in read(output).items()
    }


def ranks(output):
    return {row["rank"] for rows in read(output).values() for row in rows}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    output = tmp_path_factory.mktemp("alone")
    evaluate(settings(output), shard=Shard())
    found = untimed(output)
    assert sorted(found) == RUNS
    return found


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def arguments(output):
    options = ["--limit", str(LIMIT), "--controls", "random", "--warmup", "0", "--json", "--output", str(output)]
    return ["vlmeff.cli", "eval", *options]


# -- torchrun


@contextmanager
def started(command, **options):
    """A process with a session of its own, of which nothing is left behind the block."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        for pid in session_members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def torchrun(output):
    # Nice, so that who is to kill it comes in time.
    command = ["nice", sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return started(command + arguments(output), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(running):
    with running as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out, err


@slow
def test_two_processes_of_torchrun_write_what_one_writes_and_report_once(alone, tmp_path):
    out, err = finish(torchrun(tmp_path))
    assert untimed(tmp_path) == alone
    for rows in read(tmp_path).values():
        assert [row["rank"] for row in rows] == [i % 2 for i in range(LIMIT)]
    assert len(json.loads(out)["headline"]) == 3  # one object, so one process spoke
    assert err.count("loading tiny-llava") == 1
    assert len(list(tmp_path.rglob("done.json"))) == 3
    assert not list(tmp_path.rglob("lock*"))


@slow
def test_a_killed_process_of_torchrun_is_made_up_for_by_the_same_command(alone, tmp_path):
    with torchrun(tmp_path) as process:
        end = time.monotonic() + PATIENCE
        lock = None
        while lock is None:
            locks = tmp_path.rglob("lock.rank1.json")
            lock = next((f for f in locks if f.with_name("samples.rank1.jsonl").exists()), None)
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not list(tmp_path.rglob("done.json"))
    finish(torchrun(tmp_path))
    assert untimed(tmp_path) == alone
    assert ranks(tmp_path) == {0, 1}


def test_several_processes_do_not_start_again_from_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"--no-resume .*another --output"):
        evaluate(settings(tmp_path, resume=False), shard=Shard(1, 2))


# -- Ray


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests that do not start their own; it must still be there after each."""
    ray = ray_engine._import_ray()
    ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=80 * 2**20, log_to_driver=False)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def deadly(doc_id, flags, times):
    """A worker that is killed when it is asked about a document, so many times. Local, so that it travels by value."""

    class Deadly(ray_engine.Worker):
        def answer(self, benchmark, asked, tasks, about):
            before = len(list(flags.iterdir()))
            if doc_id in asked and before < times:
                (flags / str(before)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(benchmark, asked, tasks, about)

    flags.mkdir()
    return Deadly


@slow
@on_ray
def test_two_workers_give_the_rows_of_one_process(alone, tmp_path, cluster):
    seen = []
    progress = Progress(begin=lambda *a: seen.append(a), step=lambda name, rows: seen.append(rows[0].doc_id))
    stores = evaluate_on_ray(settings(tmp_path), workers=2, progress=progress)
    assert sorted(store.path.name.rsplit("-", 1)[0] for store in stores) == RUNS
    assert untimed(tmp_path) == alone
    assert ranks(tmp_path) == {0, 1}
    assert seen[0] == ("easy_vqa", 0, LIMIT)
    assert sorted(seen[1:]) == sorted(get("easy_vqa").load(limit=LIMIT).doc_ids)
    assert all(row["timing_valid"] and row["ttft_ms"] > 0 for rows in read(tmp_path).values() for row in rows)
    # The files are those of one local process, which therefore finds nothing left to do.
    assert {p.name for p in tmp_path.rglob("samples.rank*")} == {"samples.rank0.jsonl"}
    begun = []
    evaluate(settings(tmp_path), shard=Shard(), progress=Progress(begin=lambda *a: begun.append(a[1:])))
    assert begun == [(LIMIT, LIMIT)]


@slow
@on_ray
def test_a_worker_that_is_killed_is_replaced_and_its_document_asked_again(alone, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_engine.Workers, "worker", deadly("easy_vqa/test/3", tmp_path / "flags", times=2))
    with pytest.warns(UserWarning, match="lost at 'easy_vqa/test/3'.*asked again") as caught:
        evaluate_on_ray(settings(tmp_path / "out"), workers=2)
    assert len([w for w in caught if "was lost" in str(w.message)]) == 2
    assert untimed(tmp_path / "out") == alone


@slow
@on_ray
def test_the_documents_of_a_batch_that_lost_its_worker_are_asked_one_by_one(alone, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_engine.Workers, "worker", deadly("easy_vqa/test/3", tmp_path / "flags", times=1))
    with pytest.warns(UserWarning, match="lost at .* and 3 more .*asked again"):
        evaluate_on_ray(settings(tmp_path / "out", perf="accuracy", batch_size=4), workers=1)
    found = {name: [{**row, "timing_valid": True} for row in rows] for name, rows in untimed(tmp_path / "out").items()}
    assert found == alone


@slow
@on_ray
def test_a_document_that_kills_every_worker_is_an_error_of_that_document_alone(alone, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_engine.Workers, "worker", deadly("easy_vqa/test/3", tmp_path / "flags", times=99))
    only = settings(tmp_path / "out", presets=(), controls=(), max_error_rate=0.5)
    with pytest.warns(UserWarning, match="the 3rd at this document"):
        evaluate_on_ray(only, workers=1)
    assert len(list((tmp_path / "flags").iterdir())) == 3
    rows = untimed(tmp_path / "out")["baseline"]
    assert [row["error"] is not None for row in rows] == [row["doc_id"] == "easy_vqa/test/3" for row in rows]
    (lost,) = (row for row in rows if row["error"])
    assert lost["error"].startswith("E-RUN-04: 3 workers were lost at it")
    assert lost["scores"]["right"] == 0
    assert [row for row in rows if row != lost] == [r for r in alone["baseline"] if r["doc_id"] != lost["doc_id"]]


@slow
@on_ray
def test_ctrl_c_keeps_what_the_workers_have_begun(alone, tmp_path, cluster):
    steps = []

    def step(benchmark, rows):
        steps.append(rows[0].doc_id)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    only = settings(tmp_path, presets=(), controls=())
    with pytest.raises(Interrupted, match=f"of {LIMIT} documents"):
        evaluate_on_ray(only, workers=2, progress=Progress(step=step))
    kept = next(tmp_path.rglob("samples.rank0.jsonl")).read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in kept] == steps
    assert 2 <= len(steps) <= 3  # at most the other worker's document came after the second
    begun = []
    evaluate_on_ray(only, workers=1, progress=Progress(begin=lambda *a: begun.append(a[1:])))
    assert begun == [(len(steps), LIMIT)]
    assert untimed(tmp_path)["baseline"] == alone["baseline"]


@slow
@on_ray
def test_an_error_in_a_worker_is_the_error_of_the_local_engine(tmp_path, cluster):
    wrong = settings(tmp_path, presets=("fats",))
    with pytest.raises(UnknownPresetError) as local:
        evaluate(wrong, shard=Shard())
    with pytest.raises(UnknownPresetError) as remote:
        evaluate_on_ray(wrong)
    assert str(remote.value) == str(local.value)
    with pytest.raises(ConfigError, match=r"--workers 50: the cluster has 2 CPUs"):
        evaluate_on_ray(settings(tmp_path), workers=50)
    with pytest.raises(ConfigError, match="--device cuda"):
        evaluate_on_ray(settings(tmp_path, device="cuda:1"))


@slow
@on_ray
def test_the_command_line_starts_ray_on_loopback_and_ends_it(alone, tmp_path):
    command = [sys.executable, "-m", *arguments(tmp_path), "--engine", "ray", "--workers", "2"]
    outside = {k: v for k, v in environment().items() if not k.startswith("RAY_")}
    with started(command, env=outside, stdout=subprocess.PIPE) as process:
        heard = set()
        end = time.monotonic() + PATIENCE
        while process.poll() is None:
            assert time.monotonic() < end
            heard |= listening(process.pid)
            time.sleep(0.5)
        out = process.communicate(timeout=PATIENCE)[0]
        while session_members(process.pid) and time.monotonic() < end:  # the last of them are about to end
            time.sleep(0.1)
        left = session_members(process.pid)
    assert process.returncode == 0
    assert len(json.loads(out)["headline"]) == 3
    assert untimed(tmp_path) == alone
    if Path("/proc/net/tcp").exists():
        assert heard == {"127.0.0.1"}
        assert not left


def session_members(session):
    """Living processes of a POSIX session (Ray's own are in it too)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[3] == str(session) and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def listening(session):
    """IPv4 addresses on which these processes wait for connections."""
    inodes = set()
    for pid in session_members(session):
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                last = fields[1].partition(":")[0][-8:]  # of an IPv6 address: the IPv4 one that is mapped into it
                found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(last))))
    return found


def test_without_ray_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'E-ENV-01: .*pip install "vlmeff\[ray\]"'):
        evaluate_on_ray(settings(tmp_path))


def test_ray_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        evaluate_on_ray(settings(tmp_path))
