"""Section 3.2 as a tool: the formulas against counts, by hand and as published."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from hccr_jax.bench import cost
from hccr_jax.cli import command
from hccr_jax.models.costs import named_costs
from hccr_jax.models.registry import create_model

ROOT = Path(__file__).parents[2]


def costs_of(name: str, image_px: int = 64, **arguments):
    arguments = {"num_classes": 3755, "channels": 1} | arguments
    model = create_model(name, rngs=nnx.Rngs(0), **arguments)
    return named_costs(model, image_px, arguments["channels"])


def test_formulas_by_hand():
    # The first block of MobileNet V1 at 224 px: 112×112, 32 to 64 channels, 3×3.
    sizes = (112, 112, 32, 64, 3)
    assert cost.predict_standard(*sizes).tolist() == [231_211_008, 18_432]
    assert cost.predict_separable(*sizes).tolist() == [29_302_784, 2_336]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("outputs", [16, 64, 1024])
def test_ratio_of_the_formulas_is_that_of_the_paper(outputs: int, kernel: int):
    sizes = (7, 5, 24, outputs, kernel)
    ratios = cost.predict_separable(*sizes) / cost.predict_standard(*sizes)
    np.testing.assert_allclose(ratios, 1 / outputs + 1 / kernel**2, rtol=1e-12)


@pytest.mark.parametrize("image_px", [64, 50])
@pytest.mark.parametrize(("name", "count"), [("mobilenet_v1", 13), ("mobilenet_v2", 17)])
def test_predictions_are_what_is_counted(name: str, count: int, image_px: int):
    pairs = cost.find_pairs(costs_of(name, image_px))
    assert len(pairs) == count
    for pair in pairs:
        assert pair.separable.tolist() == cost.predict_separable(*pair.sizes).tolist()
        assert pair.standard.tolist() == cost.predict_standard(*pair.sizes).tolist()


@pytest.mark.parametrize(
    ("name", "multiply_adds", "parameters"),
    [("mobilenet_v1", 49_599_488, 7_055_275), ("mobilenet_v2", 28_665_088, 7_033_451)],
)
def test_totals_of_the_networks(name: str, multiply_adds: int, parameters: int):
    whole, _ = cost.totals(costs_of(name))
    assert whole.tolist() == [multiply_adds, parameters]


def test_mobilenet_with_standard_convolutions_is_as_published():
    # Table 4 of https://arxiv.org/abs/1704.04861: 4,866 M and 29.3 M, against 569 M and 4.2 M.
    whole, standard = cost.totals(costs_of("mobilenet_v1", 224, num_classes=1000, channels=3))
    assert (whole / 1e6).round(1).tolist() == [568.7, 4.2]
    assert standard[0] / 1e6 == pytest.approx(4866, rel=5e-4)
    assert standard[1] / 1e6 == pytest.approx(29.3, abs=0.05)


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = command.main(["cost", *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def config_flag(name: str) -> str:
    return f"--config={ROOT / 'configs' / name}.py"


def test_the_command_prints_pairs_and_totals(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, config_flag("v2"))
    assert code == 0
    multiply_adds, parameters, whole = text.split("\n\n")
    assert len(multiply_adds.splitlines()) == len(parameters.splitlines()) == 1 + 17
    first = multiply_adds.splitlines()[1].split()
    assert first[:4] == ["blocks.0.depthwise", "32×32", "32", "16"]
    assert first[4:8] == ["4,718,592", "4,718,592", "819,200", "819,200"]
    assert first[8:] == ["0.1736", "0.1736"]
    assert "28,665,088   7,033,451" in whole


def test_the_command_prints_markdown(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, config_flag("v1"), "--markdown", "--num_classes=100")
    assert code == 0
    assert "| as it is | 45,856,768 |" in text
    for table in text.split("\n\n"):
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("| -:")


def test_the_command_lists_a_network_without_pairs(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, config_flag("lenet5"), "--num_classes=10")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "multiply-adds", "parameters"]
    assert len(lines) == 1 + 7 + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["v2", "--num_classes=1"], "--num_classes=1"),
        (
            ["lenet5", "--config.model.width=0.5"],
            "config.model.width=0.5: lenet5 has no such option; leave it at 1.0",
        ),
        (
            ["alexnet", "--config.data.image_px=28"],
            "config.data.image_px=28: too small for the three poolings of AlexNet after a first "
            "stride of 2",
        ),
    ],
)
def test_a_wrong_request_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
):
    code, out, err = run(capsys, config_flag(flags[0]), *flags[1:])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, "--help")
    assert code == 0
    assert "hccr cost --config=configs/v2.py" in text
    assert "\n  --num_classes" in text
