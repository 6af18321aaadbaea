"""The pass of `convert.calibrate`: where new numbers start, from what the teacher's attention does on sample text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import hf_linattn
from convert.errors import ConversionError
from convert.stages.options import CalibrateOptions
from convert.stages.transfer import Transfer
from convert.stages.watching import watched_attention
from hf_linattn.forms import LinAttnParams
from hf_linattn.models import attention_modules


class Calibrate(Transfer):
    """A run of `convert.calibrate`: no steps of an optimizer. What it measures before and after is the error of `convert.transfer`."""

    options: CalibrateOptions

    def ahead(self, learning: int) -> str:
        """A line before it begins: nothing learns."""
        return f"{self.pace.steps:,} batches of {self.tokens_per_step:,} tokens to look at; numbers are started from them, none learns"

    def train(self) -> None:
        """Look at the teacher, start from that, and choose among shifts of what cannot be read off."""
        progress = self.run.restore(self.pace.steps)
        if progress["step"]:
            return
        layers = {module.layer_idx: module.linattn for _, module in attention_modules(self.student) if hasattr(module, "linattn")}
        if not layers:
            raise ConversionError(f"{self.options.student} has no new parameters to start anywhere; it was converted with --no-learnable")
        self.validate()
        form = hf_linattn.LinAttnConfig.of(self.student.config).attention
        sample = [batch for batch, _ in zip(self.batches(0), range(self.pace.steps), strict=False)]
        with torch.no_grad(), watched_attention(self.teacher) as found:
            for batch in tqdm(sample, disable=not self.accelerator.is_main_process, dynamic_ncols=True, unit="batch"):
                self.teacher.base_model(**batch, use_cache=False)
        for layer, parameters in layers.items():
            found[layer].share(self.accelerator)
            form.calibrate(parameters, found[layer].seen())
        for name, shifts in form.SEARCHED.items():
            self._search(list(layers.values()), name, shifts, sample[0])
        self.step = self.pace.steps
        self.validate()
        self.run.save(self.step)

    def _search(self, layers: list[LinAttnParams], name: str, shifts: tuple[float, ...], batch: dict[str, Tensor]) -> None:
        """Gives each layer the shift of a number with which it comes nearest to the teacher's."""
        layers = [parameters for parameters in layers if name in parameters.names]
        if not layers:
            return
        starts = [parameters.number(name) for parameters in layers]
        errors = []
        for shift in shifts:
            for parameters, start in zip(layers, starts, strict=True):
                parameters.start_from(name, start + shift)
            with torch.no_grad():
                errors.append(self.accelerator.reduce(self.errors(batch).mean(0), "mean").cpu().numpy())
        best = np.argmin(np.stack(errors), 0)
        for parameters, start, chosen in zip(layers, starts, best, strict=True):
            parameters.start_from(name, start + shifts[chosen])
