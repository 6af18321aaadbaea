"""The steps that every recipe shares, on a model of two numbers: the same bits after a kill, and nothing kept that is no number."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from recipes.common import loop
from recipes.common.errors import RecipeError
from recipes.common.loop import Loop, Pace
from recipes.common.run import Run


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Line(Loop):
    """Fits a line to points of one; `spoilt` changes the loss of a step, `killed_at` ends the process after one."""

    def __init__(self, folder: Path, steps: int = 8, killed_at: int = -1, spoilt=lambda step, loss: loss, resume: bool = False) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, step_scheduler_with_optimizer=False)
        self.run = Run(folder, "tests.line", self.accelerator, resume=resume)
        self.run.check()
        torch.manual_seed(0)
        line = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(line.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(line, optimizer, schedule)
        self.pace, self.killed_at, self.spoilt = Pace(steps, log=2, validate=4, save=4, accumulate=2), killed_at, spoilt
        self.tokens_per_step, self.validated = 10, []
        self.run.open({"steps": steps})

    def batches(self, step):
        while True:
            for part in range(2):
                yield torch.randn(4, 1, generator=torch.Generator().manual_seed(10 * step + part))
            step += 1

    def losses(self, batch):
        noise = torch.rand(()) / 10  # as dropout: a resume must draw it again
        errors = (self.model(batch) - 3 * batch - noise).square().mean(1)
        return {"loss": self.spoilt(self.step + 1, errors.mean()), "each": errors}

    def clip(self):
        return self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)

    def before_step(self):
        if self.step == self.killed_at:
            raise KeyboardInterrupt

    def validate(self):
        self.validated.append(self.step)

    def go(self) -> list[dict]:
        with closing(self.run):
            self.train()
        return [{key: value for key, value in record.items() if "second" not in key} for record in self.run.records()]


@pytest.mark.parametrize("killed_at", [1, 5, 7])
def test_killed_at_any_step_it_goes_on_to_the_same_bits(tmp_path, killed_at):
    whole = Line(tmp_path / "whole")
    expected = whole.go()
    assert [record["step"] for record in expected] == [2, 4, 6, 8]
    assert whole.validated == [4, 8]
    assert len(expected[0]["each"]) == 4 and expected[-1]["tokens"] == 80 and expected[-1]["gradient_norm"] > 0
    with pytest.raises(KeyboardInterrupt):
        Line(tmp_path / "killed", killed_at=killed_at).go()
    again = Line(tmp_path / "killed", resume=True)
    assert again.go() == expected
    assert all(torch.equal(one, other) for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_a_loss_that_is_no_number_is_refused_by_its_step_and_the_checkpoint_before_it_kept(tmp_path):
    def spoilt(step, loss):
        return loss * torch.nan if step >= 5 else loss

    line = Line(tmp_path / "run", spoilt=spoilt)
    with pytest.raises(RecipeError, match=r"the loss at step 5 is no finite number; .*; the checkpoint step-00000004 from before is kept"):
        line.go()
    assert [path.name for path in line.run.checkpoints()] == ["step-00000004"]


def test_a_gradient_that_is_no_number_is_refused_though_the_loss_is_one(tmp_path):
    def spoilt(step, loss):
        return loss + torch.where(loss > 0, loss - loss, loss).sqrt() if step == 3 else loss  # the root's slope at 0

    with pytest.raises(RecipeError, match="the gradient at step 3 is no finite number"):
        Line(tmp_path / "run", spoilt=spoilt).go()


def test_a_weight_that_is_no_number_is_not_kept(tmp_path):
    line = Line(tmp_path / "run")
    validate = line.validate

    def broken():
        validate()
        if line.step == 8:
            line.model.weight.data.fill_(torch.inf)

    line.validate = broken
    with pytest.raises(RecipeError, match="the weight weight after step 8 is no finite number; .*step-00000004 from before is kept"):
        line.go()


def test_the_bar_is_closed_whatever_ends_the_run(tmp_path, monkeypatch):
    closed = []

    class Bar(loop.tqdm):
        def close(self):
            closed.append(self.n)
            super().close()

    monkeypatch.setattr(loop, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        Line(tmp_path / "run", killed_at=3).go()
    assert closed[0] == 3


def test_a_run_that_is_over_before_its_steps_still_logs_validates_and_saves(tmp_path):
    line = Line(tmp_path / "run", steps=100)
    line.over = lambda: line.step == 7
    assert [record["step"] for record in line.go()] == [2, 4, 6, 7]
    assert line.validated == [4, 7] and [path.name for path in line.run.checkpoints()] == ["step-00000007"]
