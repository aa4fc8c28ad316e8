"""What every test run shares: one thread, and property tests that draw the same examples each time."""

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # these tensors are tiny: waking a second thread costs more than it helps

OLDER = {  # what libraries of the promised range do that later ones, and we, do not; every other warning is an error
    ("datasets", (5, 2)): "ignore:unclosed file .*\\.csv:ResourceWarning",
    ("transformers", (5, 23)): "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
}

settings.register_profile("kleash", deadline=None, database=None, derandomize=True, max_examples=50)
settings.load_profile("kleash")


def pytest_configure(config: pytest.Config) -> None:
    for (library, mended), warning in OLDER.items():
        if tuple(int(part) for part in version(library).split(".")[:2]) < mended:
            config.addinivalue_line("filterwarnings", warning)


@pytest.fixture
def absent_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch was built for an accelerator, as it comes by default on Linux, and the machine has none."""

    def accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
