"Options of the test run."

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--parity-dir",
        type=Path,
        default=Path(__file__).parent / "data" / "parity",
        help="folder of parity fixtures: NAME.json with NAME.safetensors",
    )
    parser.addoption("--slow", action="store_true", help="also run tests that take over five seconds")
    parser.addoption("--net", action="store_true", help="also run tests that download")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag in ("slow", "net"):
            if flag in item.keywords and not config.getoption(f"--{flag}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{flag}"))
