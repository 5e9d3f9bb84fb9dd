"""Settings of the whole suite: no network, one thread, nothing written outside a temporary folder."""

import os
import shutil
import tempfile

# Before anything imports transformers or datasets, which read these once.
_CACHES = tempfile.mkdtemp(prefix="hf_gallery_tests_")
os.environ["HF_HOME"] = _CACHES
os.environ["HF_MODULES_CACHE"] = os.path.join(_CACHES, "modules")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHES, "datasets")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"  # before torch is imported, see hf_gallery/spinning.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start; this one's are set below
os.environ["GALLERY_WORKERS"] = "1"  # of `python -m eval`, unless a test is about them
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and rich's consoles would keep the width that they began with

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from deprecations import errors  # noqa: E402
from variants import COLUMNS, autocast_nesting, leave_autocast  # noqa: E402
from works import Works  # noqa: E402

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,  # the same examples on every machine: a red test stays red
    max_examples=25,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--works", metavar="FILE", help="write what works for which variant into the table in FILE")
    parser.addoption("--check-works", metavar="FILE", help="fail if the table in FILE says something else")
    parser.addoption("--plain", action="store_true", help="each architecture in its plain settings only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--plain"):
        return
    variants = (getattr(item, "callspec", None) and item.callspec.params.get("variant") for item in items)
    names = [None if x is None else getattr(x, "name", x).removesuffix("_transformer") for x in variants]
    other = [name is not None and name not in COLUMNS for name in names]
    config.hook.pytest_deselected(items=[item for item, left_out in zip(items, other, strict=True) if left_out])
    items[:] = [item for item, left_out in zip(items, other, strict=True) if not left_out]


def pytest_configure(config):
    torch.set_num_threads(1)  # the models here are so small that a second thread only waits
    config.pluginmanager.register(Works(config, COLUMNS))


def pytest_unconfigure(config):
    shutil.rmtree(_CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that a place which nobody wrote shows; and every test starts from one seed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _deprecated_calls_are_errors():
    with errors():
        yield


@pytest.fixture(autouse=True)
def _autocast_is_left():
    """A test that left autocast open would let all that come after it train on weights that were cast before."""
    before = autocast_nesting()
    yield
    left = autocast_nesting() - before
    leave_autocast(left)
    assert not left, f"autocast was entered {left} times more often than left"
