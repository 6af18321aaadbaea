"""The tables of an evaluation in the model cards of the students that were evaluated."""

from __future__ import annotations

from pathlib import Path

from convert.card import with_evaluation
from convert.errors import stage
from convert.evaluation.options import EvaluationOptions
from convert.evaluation.tables import Results, card_section
from recipes.common.files import hold, rewrite
from recipes.common.reading import MOST_BYTES, read_text, user_path


def write_cards(options: EvaluationOptions, results: Results) -> list[Path]:
    """Puts each student's figures beside the teacher's into its README.md, in place of those that stood there.

    Returns:
        The files.

    Raises:
        ConversionError: a card cannot be read or written, or another process writes the student.
    """
    written = []
    for subject in options.students():
        path = user_path(subject.path) / "README.md"
        with stage(f"writing {path}", "leave out --card"):
            held = hold(path.parent)
            try:
                card = read_text(path, MOST_BYTES) if path.is_file() else f"# {subject.name}\n"
                rewrite(path, with_evaluation(card, card_section(results, subject.name)))
            finally:
                held.release()
        written.append(path)
    return written
