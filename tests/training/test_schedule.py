"""What changes over a run are pure functions of the step."""

import math

import pytest
from training_fakes import configuration

from data_pipeline.errors import UserError
from pretrain.configuration.schema import EmaConfig, RunConfig
from pretrain.training.schedule import Schedule, ema_decay, resolve_schedule


def schedule_of(config: RunConfig, epoch_samples: int) -> Schedule:
    batch_size = config.training.batch_size
    return resolve_schedule(config.schedule, config.optimizer, batch_size=batch_size, epoch_samples=epoch_samples)


def test_warm_up_is_linear_and_cosine_ends_at_the_minimum() -> None:
    config = configuration(schedule__steps=100, schedule__warmup_steps=10, schedule__min_lr_ratio=0.1)
    plan = schedule_of(config, epoch_samples=1000)
    assert plan.lr(0) == pytest.approx(1e-3)
    assert plan.lr(9) == pytest.approx(1e-2)
    assert plan.lr(10) == pytest.approx(1e-2)
    assert plan.lr(99) == pytest.approx(1e-3)
    middle = 10 + 89 / 2
    assert plan.lr(54) == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (54 - 10) / 89))), rel=1e-12)
    assert plan.lr(int(middle)) > 5.4e-3 > plan.lr(int(middle) + 2)


def test_epochs_are_turned_into_steps_without_rounding_each_epoch() -> None:
    config = configuration(schedule__steps=None, schedule__epochs=3, schedule__warmup_steps=None)
    assert schedule_of(config, epoch_samples=50).total_steps == math.ceil(150 / 16)


def test_the_rate_scales_with_the_batch() -> None:
    config = configuration(optimizer__lr=5e-4, optimizer__lr_batch=512, training__batch_size=4096)
    assert schedule_of(config, 10**6).peak_lr == pytest.approx(4e-3)


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="warm-up"):
        schedule_of(configuration(schedule__steps=3, schedule__warmup_steps=3), 100)


def test_teacher_momentum_runs_by_cosine_between_its_ends() -> None:
    ema = EmaConfig(teacher_start=0.99, teacher_end=0.999)
    values = [ema_decay(step, 101, ema, teacher=True) for step in range(101)]
    assert values[0] == pytest.approx(0.99) and values[-1] == pytest.approx(0.999)
    assert values[50] == pytest.approx((0.99 + 0.999) / 2)
    assert values == sorted(values)


def test_the_evaluation_average_of_a_young_run_forgets_its_start() -> None:
    ema = EmaConfig(decay=0.9999)
    assert ema_decay(0, 10, ema, teacher=False) == pytest.approx(0.1)
    assert ema_decay(10**6, 10**7, ema, teacher=False) == 0.9999
