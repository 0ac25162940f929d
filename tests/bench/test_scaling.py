"""The prediction for many GPUs: what is exchanged, and what that takes."""

import math

import pytest
from runs import ROOT

from hccr_jax.bench.scaling import Exchange, Links, count_exchanges, efficiency
from hccr_jax.cli import command
from hccr_jax.cli.config_files import load_config

MB28 = Exchange(28_000_000)
LINKS = Links(gpus=8, nvlink=400e9, network=50e9, latency=20e-6, hop=5e-6)


def test_v2_sends_its_parameters_at_once_and_waits_twice_for_each_global_batch_norm() -> None:
    config = load_config(str(ROOT / "configs" / "v2.py"))
    parameters, norms = 7_033_451, 52  # published for 3,755 classes; counted in the architecture
    *waiting, last = count_exchanges(config_of(config, "global", "float32"), 3755)
    assert len(waiting) == 2 * norms
    assert sum(exchange.gathers for exchange in waiting) == norms
    # Forward and backward two float32 sums for each channel; a scale and a shift are learnt.
    channels = sum(exchange.num_bytes for exchange in waiting) / 16
    assert channels == int(channels)
    # Gradients, mean and variance of each channel, loss and accuracy.
    assert last == (4 * parameters + 8 * channels + 8, False)
    assert count_exchanges(config_of(config, "local", "float32"), 3755) == [last]
    narrow = count_exchanges(config_of(config, "local", "bfloat16"), 3755)
    assert [exchange.num_bytes for exchange in narrow] == [2 * parameters, 8 * channels + 8]


def config_of(config, norm: str, dtype: str):
    config.model.batch_norm, config.reduce_dtype = norm, dtype
    return config


def test_a_reduction_takes_what_its_links_allow() -> None:
    assert LINKS.seconds(MB28, 1) == 0
    ring = 2 * 28e6 * 7 / 8 / 400e9
    assert LINKS.seconds(MB28, 8) == pytest.approx(20e-6 + ring)
    between = 2 * 3.5e6 * 7 / 8 / 50e9
    assert LINKS.seconds(MB28, 64) == pytest.approx(20e-6 + 3 * 10e-6 + ring + between)
    assert LINKS.seconds(MB28, 4) == pytest.approx(20e-6 + 2 * 28e6 * 3 / 4 / 400e9)
    gathered = LINKS.seconds(Exchange(10_000, gathers=True), 16)
    assert gathered == pytest.approx(20e-6 + 10e-6 + 10_000 * 15 / 400e9 + 10_000 / 50e9)
    assert efficiency(1e-3, [Exchange(0)] * 11, LINKS, 8) == pytest.approx(1 / 1.22)
    assert math.isclose(efficiency(1e-3, [MB28], LINKS, 1), 1.0)


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
