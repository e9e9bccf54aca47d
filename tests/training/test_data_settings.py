"""What training makes of the data's settings and of its start."""

import time
from pathlib import Path

import pytest
from training_fakes import configuration

from data_pipeline.errors import HANG, UserError
from pretrain.configuration import dump_config
from pretrain.training.resume import check_same_run
from pretrain.training.safeguards.watchdog import Watchdog


def test_how_workers_start_may_change_and_what_they_read_may_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(configuration()))
    check_same_run(tmp_path, configuration(data__start_method="spawn", data__workers=7))
    with pytest.raises(UserError, match="block_shards"):
        check_same_run(tmp_path, configuration(data__block_shards=3))


def test_an_argument_of_the_model_that_is_null_is_not_one_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(configuration(model__overrides={"offset_scale": 1})))
    check_same_run(tmp_path, configuration(model__overrides={"offset_scale": 1.0}))
    with pytest.raises(UserError, match=r"model\.overrides\.init_std: not given there, None now"):
        check_same_run(tmp_path, configuration(model__overrides={"offset_scale": 1.0, "init_std": None}))


def test_a_start_that_goes_on_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.training.safeguards.watchdog.START_UP_SECONDS", 0.2)
    left: list[int] = []
    quiet = lambda kind, text: None  # noqa: E731
    watchdog = Watchdog(tmp_path, 0, 0.2, 9.0, quiet, lambda: False, left.append, tick_seconds=0.01).start()
    for _ in range(60):  # an index of 60 shards
        time.sleep(0.01)
        watchdog.still_starting()
    assert left == []
    watchdog._thread.join(20)
    assert left == [HANG]
