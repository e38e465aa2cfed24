import shutil
import tempfile

import numpy as np
import pytest

from normlab.probes import Histogram
from normlab.report import write
from normlab.study import Comparison, Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Reading

STEPS_PER_EPOCH = 100
FOUR_ARMS = {"arms": ["plain", "batch", "layer", "group:8"]}
HOSTILE = (
    '<script>alert(1)</script></pre></p><img src="x:" onerror="window.harmed = 1"> & "so" $title'
)
FINAL_ACCURACY = {"plain": 0.95, "batch": 0.97, "layer": 0.951, "group:8": 0.93}


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Writes a run's folder without training, and returns the folder."""

    def make(**options):
        folder = tmp_path_factory.mktemp("run")
        write_run(folder, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def compared(make_run):
    """Writes a run's folder without training, and returns its comparison."""
    return lambda **options: Comparison(make_run(**options))


# What a made-up study's probes read, by layer.
READ = {
    "percentiles": {
        "hidden0.activation": [f"{of}q{q}" for of in ("", "unit.") for q in (15, 50, 85)]
    },
    "gradients": {"hidden0.linear": ["output", "weight", "bias"], "output": ["output", "weight"]},
    "units": {"hidden0.activation": ["dead", "saturated"]},
    "smoothness": {
        "": [
            f"{of}{name}" for of in ("", "relative.") for name in ("loss.range", "gradient.change")
        ]
    },
    "covariate-shift": {"output": ["shift", "cosine"]},
}


@pytest.fixture(scope="session")
def reported(compared, tmp_path_factory):
    """A comparison of four arms, and the folder of its report."""
    comparison = compared(description=HOSTILE, **FOUR_ARMS)
    folder = tmp_path_factory.mktemp("report")
    assert write(comparison, folder) == folder / "report.html"
    return comparison, folder


@pytest.fixture(scope="session")
def nothing(compared, tmp_path_factory):
    """A comparison of which nothing is measured yet, and the folder of its report."""
    comparison = compared(missing=lambda _: True, workers=1)
    folder = tmp_path_factory.mktemp("nothing")
    write(comparison, folder)
    return comparison, folder


def write_run(
    folder,
    *,
    diverged=lambda _: False,
    missing=lambda _: False,
    running=lambda _: False,
    noise=0.002,
    workers=2,
    **fields,
):
    """Keeps a made-up course of each replica in a ledger, the same one every time.

    `diverged`, `missing` and `running` say of a replica whether it diverges half way, has not
    begun, or has begun and not ended; `noise` is the standard deviation of an arm's final accuracy
    over seeds, beyond what the arms share. Fields of the study are taken too.
    """
    study = Study.make({"name": "made-up", "seeds": 6, "epochs": 4, "network": "mlp:32", **fields})
    events = (
        event
        for replica in study.replicas
        if not missing(replica)
        for event in course(study, replica, noise, diverged(replica), running(replica))
    )
    with Ledger.write(folder, study) as ledger:
        ledger.begin_session(workers)
        for i, event in enumerate(events):
            ledger.add(event, seconds=(i + 1) / 2)


def course(study, replica, noise, diverges, runs):
    """Yields what a replica might measure: its arm sets its level, and the last rate is best."""
    arm, rate = study.arms.index(replica.arm), study.lr.index(replica.lr)
    shared = np.random.default_rng(replica.seed).normal(scale=0.001)
    draw = np.random.default_rng([replica.seed, arm, rate])
    final = FINAL_ACCURACY.get(replica.arm, 0.94) + shared + draw.normal(scale=noise)
    final -= 0.01 * (len(study.lr) - 1 - rate)
    gains = {"train": 0.01, "validation": 0.002, "test": 0.0}
    if not study.validation:
        del gains["validation"]
    last = study.epochs * STEPS_PER_EPOCH
    every = study.evaluate_every or STEPS_PER_EPOCH
    steps = sorted({*range(every, last, every), *range(STEPS_PER_EPOCH, last + 1, STEPS_PER_EPOCH)})
    if diverges or runs:
        steps = steps[: len(steps) // 2]
    if study.probes:
        yield reading(study, replica, 0)
    for step in steps:
        values = {}
        for split, gain in gains.items():
            accuracy = final + gain - 0.1 * np.exp(-4 * step / last) + draw.normal(scale=0.0005)
            values[split, "accuracy"] = float(accuracy)
            values[split, "loss"] = float(4 * (1 - accuracy))
        ends = step % STEPS_PER_EPOCH == 0
        norm = {"output": Histogram(-1.0, step / 1000, [replica.seed, arm, 2])}
        histograms = {"hidden0.norm": norm} if ends else {}
        yield Measurement(replica, step, step // STEPS_PER_EPOCH, values, histograms)
        if study.probes and ends:
            yield reading(study, replica, step)
    if diverges:
        yield Outcome(replica, "diverged", steps[-1] + STEPS_PER_EPOCH, 1.5)
    elif not runs:
        yield Outcome(replica, "done", last, 3.0)


def reading(study, replica, step):
    """What probes might read."""
    draw = np.random.default_rng([replica.seed, study.arms.index(replica.arm), step])
    values = {
        probe: {
            layer: {name: float(draw.uniform(0.1, 1)) for name in names}
            for layer, names in READ[probe].items()
        }
        for probe in study.probes
    }
    return Reading(replica, step, step // STEPS_PER_EPOCH, values)


FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        yield driver
        driver.quit()
