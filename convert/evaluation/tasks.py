"""The usual tasks, by lm-eval, on a model that is loaded already; their rows from the hub or from a folder."""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from convert.errors import ConversionError, stage
from convert.evaluation.options import require_lm_eval
from recipes.common.reading import open_file, user_path

# By task: where lm-eval keeps it, and the metric that is usually quoted.
_STOCK = {
    "lambada_openai": ("lambada/lambada_openai.yaml", "acc"),
    "arc_easy": ("arc/arc_easy.yaml", "acc"),
    "arc_challenge": ("arc/arc_challenge.yaml", "acc_norm"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "acc_norm"),
    "piqa": ("piqa/piqa.yaml", "acc"),
    "winogrande": ("winogrande/default.yaml", "acc"),
    "boolq": ("super_glue/boolq/default.yaml", "acc"),
    "sciq": ("sciq/sciq.yaml", "acc"),
}
_HERE = "_of_local_rows"


def local_rows(folder: Path, task: str) -> Path:
    """The file of a task in a folder: TASK_test.jsonl, or TASK_..._validation.jsonl.xz and the like; of several the test split's.

    Raises:
        ConversionError: there is none.
    """
    found = sorted(path for pattern in ("jsonl", "jsonl.xz") for path in user_path(folder).glob(f"{task}*.{pattern}"))
    if not found:
        raise ConversionError(f"--task-rows {folder} has no {task}*.jsonl or {task}*.jsonl.xz; add it, or leave the task out")
    return next((path for path in found if "test" in path.name), found[0])


def measure_task(model: Any, tokenizer: Any, task: str, rows: Path | None, limit: int | None, batch: int) -> dict[str, Any]:
    """One task without examples before the question.

    Args:
        model, tokenizer: loaded, on their device.
        task: one of lm-eval's that this module knows.
        rows: the file of its rows, in the hub's fields; None: from the hub.
        limit: examples, the first ones; None: all.
        batch: requests at a time.

    Returns:
        ``score`` and its standard error ``score_error``, by the ``metric`` that is usually quoted; ``metrics``, all of them; ``examples``.

    Raises:
        ConversionError: lm-eval is missing, or fails, as it does where there is no network for the hub's rows.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    remedy = "mend the rows" if rows else "check the connection, or give --task-rows FOLDER with the rows in files"
    with _task_folder(task, rows) as folder, stage(f"running lm-eval's {task}", remedy):
        name = task + _HERE if rows else task
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
        manager = TaskManager(include_path=str(folder) if folder else None)
        answer: Any = lm_eval.simple_evaluate(
            wrapped, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
        )
    values = answer["results"][name]
    metrics = {key.removesuffix(",none"): value for key, value in values.items() if key.endswith(",none") and isinstance(value, float)}
    metric = _STOCK[task][1]
    examples = answer["n-samples"][name]["effective"]
    score = metrics[metric]
    error = (score * (1 - score) / max(examples - 1, 1)) ** 0.5
    found = {"score": score, "score_error": error, "metric": metric, "metrics": metrics}
    return found | {"examples": examples, "lm_eval": lm_eval.__version__}


@contextmanager
def _task_folder(task: str, rows: Path | None) -> Iterator[Path | None]:
    """A folder with the stock task on local rows, unpacked; None where the hub is asked."""
    if rows is None:
        yield None
        return
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks" / _STOCK[task][0]
    with tempfile.TemporaryDirectory(prefix="linattn-tasks-") as room:
        plain = Path(room) / "rows.jsonl"
        with stage(f"reading {rows}", "give rows of JSON, as they are or packed by xz"), open_file(rows) as raw:
            plain.write_bytes(lzma.decompress(raw.read()) if rows.suffix == ".xz" else raw.read())
        changes: dict[str, Any] = {"include": str(stock), "task": task + _HERE, "tag": [], "dataset_path": "json", "dataset_name": None}
        splits = {"training_split": None, "validation_split": None, "test_split": "test"}
        text = yaml.safe_dump({**changes, **splits, "dataset_kwargs": {"data_files": {"test": str(plain)}, "cache_dir": room}})
        (Path(room) / f"{task}.yaml").write_text(text, encoding="utf-8")
        yield Path(room)
