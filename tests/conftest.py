"""The strict session that every test runs in, and what tests share."""

import itertools
import os
import pathlib
from collections.abc import Iterator

# Before NumPy and JAX load OpenBLAS: its threads spin while they wait, and small
# factorisations on a busy machine take a thousand times longer with them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

# The tests choose these, never the library. Double precision makes comparisons with
# NumPy oracles sharp; the other two turn silent broadcasting and silent promotion
# into errors.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling is nearly all that the tests do; what they check does not need fast code.
jax.config.update("jax_disable_most_optimizations", True)

# Four devices on any CPU, so that the sharding tests run everywhere. Whoever asks for
# devices in XLA_FLAGS keeps their number, JAX refuses to hear it twice.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 4)

# The first example of a property pays for compilation, so time limits would only
# measure the compiler. Derandomized: the same run everywhere, no database of failures.
hypothesis.settings.register_profile(
    "sparserec",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sparserec")


_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 30_000  # memory maps of a process; Linux allows 65,530
_EVERY = 50  # tests between two looks at them
_finished = itertools.count(1)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forgets compiled programs before their memory maps run out.

    Every program takes some; without this the compiler crashes after some thousands
    of tests in one process.
    """
    del item
    if next(_finished) % _EVERY or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what the notebooks that ran have asserted."""
    found = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "asserted"
    ]
    if found:
        terminalreporter.section("asserted by the notebooks")
    for test, claims in sorted(found):
        terminalreporter.line(test)
        for claim in claims:
            terminalreporter.line(f"  - {claim}")


@pytest.fixture
def optimized() -> Iterator[None]:
    """Optimized code, for tests that run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def lenient_promotion() -> Iterator[None]:
    """JAX's own promotion rules, for tests that run the code of other packages.

    Optax's Adam, for one, raises a float to an integer array. Asked for with
    `@pytest.mark.usefixtures("lenient_promotion")`.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The folder of data sets and pretrained networks, or a skip without one."""
    name = os.environ.get("SPARSEREC_DATA", "")
    if not name:
        pytest.skip("needs data: set SPARSEREC_DATA to the folder that holds it")
    folder = pathlib.Path(name)
    if not folder.is_dir():
        pytest.fail(f"SPARSEREC_DATA names {name!r}, which is not a folder")
    return folder
