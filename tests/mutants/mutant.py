"""A small slip put into the code, which a test must notice: what is replaced where, and which tests should see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OPERATOR, PLUGIN, CONVERTER, RECIPES, KERNELS = "operator", "plugin", "converter", "recipes", "kernels"

_HERE = Path(__file__).parents[1]
# The tests of each source file beside those that bear its name: quick ones, likely to see a slip first. The longest path that fits counts.
TESTS = {
    "hf_linattn/ops/": ["ops/test_chunked.py", "ops/test_state.py", "ops/test_noise.py", "ops/test_bad_input.py", "ops/test_precision.py",
                        "ops/test_memory.py", "ops/test_operators.py"],
    "hf_linattn/ops/chunked.py": ["ops/test_chunked.py", "ops/test_state.py", "ops/test_precision.py", "ops/test_noise.py",
                                  "ops/test_memory.py"],
    "hf_linattn/ops/checks.py": ["ops/test_bad_input.py", "ops/test_chunked.py", "ops/test_state.py", "ops/test_operators.py"],
    "hf_linattn/ops/bounds.py": ["ops/test_bounds.py", "ops/test_bad_input.py", "plugin/test_options.py", "forms/test_polynomial.py"],
    "hf_linattn/ops/reference.py": ["ops/test_chunked.py", "ops/test_window.py", "forms/test_float64.py", "forms/test_window.py"],
    "hf_linattn/ops/known.py": ["kernels/test_known.py"],
    "hf_linattn/ops/device.py": ["kernels/test_emulated.py"],
    "hf_linattn/ops/noise.py": ["ops/test_noise.py"],
    "hf_linattn/ops/one_token.py": ["ops/test_state.py", "ops/test_operators.py"],
    "hf_linattn/ops/operators.py": ["ops/test_operators.py", "ops/test_chunked.py", "ops/test_noise.py", "ops/test_state.py"],
    "hf_linattn/ops/blocks.py": ["ops/test_window.py", "ops/test_ring.py", "forms/test_window.py"],
    "hf_linattn/ops/folds.py": ["ops/test_window.py", "ops/test_mixing.py"],
    "hf_linattn/ops/constants.py": ["ops/test_constants.py", "ops/test_operators.py"],
    "hf_linattn/ops/mixing.py": ["ops/test_mixing.py", "forms/test_window.py"],
    "hf_linattn/ops/frame.py": ["ops/test_window.py", "ops/test_ring.py", "forms/test_window.py"],
    "hf_linattn/ops/padding.py": ["ops/test_padding.py"],
    "hf_linattn/ops/ring.py": ["ops/test_ring.py", "ops/test_window.py", "forms/test_window.py"],
    "hf_linattn/ops/window": ["ops/test_window.py", "ops/test_ring.py", "ops/test_mixing.py", "forms/test_window.py"],
    "hf_linattn/ops/window_cuda.py": ["kernels/test_emulated_window.py"],
    "hf_linattn/ops/runs_cuda.py": ["kernels/test_emulated_runs.py"],
    "hf_linattn/ops/window_step.py": ["ops/test_window_step.py", "forms/test_window.py"],
    "hf_linattn/ops/window_token.py": ["forms/test_window.py", "ops/test_window_step.py"],
    "hf_linattn/ops/beside.py": ["forms/test_feature_map.py", "forms/test_output_map.py", "forms/test_input_gate.py",
                                 "forms/test_window.py", "forms/test_projection.py"],
    "hf_linattn/ops/cuda.py": ["kernels/test_library.py", "kernels/test_emulated.py"],
    "hf_linattn/": ["plugin/test_masks.py", "plugin/test_cache.py", "plugin/test_sequences.py", "plugin/test_options.py",
                    "plugin/test_refusals.py", "plugin/test_hybrid.py", "plugin/test_training.py", "plugin/test_generate.py",
                    "plugin/test_encoders.py"],
    "hf_linattn/__init__.py": ["plugin/test_cache.py", "plugin/test_saved.py", "plugin/test_adapters.py", "plugin/test_choice.py"],
    "hf_linattn/adapters.py": ["plugin/test_saved.py", "plugin/test_adapters.py"],
    "hf_linattn/architectures.py": ["plugin/test_choice.py", "plugin/test_refusals.py", "plugin/test_options.py"],
    "hf_linattn/attention.py": ["plugin/test_cache.py", "plugin/test_training.py", "plugin/test_sequences.py", "plugin/test_hybrid.py",
                                "plugin/test_masks.py", "plugin/test_options.py", "plugin/test_refusals.py"],
    "hf_linattn/cache.py": ["plugin/test_cache.py", "plugin/test_crop.py", "plugin/test_hand_over.py", "plugin/test_mixed_models.py",
                            "plugin/test_saved_prompts.py", "plugin/test_masks.py", "plugin/test_generate.py", "plugin/test_training.py",
                            "plugin/test_export.py"],
    "hf_linattn/calls.py": ["plugin/test_masks.py", "plugin/test_refusals.py", "plugin/test_choice.py"],
    "hf_linattn/captured.py": ["plugin/test_captured.py"],
    "hf_linattn/compiled.py": ["plugin/test_compiled.py", "plugin/test_captured.py"],
    "hf_linattn/next_inputs.py": ["plugin/test_next_inputs.py"],
    "hf_linattn/text_mask.py": ["plugin/test_compiled.py", "plugin/test_next_inputs.py"],
    "hf_linattn/choice.py": ["plugin/test_choice.py", "plugin/test_saved.py", "plugin/test_options.py", "plugin/test_refusals.py"],
    "hf_linattn/config.py": ["plugin/test_options.py", "plugin/test_hybrid.py", "convert/test_costs.py",
                             "convert/test_linearize_refusals.py"],
    "hf_linattn/counted.py": ["plugin/test_values.py", "plugin/test_masks.py", "plugin/test_crop.py"],
    "hf_linattn/dropout.py": ["plugin/test_dropout.py", "forms/test_window.py", "plugin/test_training.py"],
    "hf_linattn/hand_over.py": ["plugin/test_hand_over.py", "plugin/test_cache.py"],
    "hf_linattn/forms/": ["forms/", "plugin/test_cache.py", "plugin/test_crop.py", "plugin/test_options.py", "convert/test_calibrate.py",
                          "convert/test_converted_models.py", "convert/test_check.py"],
    "hf_linattn/forms/window.py": ["forms/test_window.py", "forms/test_float64.py", "forms/test_words.py", "convert/test_window.py",
                                   "plugin/test_options.py", "convert/test_calibrate.py"],
    "hf_linattn/mask.py": ["plugin/test_masks.py", "plugin/test_sequences.py", "plugin/test_encoders.py", "plugin/test_export.py"],
    "hf_linattn/models.py": ["plugin/test_next_inputs.py", "convert/test_converted_models.py", "plugin/test_adapters.py",
                             "convert/test_costs.py", "convert/test_linearize.py", "convert/test_more_architectures.py"],
    "hf_linattn/packing.py": ["plugin/test_packing.py", "plugin/test_masks.py", "plugin/test_sequences.py"],
    "hf_linattn/pattern.py": ["plugin/test_pattern.py", "plugin/test_masks.py", "plugin/test_sequences.py", "plugin/test_export.py"],
    "hf_linattn/rollback.py": ["plugin/test_crop.py", "plugin/test_masks.py", "plugin/test_generate.py"],
    "hf_linattn/same_model.py": ["plugin/test_saved_prompts.py"],
    "hf_linattn/saved_prompts.py": ["plugin/test_saved_prompts.py"],
    "hf_linattn/told.py": ["plugin/test_masks.py", "plugin/test_sequences.py"],
    "hf_linattn/training.py": ["plugin/test_parameter_groups.py"],
    "hf_linattn/values.py": ["plugin/test_values.py", "plugin/test_masks.py", "plugin/test_sequences.py", "plugin/test_export.py"],
    "convert/": ["convert/test_check.py", "convert/test_linearize.py", "convert/test_linearize_refusals.py", "convert/test_companions.py",
                 "convert/test_costs.py", "convert/test_arguments.py", "inputs/test_checkpoint_folder.py"],
    "convert/commands.py": ["convert/test_evaluate.py", "convert/test_arguments.py", "convert/test_select_layers.py",
                            "convert/test_stages.py"],
    "convert/companions.py": ["convert/test_companions.py", "convert/test_linearize.py"],
    "convert/costs.py": ["convert/test_costs.py"],
    "convert/calibrate.py": ["convert/test_calibrate.py", "convert/test_stages.py", "convert/test_arguments.py"],
    "convert/card.py": ["convert/test_linearize.py", "convert/evaluation/test_report.py", "convert/test_evaluate.py"],
    "convert/distill.py": ["convert/test_stages.py", "convert/test_arguments.py"],
    "convert/evaluate.py": ["convert/test_evaluate.py"],
    "convert/evaluation/": ["convert/evaluation/", "convert/test_evaluate.py", "convert/test_select_layers.py"],
    "convert/evaluation/options.py": ["convert/test_evaluate.py", "convert/test_arguments.py", "convert/evaluation/test_report.py"],
    "convert/evaluation/selection_options.py": ["convert/test_select_layers.py", "convert/test_arguments.py"],
    "convert/forcing.py": ["convert/test_check.py", "convert/test_stages.py"],
    "convert/gguf.py": ["convert/test_companions.py"],
    "convert/options.py": ["convert/test_arguments.py", "convert/test_linearize.py", "convert/test_linearize_refusals.py"],
    "convert/quantised.py": ["convert/test_companions.py", "convert/test_linearize_refusals.py"],
    "convert/recipe.py": ["convert/test_run.py"],
    "convert/run.py": ["convert/test_run.py"],
    "convert/select_layers.py": ["convert/test_select_layers.py"],
    "convert/stages/": ["convert/test_calibrate.py", "convert/test_stages.py"],
    "convert/stages/costs.py": ["convert/test_run.py"],
    "convert/stages/options.py": ["convert/test_stages.py", "convert/test_run.py", "convert/test_arguments.py"],
    "convert/stages/result.py": ["convert/test_stages.py", "convert/evaluation/test_report.py", "convert/test_calibrate.py"],
    "convert/transfer.py": ["convert/test_stages.py", "convert/test_arguments.py"],
    "convert/usable.py": ["convert/test_companions.py", "convert/test_linearize.py"],
    "recipes/common/": ["recipes/test_files.py", "recipes/test_common_config.py", "test_folders.py", "inputs/test_checkpoint_folder.py",
                        "inputs/test_state.py", "recipes/tinystories/test_tinystories_train.py"],
    "recipes/common/chain.py": ["recipes/test_chain.py", "recipes/tinystories/test_quickstart.py", "convert/test_run.py"],
    "recipes/common/place.py": ["test_folders.py", "convert/test_arguments.py"],
    "recipes/common/checkpoint.py": ["inputs/test_checkpoint_folder.py", "convert/test_linearize_refusals.py", "convert/test_linearize.py",
                                     "test_folders.py"],
    "recipes/common/config.py": ["recipes/test_common_config.py", "convert/test_run.py"],
    "recipes/common/documents.py": ["recipes/test_text.py", "inputs/test_text.py"],
    "recipes/common/tokens.py": ["recipes/test_text.py", "inputs/test_text.py"],
    "recipes/common/windows.py": ["recipes/test_text.py"],
    "recipes/common/loop.py": ["recipes/test_loop.py", "recipes/lra/test_lra_train.py", "recipes/tinystories/test_tinystories_train.py"],
    "recipes/common/run.py": ["inputs/test_state.py", "recipes/tinystories/test_tinystories_train.py", "recipes/lra/test_lra_train.py"],
    "recipes/common/state.py": ["inputs/test_state.py", "recipes/tinystories/test_tinystories_train.py"],
    "recipes/lra/": ["recipes/lra/"],
    "recipes/lra/model.py": ["recipes/lra/test_lra_model.py", "recipes/lra/test_lra_train.py"],
    "recipes/lra/train": ["recipes/lra/test_lra_train.py"],
    "recipes/lra/batches.py": ["recipes/lra/test_lra_train.py"],
    "recipes/lra/report.py": ["recipes/lra/test_lra_train.py"],
    "recipes/lra/settings.py": ["recipes/test_settings.py", "recipes/lra/test_lra_train.py"],
    "recipes/lra/listops.py": ["recipes/lra/test_lra_listops.py"],
    "recipes/lra/pathfinder/": ["recipes/lra/test_lra_pathfinder.py"],
    "recipes/lra/data.py": ["recipes/lra/test_lra_data.py", "inputs/test_text.py"],
    "recipes/lra/prepare.py": ["recipes/lra/test_lra_data.py", "recipes/lra/test_lra_listops.py", "inputs/test_text.py", "test_folders.py"],
    "recipes/quickstart/": ["recipes/tinystories/test_quickstart.py", "recipes/tinystories/test_quickstart_smollm2.py"],
    "recipes/quickstart/smollm2.py": ["recipes/tinystories/test_quickstart_smollm2.py", "recipes/tinystories/test_quickstart.py"],
    "recipes/tinystories/": ["recipes/tinystories/test_tinystories_train.py", "recipes/tinystories/test_tinystories_evaluate.py"],
    "recipes/tinystories/data.py": ["recipes/tinystories/test_tinystories_data.py", "recipes/tinystories/test_tinystories_train.py"],
    "recipes/tinystories/evaluate.py": ["recipes/tinystories/test_tinystories_evaluate.py"],
    "recipes/tinystories/settings.py": ["recipes/test_settings.py", "recipes/tinystories/test_tinystories_train.py"],
    "recipes/tinystories/metrics.py": ["recipes/tinystories/test_tinystories_evaluate.py"],
    "kernels/": ["kernels/test_emulated.py"],
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One slip.

    Attributes:
        kind: the part of the project it is in.
        name: says what goes wrong.
        file: from the root of the checkout.
        old, new: a text that stands in the file once, and what is put in its place.
        test: the test, or file of tests, that holds it; "" for all of the file's.
    """

    kind: str
    name: str
    file: str
    old: str
    new: str
    test: str = ""

    @property
    def tests(self) -> list[str]:
        """The tests that should see it, from the root."""
        if self.test:
            return [f"tests/{self.test}"]
        place = max((place for place in TESTS if self.file.startswith(place)), key=len)
        of_its_name = [path.relative_to(_HERE).as_posix() for path in sorted(_HERE.glob(f"*/test_{Path(self.file).stem}.py"))]
        of_all = {OPERATOR: ["plugin/test_public.py"], PLUGIN: ["plugin/test_public.py"], KERNELS: []}.get(self.kind, ["test_defaults.py"])
        return [f"tests/{name}" for name in dict.fromkeys([*of_its_name, *TESTS[place], *of_all])]

    def applied(self, root: Path) -> str:
        """The file's text with the slip in it.

        Raises:
            ValueError: the text it replaces is not there, or stands there more than once.
        """
        text = (root / self.file).read_text(encoding="utf-8") if (root / self.file).exists() else ""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds {self.old!r} {text.count(self.old)} times; write the mutant anew")
        return text.replace(self.old, self.new)


def named(kind: str, *slips: tuple[str, ...]) -> list[Mutant]:
    """Mutants of one kind, each of (name, file, old, new) and, where it is known, the test that holds it."""
    return [Mutant(kind, *slip) for slip in slips]
