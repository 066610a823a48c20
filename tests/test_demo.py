"""The demonstration: it runs, prints a table, and draws what it printed."""

import re
import subprocess
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from sparserec import _demo

mpl.use("Agg")

ROW = re.compile(
    r"(?P<network>CNN \(linen\)|MLP \(nnx\)) +(?P<density>[\d.]+) % +"
    r"(?P<method>\S+) +(?P<numbers>[\d. ]+)$",
    re.MULTILINE,
)


def rows_of(text):
    found = {}
    for match in ROW.finditer(text):
        numbers = [float(x) for x in match["numbers"].split()]
        found[match["network"], float(match["density"]), match["method"]] = numbers
    return found


@pytest.fixture
def by_magnitude_only(monkeypatch):
    """Leaves out the solvers, whose compilation takes most of the time."""
    make = _demo._make_pruners

    def make_one(*given):
        return {"magnitude": make(*given)["magnitude"]}

    monkeypatch.setattr(_demo, "_make_pruners", make_one)


@pytest.mark.usefixtures("by_magnitude_only", "lenient_promotion")
def test_table_and_picture(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    with jax.enable_x64(False):  # what it runs in on its own
        assert _demo.main(["--quick", "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "1,797 images: 1,297 to train and prune, 500 to test" in text
    assert str(picture) in text
    rows = rows_of(text)
    networks = ("CNN (linen)", "MLP (nnx)")
    assert set(rows) == {
        (network, *rest)
        for network in networks
        for rest in ((100.0, "dense"), (10.0, "magnitude"))
    }
    for network in networks:
        dense, _ = rows[network, 100.0, "dense"]
        pruned, tuned, _ = rows[network, 10.0, "magnitude"]
        assert dense > 75  # percent, after 60 steps
        assert 0 <= pruned < dense
        assert pruned < tuned < dense
    height, width, _ = imread(picture).shape
    assert width > 2 * height > 600


def test_train_and_test_do_not_share_an_image():
    data = _demo._digits(jax.random.key(0))
    train, test = (
        np.asarray(x).reshape(len(x), -1) for x in (data.train[0], data.test[0])
    )
    assert len(train) + len(test) == 1797
    # Scikit-learn's digits hold no image twice.
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == 1797
    assert set(np.unique(data.test[1])) == set(range(10))


def test_summary_counts_ties_for_both():
    accuracies = {
        ("net", 0.1): {"a": 90.0, "b": 90.0},
        ("net", 0.05): {"a": 70.0, "b": 80.0},
    }
    rows = [_demo._Row("net", 1.0, "dense", 95.0, float("nan"), 1.0)]
    rows += [
        _demo._Row(network, density, method, accuracy, 99.0, 1.0)
        for (network, density), case in accuracies.items()
        for method, accuracy in case.items()
    ]
    assert "of 2 cases (ties count): a 1, b 2." in _demo._summary(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "no/such/folder/picture.png"], "there is no folder"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_end_it_before_any_work(arguments, words, capsys):
    with pytest.raises(SystemExit) as ending:
        _demo.main(arguments)
    assert ending.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(_demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        _demo.main([])
    message = capsys.readouterr().err
    assert "matplotlib and scikit-learn" in message
    assert "pip install 'sparserec[demo]'" in message


@pytest.mark.slow
def test_python_dash_m_runs_every_method(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparserec", "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    methods = {method for _, _, method in rows_of(done.stdout)}
    assert methods == {"dense", "magnitude", "IHT", "I-OBS"}
    assert (tmp_path / "sparserec_demo.png").stat().st_size > 10_000
