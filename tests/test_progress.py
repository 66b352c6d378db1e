import pytest

from fastfill import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_where_there_is_no_terminal(clock, capsys):
    with progress.stage("fitting", 1000, done=200) as stage:
        for seconds in (30, 31, 30, 31):  # at 61 s and at 122 s a minute has gone since the last line
            clock[0] += seconds
            stage.step(100, note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    # 200 in 61 s: the 600 that are left take 183 s; 400 in 122 s: 400 take 122 s.
    assert lines == [
        "fitting: 400 of 1,000, 1 min gone, 3 min left, loss 0.5",
        "fitting: 600 of 1,000, 2 min gone, 2 min left, loss 0.5",
    ]


def test_short_work_says_nothing(clock, capsys):
    with progress.stage("fitting", 10) as stage:
        clock[0] += 59
        stage.step(10)
    assert capsys.readouterr().err == ""
