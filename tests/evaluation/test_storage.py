"""Rows on disk: appended whole, read whatever happened, written by one process at a time, merged in data-set order."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmeff.errors import DataError, RunError
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.storage import RowWriter, RunStore, fingerprint, slug


def store(tmp_path, about=None):
    return RunStore.open(tmp_path, "org/model", "pope", "fast", {"fingerprint": "ab" * 32, **(about or {})})


def row(doc_id, **fields):
    return SampleRow(doc_id=doc_id, **fields)


def test_the_folder_is_named_by_model_benchmark_run_and_fingerprint(tmp_path):
    made = store(tmp_path)
    assert made.path == tmp_path / "org--model" / "pope" / "fast-abababab"
    assert json.loads((made.path / "run.json").read_text())["fingerprint"] == "ab" * 32
    (made.path / "run.json").write_text(json.dumps({"fingerprint": "ab" * 4 + "cd" * 28}))
    with pytest.raises(DataError, match="another run"):
        store(tmp_path)


def test_rows_of_all_processes_are_merged_in_the_order_of_the_data(tmp_path):
    made = store(tmp_path)
    for rank, ids in enumerate((["c", "a"], ["b"], [])):
        with RowWriter(made, rank) as writer:
            for doc_id in ids:
                writer.write(row(doc_id, rank=rank, prediction=f"é {doc_id}"))
    with pytest.raises(RunError, match=r"E-RUN-02.*1 of 4.*'d'"):
        made.merge(["a", "b", "c", "d"])
    assert not made.is_done
    merged = made.merge(["b", "a", "c"])
    assert [r.doc_id for r in merged] == ["b", "a", "c"]
    lines = (made.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == ["é b", "é a", "é c"]
    assert made.is_done


def test_a_line_that_was_being_written_is_dropped_and_overwritten(tmp_path):
    made = store(tmp_path)
    with RowWriter(made) as writer:
        writer.write(row("a"))
    part = made.path / "samples.rank0.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"doc_id": "b", "predi')
    with pytest.warns(UserWarning, match="last line"):
        assert list(made.rows()) == ["a"]
    with RowWriter(made) as writer:
        writer.write(row("b"))
    assert list(made.rows()) == ["a", "b"]
    part.write_bytes(b"not json\n" + whole)
    with pytest.raises(DataError, match=r"line 1"):
        made.rows()


def test_the_answer_counts_before_a_failure_and_a_later_attempt_before_an_earlier(tmp_path):
    made = store(tmp_path)
    with RowWriter(made, 1) as writer:
        writer.write(row("a", error="boom"))
        writer.write(row("b", error="boom"))
    with RowWriter(made, 0) as writer:
        writer.write(row("a", attempt=2, prediction="yes"))
        writer.write(row("b", attempt=2, error="again"))
    found = made.rows()
    assert (found["a"].prediction, found["a"].error) == ("yes", None)
    assert found["b"].error == "again"


def test_one_process_writes_and_the_lock_of_a_dead_one_is_taken(tmp_path):
    made = store(tmp_path)
    with RowWriter(made), pytest.raises(RunError, match=f"E-RUN-01.*process {os.getpid()}"), RowWriter(made):
        pass
    assert not list(made.path.glob("lock*"))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock = made.path / "lock.rank0.json"
    lock.write_text(json.dumps({"pid": int(dead.stdout), "host": socket.gethostname(), "started": 0}))
    with RowWriter(made) as writer:
        writer.write(row("a"))
    lock.write_text(json.dumps({"pid": 1, "host": "another-machine", "started": 0}))
    with pytest.raises(RunError, match="another machine"), RowWriter(made):
        pass


def test_a_run_that_is_being_written_is_not_moved_away_and_two_of_a_second_have_two_names(tmp_path):
    made = store(tmp_path)
    with RowWriter(made) as writer:
        writer.write(row("a"))
        with pytest.raises(RunError, match="E-RUN-01"):
            made.move_away()
    first = made.move_away()
    assert (first / "samples.rank0.jsonl").exists()
    second = store(tmp_path).move_away()
    assert second != first
    assert {first.name, second.name} == {p.name for p in made.path.parent.iterdir()}
    assert store(tmp_path).rows() == {}
    assert RunStore(tmp_path / "nowhere").move_away() is None


def test_shares_that_have_ended_are_those_of_this_launch_and_are_gone_once_merged(tmp_path):
    made = store(tmp_path)
    with RowWriter(made) as writer:
        writer.write(row("a"))
    made.end_share(1, 3, "monday")
    made.end_share(2, 3, "monday")
    assert made.ended_shares(3, "monday") == {1, 2}
    assert made.ended_shares(3, "tuesday") == made.ended_shares(2, "monday") == set()
    made.begin_share(1)
    assert made.ended_shares(3, "monday") == {2}
    made.merge(["a"])
    assert made.ended_shares(3, "monday") == set()


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=3), max_size=5))
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(inputs):
    assert fingerprint(inputs) == fingerprint(dict(reversed(inputs.items())))
    assert fingerprint(inputs) != fingerprint({**inputs, "another": 1})


@given(st.text(max_size=30))
def test_a_slug_is_a_plain_folder_name(name):
    made = slug(name)
    assert made
    assert not set(made) & set("/\\: ")
    assert made not in (".", "..")


def test_storage_needs_no_torch():
    code = "import sys, vlmeff.evaluation.storage, vlmeff.evaluation.samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
