"""The prediction for many GPUs: what is exchanged, and what that takes."""

import math

import pytest
from runs import ROOT

from hccr_jax.bench.scaling import Links, efficiency, exchanges
from hccr_jax.cli import command
from hccr_jax.cli.config_files import load_config

LINKS = Links(gpus=8, nvlink=400e9, network=50e9, latency=20e-6, hop=5e-6)


def test_v2_sends_its_parameters_and_waits_twice_for_each_batch_norm() -> None:
    config = load_config(str(ROOT / "configs" / "v2.py"))
    parameters, norms = 7_033_451, 52  # published for 3,755 classes; counted in the architecture
    last, waiting = exchanges(config, 3755)
    assert last == 4 * parameters + 8
    assert len(waiting) == 2 * norms
    # Forward and backward two float32 sums for each channel; a scale and a shift are learnt.
    channels = sum(waiting) / 16
    assert channels == int(channels)
    config.model.batch_norm, config.reduce_dtype = "local", "bfloat16"
    last, waiting = exchanges(config, 3755)
    assert (last, waiting) == (2 * parameters + 8 + 8 * channels, [])


def test_a_reduction_takes_what_its_links_allow() -> None:
    assert LINKS.seconds(28e6, 1) == 0
    ring = 2 * 28e6 * 7 / 8 / 400e9
    assert LINKS.seconds(28e6, 8) == pytest.approx(20e-6 + ring)
    between = 2 * 3.5e6 * 7 / 8 / 50e9
    assert LINKS.seconds(28e6, 64) == pytest.approx(20e-6 + 3 * 10e-6 + ring + between)
    assert LINKS.seconds(28e6, 4) == pytest.approx(20e-6 + 2 * 28e6 * 3 / 4 / 400e9)
    assert efficiency(1e-3, 0, [0] * 10, LINKS, 8) == pytest.approx(1 / 1.22)
    assert math.isclose(efficiency(1e-3, 28e6, [], LINKS, 1), 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--images_per_second is missing: what one GPU reaches"),
        (["--images_per_second=9", "--gpus=8,x"], "--gpus=x: must be whole numbers"),
        (["--images_per_second=0"], "images_per_second"),
    ],
)
def test_wrong_requests(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={ROOT / 'configs' / 'v2.py'}"
    assert command.main(["scaling", config, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
