"""Limits end a call between two steps, say why, and leave a run that is what it would have been without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mobizo_compiler as mobizo
from mobizo_compiler import Limits, LoraConfig, Session, ZOConfig
from mobizo_compiler.device import limits
from mobizo_compiler.device.run import SNAPSHOT, read_state
from mobizo_compiler.errors import ConfigError
from tests.test_journal import TRAINING, batch, compiled, uninterrupted


@dataclasses.dataclass
class Device:
    """A clock and sensors that a test sets."""

    seconds: float = 0.0
    charge: float | None = None
    heat: float | None = 20.0

    def battery(self) -> float | None:
        return self.charge

    def temperature(self) -> float | None:
        return self.heat

    def watch(self, **fields: float) -> limits.Watch:
        return Limits(**fields).watch(self, lambda: self.seconds)


def test_minutes_of_the_call() -> None:
    device = Device(seconds=1000.0)
    watch = device.watch(minutes=2)
    assert not watch() and watch.reason is None
    device.seconds += 119.9
    assert not watch()
    device.seconds += 0.1
    assert watch() and watch.reason == "2 minutes are over"


def test_a_battery_that_is_low_and_not_charged() -> None:
    device = Device()
    watch = device.watch(battery=20)
    for seconds, charge, ends in ((0, None, False), (10, 21.0, False), (12, 5.0, False), (20, 19.4, True)):
        device.seconds, device.charge = seconds, charge
        assert watch() == ends, "sensors are read every five seconds"
    device.charge = None
    assert watch() and watch.reason == "the battery is at 19 %", "what was reached stays reached"


def test_a_device_that_is_hot() -> None:
    device = Device()
    watch = device.watch(temperature=45, minutes=100)
    assert not watch()
    device.seconds, device.heat = 10.0, 45.5
    assert watch() and watch.reason == "the device is at 46 degrees"
    with pytest.raises(ConfigError, match="does not say how hot it is"):
        Device(heat=None).watch(temperature=45)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By psutil: what it says of a laptop, of a machine on mains, and of one without sensors or functions for them."""
    part, power = SimpleNamespace, SimpleNamespace
    laptop = SimpleNamespace(
        sensors_battery=lambda: power(percent=41, power_plugged=False),
        sensors_temperatures=lambda: {"cpu": [part(current=51.0), part(current=63.5)], "disk": [part(current=40.0)]},
    )
    mains = SimpleNamespace(
        sensors_battery=lambda: power(percent=41, power_plugged=True), sensors_temperatures=lambda: {}
    )
    bare = SimpleNamespace(sensors_battery=lambda: None)
    for psutil, battery, temperature in ((laptop, 41.0, 63.5), (mains, None, None), (bare, None, None)):
        monkeypatch.setattr(limits, "optional", lambda *names, psutil=psutil: psutil)
        machine = limits._Machine()
        assert (machine.battery(), machine.temperature()) == (battery, temperature)


def test_what_watches_may_be_given(tmp_path: Path) -> None:
    """With sensors of one's own; and numbers may be those of numpy."""
    watch = Limits(battery=np.int64(50)).watch(Device(charge=10.0))
    done = Session(compiled()).finetune(batch, steps=5, run=tmp_path / "run", until=watch, **TRAINING)
    assert (done.steps, done.limit) == (0, "the battery is at 10 %")
    assert Limits(minutes=np.float32(0.5)) == Limits(minutes=0.5)


@pytest.mark.parametrize("fields", [{"minutes": 0}, {"battery": 101}, {"temperature": -1}, {"minutes": True}])
def test_limits_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"Limits\.{next(iter(fields))} is .*; it must be a number above 0"):
        Limits(**fields)


@pytest.mark.parametrize("estimator", ["two-sided", "exact"])
def test_stopped_again_and_again(estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty calls of one or two steps, each in a new session: the state is that of one call, bit for bit."""
    monkeypatch.setattr(limits, "EVERY_SECONDS", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    zo = ZOConfig(queries=2 if estimator == "two-sided" else 1, estimator=estimator)
    program = mobizo.compile(model, batch(0)[0], LoraConfig(r=3, target_modules=("1",)), zo, backend="eager")
    steps, until = 0, Limits(temperature=100)
    for call in range(50):
        device, last = Device(), steps + 1 + call % 2
        monkeypatch.setattr(limits, "_Machine", lambda device=device: device)

        def heats(step: int, result: object, device: Device = device, last: int = last) -> None:
            device.heat = 120.0 if step + 1 == last else 20.0

        session = Session(program)
        done = session.finetune(batch, steps=75, run=tmp_path / "run", until=until, on_step=heats, **TRAINING)
        assert (done.resumed_at, done.steps) == (steps, last)
        assert done.limit == (None if last == 75 else "the device is at 120 degrees")
        steps = last
    assert steps == 75 and torch.equal(session.state(), uninterrupted(program, 75).state())


def test_steps_that_were_made_again_are_saved(tmp_path: Path) -> None:
    """Gradients are not in the journal: killed again and again, a run would make more and more steps again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    lora, zo = LoraConfig(r=3, target_modules=("1",)), ZOConfig(estimator="exact")
    program = mobizo.compile(model, batch(0)[0], lora, zo, backend="eager")
    first = Session(program)
    first.finetune(batch, steps=3, run=tmp_path / "run", **TRAINING)
    (tmp_path / "run" / SNAPSHOT).unlink()
    again = Session(program)
    done = again.finetune(batch, steps=9, run=tmp_path / "run", stop=lambda: True, **TRAINING)
    assert (done.steps, done.resumed_at) == (3, 3)
    state, step = read_state(tmp_path / "run" / SNAPSHOT, again)
    assert step == 3 and torch.equal(state, first.state())


def test_a_call_that_is_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_Machine", lambda: Device(charge=1.0))
    session = Session(compiled())
    done = session.finetune(batch, steps=5, run=tmp_path / "run", until=Limits(battery=50), **TRAINING)
    assert (done.steps, done.limit) == (0, "the battery is at 1 %") and not session.state().any()
    assert session.finetune(batch, steps=5, run=tmp_path / "run", **TRAINING).limit is None
