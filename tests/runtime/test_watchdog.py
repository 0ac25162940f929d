"""The watchdog ends a stuck process, but neither a slow nor a suspended one."""

import signal
import subprocess
import sys
import time

import pytest


def run(body: str) -> subprocess.Popen[str]:
    code = f"import time\nfrom hccr_jax.runtime import watchdog\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_step_that_does_not_end_is_reported_with_all_stacks() -> None:
    process = run("""
def step_that_hangs():
    time.sleep(600)
with watchdog.watching(0.5):
    watchdog.beat("the steps after 41")
    print(flush=True)
    step_that_hangs()
""")
    process.stdout.readline()
    start = time.monotonic()
    reported = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 10.5
    assert process.returncode == 1
    assert "stuck: the steps after 41 for" in reported
    assert "in step_that_hangs" in reported
    assert "a resumed run continues from the last checkpoint" in reported


def test_a_slow_task_may_take_ten_times_as_long_and_a_failure_ends_the_watch() -> None:
    process = run("""
try:
    with watchdog.watching(0.5):
        watchdog.beat("compiling", watchdog.SLOW)
        time.sleep(1.5)
        raise FloatingPointError
except FloatingPointError:
    time.sleep(6)
""")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_a_suspended_process_is_not_stuck() -> None:
    process = run("""
with watchdog.watching(2.0):
    for _ in range(60):
        watchdog.beat("steps")
        print(flush=True)
        time.sleep(0.1)
""")
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    reported = process.communicate(timeout=60)[1]
    assert (process.returncode, reported) == (0, "")
