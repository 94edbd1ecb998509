"""The frame of the benchmarks."""

import io
import json
import math
import random
import subprocess

import pytest

from benchmarks.harness import Peer, Progress, Ratio, Run, Samples, format_table, main
from benchmarks.machine import current_commit, describe_machine


def counting_peer(name, calls, values):
    remaining = iter(values)

    def measure():
        calls.append(name)
        return next(remaining)

    return Peer(name, measure)


def run_of(body, *arguments):
    assert main("sample", "How does it go?", body, arguments=list(arguments)) == 0


def test_peers_alternate_and_warm_up_is_not_recorded():
    calls, results = [], {}

    def body(run):
        peers = [counting_peer("a", calls, [99.0, 1.0, 5.0, 3.0]), counting_peer("b", calls, [99.0, 2.0, 2.0, 4.0])]
        results.update(run.alternate(peers, repetitions=3))

    run_of(body)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert results == {"a": Samples((1.0, 5.0, 3.0)), "b": Samples((2.0, 2.0, 4.0))}
    assert (results["a"].median, results["a"].spread) == (3.0, 4.0)


def test_quick_measures_at_most_twice():
    calls = []
    run_of(lambda run: run.alternate([counting_peer("a", calls, [1.0] * 9)], repetitions=7, warmup=3), "--quick")
    assert len(calls) == 3


def test_rounds_know_their_order_and_whether_they_count():
    rounds = []
    run_of(lambda run: rounds.extend(run.rounds(2)))
    assert [(turn.label, turn.recorded, turn.order("ab")) for turn in rounds] == [
        ("warm-up", False, "ba"),
        ("repetition 1/2", True, "ab"),
        ("repetition 2/2", True, "ba"),
    ]


@pytest.mark.parametrize(  # ranks as in published tables of the sign test
    ("count", "lowest", "highest"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (15, 4, 12), (20, 6, 15)]
)
def test_the_medians_interval_is_found_from_the_order(count, lowest, highest):
    values = [float(rank) for rank in range(1, count + 1)]
    assert Ratio(tuple(values[::-1])).interval() == (lowest, highest)


def test_the_medians_interval_misses_it_as_rarely_as_it_says():
    draw = random.Random(1)
    intervals = [Ratio(tuple(draw.expovariate(math.log(2)) for _ in range(15))).interval() for _ in range(4000)]
    assert sum(low <= 1.0 <= high for low, high in intervals) / len(intervals) == pytest.approx(0.965, abs=0.01)


def test_peers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="distinct names"):
        run_of(lambda run: run.alternate([Peer("a", float), Peer("a", float)], repetitions=1))


def test_json_file_and_table(tmp_path, capsys):
    def body(run):
        assert run.options.size == 3
        run.progress.update("thinking")
        run.row({"placement": "local", "step_ms": 1.23456, "tokens": 64})
        run.row({"placement": "remote", "step_ms": float("inf"), "note": "far"})
        run.summary("slowdown", 1.5)
        run.target("slowdown", 1.5, at_most=1.2)
        run.target("speed", 12345.6, at_least=100)

    file = tmp_path / "results" / "sample.json"
    arguments = ["--json", str(file), "--size", "3"]
    assert main("sample", "How?", body, lambda parser: parser.add_argument("--size", type=int), arguments) == 0
    result = json.loads(file.read_text())
    assert list(result) == ["name", "machine", "commit", "rows", "summary", "targets"]
    assert result["name"] == "sample"
    assert result["rows"] == [
        {"placement": "local", "step_ms": 1.23456, "tokens": 64},
        {"placement": "remote", "step_ms": None, "note": "far"},
    ]
    assert result["summary"] == {"slowdown": 1.5}
    assert result["targets"] == {
        "slowdown": {"value": 1.5, "goal": 1.2, "ok": False},
        "speed": {"value": 12345.6, "goal": 100, "ok": True},
    }
    printed = capsys.readouterr()
    assert "thinking" in printed.err
    assert "<= 1.2  missed" in printed.out
    assert ">= 100  ok" in printed.out


def test_a_target_has_one_goal():
    with pytest.raises(ValueError, match="either at_least or at_most"):
        run_of(lambda run: run.target("x", 1.0))
    with pytest.raises(ValueError, match="either at_least or at_most"):
        run_of(lambda run: run.target("x", 1.0, at_least=1.0, at_most=2.0))


def test_a_target_of_zero_is_a_goal():
    run_of(lambda run: run.target("errors", 0, at_most=0))


def test_table_aligns_numbers_right_and_texts_left():
    table = format_table([{"name": "a", "ms": 1.5}, {"name": "long name", "ms": 12345.678, "n": 7}])
    assert table.splitlines() == [
        "name          ms  n",
        "---------  -----  -",
        "a            1.5",
        "long name  12346  7",
    ]


def test_progress_rewrites_its_line_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream)
        progress.update("one")
        progress.update("two")
        progress.clear()
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("two\r\x1b[K")
    assert [line.partition("] ")[2] for line in file.getvalue().splitlines()] == ["one", "two"]


def test_an_error_ends_the_benchmark_without_a_file(tmp_path):
    def body(run: Run) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_of(body, "--json", str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_machine_names_what_matters():
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["torch"]


def test_commit_says_when_files_were_changed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    assert current_commit(tmp_path / "nowhere") == "unknown"
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert current_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert current_commit(tmp_path) == f"{head}-dirty"
