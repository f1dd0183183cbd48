from __future__ import annotations

from collections.abc import Callable

import pytest

from dare_agg.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a merge that must fail with one clear line on stderr, and returns that line."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["merge", *(str(word) for word in words)])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run
