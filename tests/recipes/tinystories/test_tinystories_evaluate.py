"""Evaluation: the figures are those of a computation by hand, and the report is whole or absent."""

from __future__ import annotations

import json
import math

import pytest
import torch
from no_caches import no_caches
from torch.nn import functional as F
from typer.testing import CliRunner

from convert.linearize import linearize
from recipes.common.errors import RecipeError
from recipes.common.tokenizing import load_tokenizer
from recipes.tinystories import evaluate, evaluation
from recipes.tinystories.metrics import Prediction
from recipes.tinystories.model import go_on, load_model


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    linearize(tiny.model, folder)
    return folder


def by_hand(model, tokenizer, text, length):
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"), len(tokenizer.decode(ids[1:]).encode())


@pytest.mark.parametrize("which", ["softmax", "linear"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_each_story_alone(tiny, converted, which, batch_size):
    model = load_model(str(tiny.model if which == "softmax" else converted)).eval()
    tokenizer = load_tokenizer(str(tiny.model))
    texts = [tiny.texts[0], "A cat.", "The dog ran to the park.", tiny.texts[1][:90]]
    with no_caches():
        result = evaluation.score(model, tokenizer, texts, length=50, batch_size=batch_size)
    nats, sizes = zip(*(by_hand(model, tokenizer, text, 50) for text in texts), strict=True)
    together = torch.cat(nats)
    assert result["tokens"] == len(together)
    assert result["nats_per_token"] == pytest.approx(together.mean().item(), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(together.sum().item() / math.log(2) / sum(sizes), rel=1e-5)
    spans = result["by_position"]
    assert [(x["from"], x["to"]) for x in spans] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 49)]
    third = torch.cat([x[3:7] for x in nats])
    assert spans[2]["tokens"] == len(third)
    assert spans[2]["nats_per_token"] == pytest.approx(third.mean().item(), rel=1e-5)


def test_the_metric_gives_a_ratio_and_its_error():
    metric = Prediction()
    metric.add_batch(nats=[10.0, 20.0], tokens=[10, 10], bytes=[20, 40])
    metric.add_batch(nats=[60.0], tokens=[20], bytes=[30])
    result = metric.compute()
    assert result["nats_per_token"] == pytest.approx(90 / 40)
    assert result["bits_per_byte"] == pytest.approx(90 / 90 / math.log(2))
    assert result["perplexity"] == pytest.approx(math.exp(2.25))
    # Residuals -12.5, -2.5, 15 about a mean of 0: sum of squares 387.5.
    assert result["nats_per_token_error"] == pytest.approx(math.sqrt(387.5 / 2) * math.sqrt(3) / 40)


def test_a_softmax_cache_grows_and_a_linear_one_does_not(tiny, converted):
    softmax, linear = load_model(str(tiny.model)).eval(), load_model(str(converted)).eval()
    assert [evaluation.decoding(softmax, n)["cache_bytes"] for n in (8, 32)] == [2 * 2 * 8 * n * 4 for n in (8, 32)]
    sizes = [evaluation.decoding(linear, n)["cache_bytes"] for n in (8, 32)]
    assert sizes[0] == sizes[1] > 0


def test_a_continuation_ends_with_the_story(tiny):
    model, tokenizer = load_model(str(tiny.model)).eval(), load_tokenizer(str(tiny.model))
    assert go_on(model, tokenizer, "The dog ran", 5)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert go_on(model, tokenizer, "The dog ran", 5) == ""


def run(tiny, out, *models, **options):
    arguments = {"stories": 6, "length": 40, "decode": "8,16,4096", "tokens": 4, "device": "cpu", **options}
    flags = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    import typer

    app = typer.Typer()
    app.command()(evaluate.main)
    return CliRunner().invoke(app, [*models, "--data", str(tiny.text), "--out", str(out), *flags])


def test_the_report(tiny, converted, tmp_path):
    out = tmp_path / "report"
    done = run(tiny, out, f"teacher={tiny.model}", str(converted))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [".hf_linattn.json", "evaluation.json", "evaluation.md", "evaluation.png"]
    report = json.loads((out / "evaluation.json").read_text())
    assert [x["name"] for x in report["models"]] == ["teacher", str(converted)]
    assert [x["attention"] for x in report["models"]] == ["softmax", "linear with decay"]
    assert report["conditions"]["stories"] == 6
    assert [x["length"] for x in report["models"][0]["decoding"]] == [8, 16, 4096]
    text = (out / "evaluation.md").read_text()
    assert f"| teacher | softmax | 8,720 | {report['models'][0]['nats_per_token']:.4f} ±" in text
    assert "nats a token" in done.output
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    again = run(tiny, out, str(tiny.model))
    assert isinstance(again.exception, RecipeError)
    assert "exists already" in str(again.exception)
    assert json.loads((out / "evaluation.json").read_text()) == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "8,x"}, "expected whole numbers from 1 to 16,777,216 with commas"),
        ({"decode": "0"}, "expected whole numbers from 1 to"),
        ({"decode": str(2**24 + 1)}, "expected whole numbers from 1 to"),
        ({"dtype": "int8"}, "expected float32, bfloat16 or float16"),
        ({"device": "nonsense"}, "--device nonsense: not usable here"),
    ],
)
def test_bad_options_are_refused(tiny, tmp_path, options, message):
    done = run(tiny, tmp_path / "out", str(tiny.model), **options)
    assert isinstance(done.exception, RecipeError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def span(low, high, nats):
    return {"from": low, "to": high, "tokens": 1, "nats_per_token": nats}


PLAIN = {"attention": "softmax", "nats_per_token": 2.0, "nats_per_token_error": 0.125, "bits_per_byte": 1.5, "parameters": 12_345}
RESULTS = [
    {
        **PLAIN, "name": "a", "by_position": [span(1, 1, 3.0), span(2, 3, 2.5)], "decoding": [],
        "samples": [{"prompt": "One [1]\n day", "text": "a | cat\nran"}],
    },
    {
        **PLAIN, "name": "b", "by_position": [span(1, 1, 1.0), span(2, 3, 2.0), span(4, 4, 0.5)], "parameters": 9,
        "decoding": [{"length": 2048, "cache_bytes": 1_000_000, "ms_per_token": 1.256}], "samples": [{"prompt": "?", "text": "a dog"}],
    },
]  # fmt: skip
PAGE = """# Evaluation

data: x; stories: 2.

## Loss on 2 stories of x

| model | attention | parameters | loss, nats a token | bits a byte |
|---|---|---|---|---|
| a | softmax | 12,345 | 2.0000 ± 0.1250 | 1.5000 |
| b | softmax | 9 | 2.0000 ± 0.1250 | 1.5000 |

## Loss on them in nats a token, by the number of tokens before the one predicted

| tokens before | a | b |
|---|---|---|
| 1 | 3.000 | 1.000 |
| 2-3 | 2.500 | 2.000 |
| 4 | - | 0.500 |

## Generating, one sequence of random tokens

| model | tokens so far | cache, bytes | ms a token |
|---|---|---|---|
| b | 2,048 | 1,000,000 | 1.26 |

## Continuations

**One \\[1] day** ...

- a: a \\| cat ran
- b: a dog
"""


def test_the_page_as_it_stands():
    assert evaluation.markdown({"data": "x", "stories": 2}, RESULTS) == PAGE
    assert "Generating" not in evaluation.markdown({"data": "x", "stories": 2}, RESULTS[:1])


def test_what_is_shown_is_what_stands_on_the_page(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    evaluation.show({"data": "x", "stories": 2, "dtype": "float32", "device": "a device"}, RESULTS)
    said = " ".join(capsys.readouterr().out.split())
    for row in (line.strip("| ").replace("|", "│") for line in PAGE.splitlines() if line.startswith(("| a", "| b", "| 1", "| 2", "| 4"))):
        assert row in said, row
    for words in (
        "Loss on 2 stories of x",
        "Generating, one sequence of random tokens",
        "One [1] day ...",
        "a: a | cat ran b: a dog",
        "2 stories, float32, a device",
    ):
        assert words in said, words


def test_lengths_to_decode_at():
    assert evaluate._lengths("1, 16777216,") == [1, 2**24] and evaluate._lengths("") == []


def test_a_tokenizer_that_does_not_fit_is_refused(tiny):
    model, tokenizer = load_model(str(tiny.model)).eval(), load_tokenizer(str(tiny.model))
    model.resize_token_embeddings(100)
    with pytest.raises(RecipeError, match="do not belong together"):
        evaluation.score(model, tokenizer, tiny.texts[:2], 40, 2, "model")
    with pytest.raises(RecipeError, match="no token to predict"):
        evaluation.score(model, tokenizer, [""], 40, 2, "model")
